import atexit
import os
import shutil
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["GLIGEN_XL_CACHE"] = tempfile.mkdtemp(prefix="gligen-xl-cache-")

import pytest
import torch

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
