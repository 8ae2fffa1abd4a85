"""How alike two sets of images are: FID (arXiv 1706.08500) and KID (arXiv 1801.01401), with clean-fid's features.

clean-fid (arXiv 2104.11222) resizes images as FID should be given, and needs torchvision, which breaks diffusers and
transformers unless it is of the same build as torch. So it runs in a process of its own, with an interpreter that may
be another environment's; see `ENVIRONMENT`. The features' network is fetched by clean-fid at the first use.

FID of few images is too high, the more so the fewer they are: compare only sets of the same size, best of 10,000 or
more. KID has no such bias.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..io import read_json, write_json

ENVIRONMENT = (
    "clean-fid wants an environment of its own, where torchvision is of the same build as torch: "
    "python -m venv fid-env && fid-env/bin/pip install clean-fid, then --fid_python fid-env/bin/python"
)
_WEIGHTS = (
    "clean-fid fetches its network at the first use. Without a network put inception-2015-12-05.pt into /tmp, where it "
    "looks first"
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PROGRAM = Path(__file__).with_name("inception.py")
_REAL = "real images"
_ROWS = 1024  # of a kernel matrix at once


@dataclass(frozen=True)
class Distance:
    """Of a set of images from the real ones.

    Args:
        fid: as clean-fid gives it.
        fid_low, fid_high: 95 % interval over the draw of the set's images; the real ones are held as they are.
        kid: unbiased, so it may be a little under 0; not multiplied by 1,000.
        kid_low, kid_high: 95 % interval over the draw of images of both sets.
        pictures, real_pictures: how many there were.
    """

    fid: float
    fid_low: float
    fid_high: float
    kid: float
    kid_low: float
    kid_high: float
    pictures: int
    real_pictures: int


def images_in(folder: str | Path) -> list[Path]:
    """Return all image files under a folder, sorted, without hidden ones.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return found


def distances(
    sets: Mapping[str, Sequence[str | Path]],
    real: Sequence[str | Path],
    *,
    python: str | Path | None = None,
    device: str = "cpu",
    workers: int = 4,
    batch_size: int = 32,
) -> dict[str, Distance]:
    """Return how far each set of image files is from the real ones; these are looked at once.

    Args:
        sets: files by name; `images_in` gives those of a folder.
        python: the interpreter that has clean-fid; None: this one.
        workers: processes that resize.

    Raises:
        FileNotFoundError: there is no such interpreter.
        ValueError: fewer than two images in a set, or clean-fid did not run; says why, and what to do.
    """
    every = {_REAL: real, **sets}
    for name, files in every.items():
        if len(files) < 2:
            raise ValueError(f"{name}: {len(files)} images; FID and KID need at least 2, and mean little below 10,000")
    with tempfile.TemporaryDirectory(prefix="gligen-xl-fid-") as folder:
        request = {
            "sets": {name: [str(Path(file).absolute()) for file in files] for name, files in every.items()},
            "real": _REAL, "device": device, "workers": workers, "batch_size": batch_size,
        }  # fmt: skip
        write_json(Path(folder) / "request.json", request)
        _run(python or sys.executable, Path(folder))
        fids = read_json(Path(folder) / "fid.json")
        features = [np.load(Path(folder) / f"{k}.npy", allow_pickle=False) for k in range(len(every))]
    real_features, *others = features
    among_real = kernel_means(real_features)
    found = {}
    for name, of_set in zip(sets, others, strict=True):
        error = frechet_error(of_set, real_features)
        fid = fids[name], fids[name] - 1.96 * error, fids[name] + 1.96 * error
        kid = kernel_distance(of_set, real_features, among_real)
        found[name] = Distance(*fid, *kid, len(of_set), len(real_features))
    return found


def _run(python: str | Path, folder: Path) -> None:
    """Run the program; its progress bars go to the terminal."""
    command = [str(python), str(_PROGRAM), str(folder / "request.json"), str(folder)]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise FileNotFoundError(f"no interpreter {python}: {error.strerror}. {ENVIRONMENT}") from error
    if code:
        told = folder / "error.json"
        error = read_json(told) if told.is_file() else {"kind": "", "text": f"it ended with exit code {code}"}
        advice = _WEIGHTS if error["kind"] in ("URLError", "HTTPError") else ENVIRONMENT
        raise ValueError(f"clean-fid did not run with {python}: {error['text']}. {advice}")


def frechet_error(features: np.ndarray, real: np.ndarray) -> float:
    """Standard error of the FID of features (n, width) from the real ones (m, width), over the draw of the first.

    The infinitesimal jackknife (B. Efron, "The jackknife, the bootstrap and other resampling plans", 1982, chapter 6):
    the spread of what each image adds to the FID, to first order. Resampled images repeat, which lowers the rank of
    their covariance, and their FID varies more than that of other images would.
    """
    x, other = features.astype(np.float64), real.astype(np.float64)
    mean = x.mean(0)
    centred = x - mean
    root = _power(np.atleast_2d(np.cov(other.T)), 0.5)
    inverse = _power(root @ np.atleast_2d(np.cov(x.T)) @ root, -0.5)
    # FID = |mean - real mean|^2 + tr(C) + tr(real C) - 2 tr((R C R)^(1/2)), by mean and covariance C of the images.
    seen = centred @ root
    shares = 2 * centred @ (mean - other.mean(0)) + np.square(centred).sum(1) - ((seen @ inverse) * seen).sum(1)
    return float(shares.std(ddof=1) / np.sqrt(len(x)))


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Raise a symmetric matrix without negative eigenvalues to a power; those that are 0 but for rounding stay 0."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def kernel_distance(
    features: np.ndarray, real: np.ndarray, among_real: np.ndarray | None = None
) -> tuple[float, float, float]:
    """KID between two sets of features (n, width) and (m, width): the value, and its 95 % interval.

    The squared maximum mean discrepancy with the kernel (x.y / width + 1)**3, without bias and over all images; the
    mean over random subsets, as it is often given, estimates the same. The interval is the normal one of a U-statistic:
    its variance is that of the images' own shares in it, summed over both sets.

    Args:
        among_real: `kernel_means` of the real ones, where it is known.
    """
    x, y = features.astype(np.float64), real.astype(np.float64)
    among_x, among_y = kernel_means(x), kernel_means(y) if among_real is None else among_real
    x_to_y, y_to_x = _kernel_means_between(x, y)
    value = among_x.mean() + among_y.mean() - 2 * x_to_y.mean()
    variance = (2 * (among_x - x_to_y)).var(ddof=1) / len(x) + (2 * (among_y - y_to_x)).var(ddof=1) / len(y)
    half = 1.96 * np.sqrt(variance)
    return float(value), float(value - half), float(value + half)


def kernel_means(features: np.ndarray) -> np.ndarray:
    """(n,): the mean kernel of each row of (n, width) with the others."""
    x = features.astype(np.float64)
    means = np.empty(len(x))
    for rows, kernel in _kernels(x, x):
        itself = kernel[np.arange(len(kernel)), np.arange(len(x))[rows]]
        means[rows] = (kernel.sum(1) - itself) / (len(x) - 1)
    return means


def _kernel_means_between(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(len(a),) and (len(b),): the mean kernel of each row of one with those of the other."""
    of_a, of_b = np.empty(len(a)), np.zeros(len(b))
    for rows, kernel in _kernels(a, b):
        of_a[rows] = kernel.mean(1)
        of_b += kernel.sum(0)
    return of_a, of_b / len(a)


def _kernels(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Return the kernel of some rows of `a` with all of `b`, part by part."""
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, (a[rows] @ b.T / a.shape[1] + 1) ** 3
