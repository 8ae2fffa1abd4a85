"""Metrics over images, with intervals: how well are boxes followed, and how sure is that?

Intervals are 95 % percentile intervals of the bootstrap (B. Efron, "Bootstrap methods: another look at the jackknife",
Annals of Statistics 7, 1979; B. Efron and R. Tibshirani, "An introduction to the bootstrap", 1993, chapter 13). Whole
images are resampled, as the objects of one image are alike. They say how much chance there is in which layouts and
noises were taken, not in the training of a model. Of a few dozen images they are too narrow; of one image, or where
all images agree, they are a point. The samples of AP are moved so that their mean is the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..detect.matching import ImageScore
from ..detect.metrics import Ratio, of_objects, quotients
from .ap import AP_NAMES, AveragePrecision

_BLOCK = 2_000_000  # weights at once
_LOW, _HIGH = 0.025, 0.975


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def summarize(
    images: Sequence[ImageScore], *, ap: bool = True, seed: int = 0, resamples: int = 1000
) -> dict[str, Estimate]:
    """Return metrics over images; shares are 0-1.

    Args:
        ap: with the AP family, which wants faster-coco-eval (extra `evaluation`).
        seed: of the resamples; the same seed gives the same intervals.

    Returns:
        objects, images: how many; their intervals are points.
        mean_iou: an object to which nothing was assigned counts 0.
        recall_50, recall_75: share of objects of IoU at least 0.5, 0.75.
        ATTRIBUTE: share of objects whose assigned detection has the right one.
        ATTRIBUTE_of_found: the same share among the found (IoU at least 0.5); left out where none is.
        mean_iou_right: mean IoU where found objects with a wrong attribute count 0, as COCO-MIG counts it. Only where
            attributes are judged.
        success: share of objects that are found and right in every attribute.
        picture_success: share of images of which all objects are.
        wrong_count: share of images with more or fewer objects of a requested label than requested.
        extra_objects: how many there are too many in an image.
        ap, ap_50, ap_75, ar: see `AveragePrecision`.
        clip, clip_objects: mean over the images, and boxes, for which they were measured; left out where none was.

    Raises:
        ValueError: there are no objects, or faster-coco-eval is missing.
    """
    statistics = _Statistics(images, ap)
    samples = _resample(statistics.resampled, len(images), resamples, seed)
    return _counts(images) | _estimates(statistics.point, samples)


def paired_difference(
    a: Sequence[ImageScore], b: Sequence[ImageScore], *, ap: bool = True, seed: int = 0, resamples: int = 1000
) -> dict[str, Estimate]:
    """Return by how much the metrics of `a` are above those of `b`, in images of the same layouts.

    Images are paired by their keys; those that only one side has (as the other's could not be read) are left out.
    Both sides are resampled together, so that easy and hard layouts cancel out: the interval is narrower than those
    of `a` and `b` suggest. An interval without 0 is a difference beyond chance.

    Returns:
        The names of `summarize` that both sides have. objects and images say how many were compared.

    Raises:
        ValueError: a key stands for different layouts, a side has a key twice, or they have none in common.
    """
    a, b = _pairs(a, b)
    of_a, of_b = _Statistics(a, ap), _Statistics(b, ap)
    names = [name for name in of_a.point if name in of_b.point]
    columns_a, columns_b = ([list(side.point).index(name) for name in names] for side in (of_a, of_b))

    def difference(weights: np.ndarray) -> np.ndarray:
        return of_a.resampled(weights)[:, columns_a] - of_b.resampled(weights)[:, columns_b]

    samples = _resample(difference, len(a), resamples, seed)
    point = {name: of_a.point[name] - of_b.point[name] for name in names}
    return _counts(a) | _estimates(point, samples, lowest=-1)


def ratios_of(values: np.ndarray, counted: np.ndarray, *, seed: int = 0, resamples: int = 1000) -> list[Estimate]:
    """Ratios of sums over n images, with the intervals of `summarize`.

    Args:
        values: (n, m), what is summed. counted: (n, m), what its sum is divided by.
    """

    def resampled(weights: np.ndarray) -> np.ndarray:
        return quotients(weights @ values, weights @ counted)

    point = quotients(values.sum(0), counted.sum(0)).tolist()
    samples = _resample(resampled, len(values), resamples, seed)
    return list(_estimates({str(k): value for k, value in enumerate(point)}, samples).values())


def _pairs(a: Sequence[ImageScore], b: Sequence[ImageScore]) -> tuple[list[ImageScore], list[ImageScore]]:
    by_key = [{image.key: image for image in side} for side in (a, b)]
    for side, images in zip(by_key, (a, b), strict=True):
        if len(side) < len(images):
            raise ValueError(f"{len(images)} images have only {len(side)} different keys; expected one key each")
    common = [key for key in by_key[0] if key in by_key[1]]
    if not common:
        raise ValueError("no image of one side is of a layout of the other; compare evaluations of the same layouts")
    for key in common:
        if by_key[0][key].layout != by_key[1][key].layout:
            raise ValueError(f"{key} is another layout on either side; compare evaluations of the same layouts")
    return [by_key[0][key] for key in common], [by_key[1][key] for key in common]


def _counts(images: Sequence[ImageScore]) -> dict[str, Estimate]:
    counts = {"objects": sum(len(image.objects) for image in images), "pictures": len(images)}
    return {name: Estimate(count, count, count) for name, count in counts.items()}


# Values -------------------------------------------------------------------------------------------------------------


def _of_images(images: Sequence[ImageScore]) -> dict[str, Ratio]:
    """Return each metric as a ratio of two sums over images: (n,) each."""
    scores = [score for image in images for score in image.objects]
    if not scores:
        raise ValueError("no objects to summarize")
    of_image = np.repeat(np.arange(len(images)), [len(image.objects) for image in images])

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_image, values, len(images))

    ratios = {name: (summed(values), summed(counted)) for name, (values, counted) in of_objects(scores).items()}
    each = np.ones(len(images))

    def of_each(values: Sequence[float]) -> Ratio:
        return np.array(values, float), each

    ratios["picture_success"] = of_each([image.success for image in images])
    ratios["wrong_count"] = of_each([image.extra + image.missing > 0 for image in images])
    ratios["extra_objects"] = of_each([image.extra for image in images])
    for name, measured in (
        ("clip", [() if image.clip is None else (image.clip,) for image in images]),
        ("clip_objects", [image.clip_objects or () for image in images]),
    ):
        if any(measured):
            ratios[name] = np.array([sum(values) for values in measured]), np.array([len(v) for v in measured], float)
    return ratios


class _Statistics:
    """The metrics of n images (`point`), and of resamples of them."""

    def __init__(self, images: Sequence[ImageScore], ap: bool):
        ratios = {name: ratio for name, ratio in _of_images(images).items() if ratio[1].any()}
        self._values, self._counted = (np.stack(columns, axis=1) for columns in zip(*ratios.values(), strict=True))
        self._ap = AveragePrecision(images) if ap else None
        self.point = {name: float(values.sum() / counted.sum()) for name, (values, counted) in ratios.items()}
        if self._ap:
            self.point |= zip(AP_NAMES, self._ap.point.tolist(), strict=True)

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """The metrics where image k counts `weights[:, k]` times: (r, n) -> (r, metrics); NaN is undefined."""
        ratios = quotients(weights @ self._values, weights @ self._counted)
        return np.hstack([ratios, self._ap.resampled(weights)]) if self._ap else ratios


# Intervals ----------------------------------------------------------------------------------------------------------


def _resample(statistic: Callable[[np.ndarray], np.ndarray], number: int, resamples: int, seed: int) -> np.ndarray:
    """Return a statistic (r, n) -> (r, metrics) of resamples of n images: (resamples, metrics)."""
    if resamples < 1:
        raise ValueError(f"{resamples} resamples; expected at least 1")
    return np.concatenate([statistic(weights) for weights in _weights(number, resamples, seed)])


def _weights(number: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Return how often each of n images is in a resample: blocks of (r, n)."""
    random = np.random.default_rng(seed)
    rows = max(_BLOCK // number, 1)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield random.multinomial(number, np.full(number, 1 / number), size).astype(float)


def _estimates(point: Mapping[str, float], samples: np.ndarray, lowest: float = 0) -> dict[str, Estimate]:
    """Intervals of samples (resamples, metrics); undefined samples are left out, and each interval holds its value.

    A repeated image agrees with itself, so that AP of resamples is too high, often all of it. What tells is how far
    they are from their mean; AP is from `lowest` to 1.
    """
    estimates = {}
    for (name, value), column in zip(point.items(), samples.T, strict=True):
        defined = column[~np.isnan(column)]
        if not len(defined):
            defined = np.array([value])
        if name in AP_NAMES:
            defined = np.clip(defined - defined.mean() + value, lowest, 1)
        low, high = np.quantile(defined, (_LOW, _HIGH)).tolist()
        estimates[name] = Estimate(value, min(low, value), max(high, value))
    return estimates
