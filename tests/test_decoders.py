"""Decoding processes that hang or die keep nothing waiting."""

import io
import os
import signal
import time

import psutil
import pytest
from PIL import Image

from gligen_xl.prepare import decoding
from gligen_xl.prepare.decoding import Decoders
from gligen_xl.prepare.framing import Framing
from gligen_xl.prepare.item import Item
from gligen_xl.prepare.report import UnitReport


@pytest.fixture
def decoders():
    decoders = Decoders(1, Framing(resolutions=(64,)), 2)
    yield decoders
    decoders.close()


def images(number):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return [Item(image_id=f"picture-{k}", image=file.getvalue()) for k in range(number)]


def children():
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_hangs_or_dies_fails_the_unit(decoders, monkeypatch, nothing_hangs, number):
    taken = decoders.decode(iter(images(8)), UnitReport())
    assert next(taken)[0].image_id == "picture-0"
    (worker,) = (process.pid for process in decoders._pool._processes.values())
    monkeypatch.setattr(decoding, "LONGEST", 1.0)
    os.kill(worker, number)
    says = "stuck in picture-" if number == signal.SIGSTOP else "a decoding process died"
    with pytest.raises(RuntimeError, match=says):
        list(decoders.decode(iter(images(100)), UnitReport()))
    end = time.monotonic() + 20
    while worker in children() and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(list(decoders.decode(iter(images(3)), UnitReport()))) == 3  # others take their place


def test_a_source_that_hangs_does_not_keep_the_unit_from_failing(decoders, monkeypatch, nothing_hangs):
    monkeypatch.setattr(decoding, "LONGEST_READ", 0.5)

    def hanging():
        yield from images(1)
        time.sleep(1000)

    taken = decoders.decode(hanging(), UnitReport())
    next(taken)
    began = time.monotonic()
    taken.close()
    assert time.monotonic() - began < 20
