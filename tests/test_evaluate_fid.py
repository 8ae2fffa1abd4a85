"""FID and KID: clean-fid runs in a process of its own (here a stand-in for it), KID and its interval are ours."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from gligen_xl.evaluate.fid import distances, frechet_error, images_in, kernel_distance

# In the place of clean-fid: features of an image are its mean colour and more, the FID is the distance of the means.
CLEANFID = """
import numpy as np
from PIL import Image

def build_feature_extractor(mode, device, use_dataparallel):
    assert (mode, device.type, use_dataparallel) == ("clean", "cpu", False)
    return "network"

def get_files_features(files, network, num_workers, batch_size, device, mode, description):
    assert (network, num_workers, batch_size, mode) == ("network", 2, 16, "clean")
    with open(LOG, "a") as log:
        log.write(description + "\\n")
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32).mean((0, 1)) / 255 for file in files])

def fid_from_feats(a, b):
    return np.square(a.mean(0) - b.mean(0)).sum()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a module `cleanfid` where the process will look for it; returns the file of what it was asked."""

    def write(source):
        package = tmp_path / "modules" / "cleanfid"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "fid.py").write_text(f"LOG = {str(tmp_path / 'log')!r}\n{source}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
        return tmp_path / "log"

    return write


def paint(folder, *greys):
    folder.mkdir(parents=True, exist_ok=True)
    for k, grey in enumerate(greys):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{k}.png")
    return folder


def test_distances_of_sets_from_the_real_images(tmp_path, stand_in):
    log = stand_in(CLEANFID)
    real = images_in(paint(tmp_path / "real", 0, 51, 102, 255))
    near, far = images_in(paint(tmp_path / "near", 0, 51, 153)), images_in(paint(tmp_path / "far", 255, 204))
    found = distances({"near": near, "far": far}, real, workers=2, batch_size=16)
    assert list(found) == ["near", "far"]
    assert log.read_text().split("\n")[:-1] == ["real images", "near", "far"]  # each is looked at once
    assert found["near"].fid == pytest.approx(3 * (204 / 255 / 3 - 408 / 255 / 4) ** 2, abs=1e-6)
    assert found["far"].fid > found["near"].fid
    assert found["near"].fid_low < found["near"].fid < found["near"].fid_high
    assert (found["near"].pictures, found["far"].pictures, found["far"].real_pictures) == (3, 2, 4)
    features = [np.repeat(np.array(greys)[:, None] / 255, 3, 1) for greys in ((0, 51, 153), (0, 51, 102, 255))]
    expected = kernel_distance(*features)
    one = found["near"]
    assert (one.kid, one.kid_low, one.kid_high) == pytest.approx(expected, abs=1e-5)


def test_images_of_a_folder(tmp_path):
    paint(tmp_path, 1, 2)
    paint(tmp_path / "more", 3)
    paint(tmp_path / ".hidden", 4)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / ".0.png.7.partial").write_text("")
    names = [str(path.relative_to(tmp_path)) for path in images_in(tmp_path)]
    assert names == ["0.png", "1.png", "more/0.png"]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no images"):
            images_in(folder)


def plain_kid(x, y):
    """The definition, pair by pair."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    among = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    return sum(among) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_unbiased_mean_discrepancy(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 5)), rng.normal(0.5, size=(7, 5))
    value = kernel_distance(x, y)[0]
    assert value == pytest.approx(plain_kid(x, y))
    assert kernel_distance(y, x)[0] == pytest.approx(value)
    monkeypatch.setattr("gligen_xl.evaluate.fid._ROWS", 3)  # in parts
    assert kernel_distance(x, y) == pytest.approx(kernel_distance(x[::-1], y))
    assert kernel_distance(x, y)[0] == pytest.approx(value)


def test_the_interval_of_kid_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)

    def sample(count, mean):
        return rng.normal(mean, size=(count, 4))

    truth = np.mean([kernel_distance(sample(1000, 0.5), sample(1000, 0))[0] for _ in range(5)])
    held = 0
    for _ in range(200):
        value, low, high = kernel_distance(sample(80, 0.5), sample(120, 0))
        assert low < value < high
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


def frechet(x, y):
    """The definition: of two normal distributions."""
    a, b = np.cov(x.T), np.cov(y.T)
    shared = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * shared


@pytest.mark.parametrize(("count", "width"), [(400, 4), (300, 24), (20, 24)])  # many images, fewer, fewer than features
def test_the_interval_of_fid_is_as_wide_as_fid_varies(count, width):
    rng = np.random.default_rng(0)
    mixed, other = rng.normal(size=(2, width, width))
    real = rng.normal(size=(500, width)) @ mixed
    drawn = [np.maximum(rng.normal(0.3, 1, size=(count, width)) @ other, 0) for _ in range(100)]
    errors = [frechet_error(of_set, real) for of_set in drawn]
    assert np.mean(errors) == pytest.approx(np.std([frechet(of_set, real) for of_set in drawn]), rel=0.25)


# Errors -------------------------------------------------------------------------------------------------------------


def sets(tmp_path):
    return {"beta-1": images_in(paint(tmp_path / "made", 1, 2))}, images_in(paint(tmp_path / "real", 3, 4))


def test_an_interpreter_without_clean_fid_says_how_to_make_one(tmp_path, stand_in, capfd):
    stand_in("raise ImportError('cannot import torchvision')")
    with pytest.raises(ValueError, match=r"did not run with .*: cannot import torchvision\. .*python -m venv fid-env"):
        distances(*sets(tmp_path))
    stand_in("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ValueError, match=r"nms does not exist\. .*--fid_python fid-env/bin/python"):
        distances(*sets(tmp_path))
    assert "Traceback" not in capfd.readouterr().err


def test_a_network_that_cannot_be_fetched_says_where_it_may_lie(tmp_path, stand_in):
    stand_in("import urllib.error\ndef build_feature_extractor(*_, **__): raise urllib.error.URLError('no route')")
    with pytest.raises(ValueError, match=r"no route.*inception-2015-12-05\.pt into /tmp"):
        distances(*sets(tmp_path))


def test_what_is_no_interpreter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no interpreter .*/nowhere: No such file or directory\. .*fid-env"):
        distances(*sets(tmp_path), python=tmp_path / "nowhere")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="it ended with exit code 3"):
        distances(*sets(tmp_path), python=broken)


def test_too_few_images_are_named(tmp_path):
    made, real = sets(tmp_path)
    with pytest.raises(ValueError, match="beta-1: 1 images; FID and KID need at least 2"):
        distances({"beta-1": made["beta-1"][:1]}, real)
    with pytest.raises(ValueError, match="real images: 0 images"):
        distances(made, [])


def test_the_program_needs_nothing_of_this_library(tmp_path, stand_in):
    """Nor are the modules beside it, as `clip` and `colour`, in the way of packages of these names."""
    checks = "assert 'gligen_xl' not in sys.modules and not importlib.util.find_spec('colour')"
    stand_in(f"import importlib.util, sys\n{checks}\n{CLEANFID}")
    found = distances(*sets(tmp_path), python=sys.executable, workers=2, batch_size=16)
    assert found["beta-1"].pictures == 2
    json.dumps(vars(found["beta-1"]))
