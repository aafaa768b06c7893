"""Uncertainty of a score: percentile bootstrap, paired bootstrap test, mean and deviation over seeds.

A metric is given as `Sample`: a function from weights of the examples to its value, so that one matrix product scores all
resamples.  Metrics that are functions of sums (accuracy, F1, MCC, BLEU, chrF ...) are made by `additive`.

Sources: Efron & Tibshirani 1993, ch. 13 (percentile intervals); Koehn 2004 and Berg-Kirkpatrick et al. 2012 (paired test, the
null obtained by shifting the resampled differences to zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import DataError, UsageError

Array = NDArray[np.float64]

_CELLS = 1 << 22  # weights held at once


@dataclass(frozen=True, slots=True)
class Sample:
    """One set of predictions as a metric sees it.

    Attributes:
        size: number of examples N (for tagging: sentences), at least 1.
        value: weights `[R, N]` -> R values; weight 2 counts an example twice, 0 leaves it out.
        signature: how it was computed, for a reader who wants the same number.
    """

    size: int
    value: Callable[[Array], Array]
    signature: str = ""

    def score(self) -> float:
        """The metric on the examples as they are."""
        return float(self.value(np.ones((1, self.size)))[0])


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Score of `a` minus score of `b` on the same examples.

    Attributes:
        value: the difference.
        low, high: its percentile interval.
        p: two-sided p-value of "there is no difference"; never below 1 / (resamples + 1).
        size: number of examples.
    """

    value: float
    low: float
    high: float
    p: float
    size: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; the deviation of a single run is None."""

    mean: float
    deviation: float | None
    runs: int


def additive(rows: Sequence[Sequence[float]] | Array, value: Callable[[Array], Array], signature: str = "") -> Sample:
    """A metric that is a function of sums over examples.

    Args:
        rows: statistics `[N, S]`, one row per example.
        value: sums `[R, S]` -> R values.
    """
    table = np.asarray(rows, dtype=np.float64)
    return Sample(len(table), lambda weights: value(weights @ table), signature)


def weights(size: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each example occurs in each resample, `[r, N]` at a time; the same for all metrics with the same N."""
    if size < 1 or resamples < 1:
        raise UsageError(f"a bootstrap needs examples and resamples, found {size} and {resamples}")
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        yield np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def bootstrap(sample: Sample, *, resamples: int = 1000, seed: int = 0) -> Array:
    """Values of the metric on `resamples` resamples of the examples, `[resamples]`."""
    return np.concatenate([sample.value(block) for block in weights(sample.size, resamples, seed)])


def interval(values: Array, level: float = 0.95) -> Interval:
    """Percentile interval of resampled values."""
    if not 0 < level < 1:
        raise UsageError(f"level={level} must lie between 0 and 1, e.g. 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired(a: Sample, b: Sample, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Difference:
    """Compare two systems on the same examples, both on the same resamples.

    Raises:
        DataError: the systems were scored on different numbers of examples.
    """
    if a.size != b.size:
        raise DataError(f"a paired test needs the same examples: one system has {a.size}, the other {b.size}")
    observed = a.score() - b.score()
    drawn = np.concatenate([a.value(block) - b.value(block) for block in weights(a.size, resamples, seed)])
    around = interval(drawn, level)
    # the tolerance keeps ties ties when two equal numbers were summed in another order
    extreme = int(np.sum(np.abs(drawn - observed) >= abs(observed) - 1e-12))
    return Difference(observed, around.low, around.high, (extreme + 1) / (resamples + 1), a.size)


def over_seeds(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of runs that differ in their seed."""
    if not values:
        raise DataError("over_seeds needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)), len(values))
