import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["GLIGEN_XL_CACHE"] = tempfile.mkdtemp(prefix="gligen-xl-cache-")

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers.adapters import unet  # noqa: E402, F401 - fixtures
from helpers.commands import layouts, model  # noqa: E402, F401 - fixtures
from helpers.forked import server  # noqa: E402, F401
from helpers.hub import hub  # noqa: E402, F401

atexit.register(shutil.rmtree, os.environ["GLIGEN_XL_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The measurement of the embedded model first: it takes minutes, and the other process has all the rest."""
    items.sort(key=lambda item: "test_shapes_model" not in item.nodeid)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes_pipeline():
    """The embedded model with its adapter. Shared: a test that changes it puts it back."""
    from gligen_xl import StableDiffusionXLGLIGENPipeline

    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def nothing_hangs():
    """The test fails after a minute."""

    def give_up(*_):
        raise TimeoutError("the test hangs")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def own_precision():
    """The test may train in a precision of its own: accelerate knows one a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
