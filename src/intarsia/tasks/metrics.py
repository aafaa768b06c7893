"""Metrics by name, each with its uncertainty: `score("macro_f1", predictions, references)`.

Definitions follow scikit-learn (accuracy, F1, MCC), scipy (Pearson, Spearman), seqeval (span F1) and sacreBLEU (BLEU, chrF,
TER, with signature); the tests compare with them.  Where those warn or return NaN the value here is defined: a ratio with
denominator zero, the correlation with a constant and the MCC of a single class are 0; no examples at all is a DataError.
Resampling is in `resample.py`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intarsia._registry import Registry
from intarsia.data.spans import Scheme, spans
from intarsia.errors import DataError
from intarsia.tasks.resample import Array, Difference, Sample, additive, bootstrap, interval, paired


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: its name in the registry.
        reads: what predictions and references are.
        sample: predictions and references -> `Sample`.
        higher_is_better: whether a larger value is a better one.
    """

    name: str
    reads: str
    sample: Callable[[Sequence[Any], Sequence[Any]], Sample]
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Score:
    """A value with its interval (None if no resamples were drawn)."""

    metric: str
    value: float
    low: float | None
    high: float | None
    size: int
    resamples: int
    level: float
    seed: int
    signature: str
    higher_is_better: bool

    def __str__(self) -> str:
        around = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.metric} {self.value:.4g}{around} (n={self.size})"


METRICS: Registry[Metric] = Registry("metric")


def score(
    metric: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Score:
    """Compute a metric and its percentile bootstrap interval over examples (sentences for tagging and corpus metrics).

    Args:
        metric: a name in `METRICS`.
        predictions, references: N each; `METRICS[metric].reads` says what.
        resamples: 0 for the value alone.

    Raises:
        DataError: no examples, different numbers of them, or values the metric cannot read.
        SpecError: unknown metric.
    """
    found = METRICS[metric]
    sample = _sample(found, predictions, references)
    around = interval(bootstrap(sample, resamples=resamples, seed=seed), level) if resamples else None
    low, high = (around.low, around.high) if around else (None, None)
    return Score(
        found.name, sample.score(), low, high, sample.size, resamples, level, seed, sample.signature, found.higher_is_better
    )


def mean(name: str, values: Sequence[float], weights: Sequence[float] | None = None, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Score:
    """A mean of numbers per example, larger being better: the sum of the values over that of the weights (None: their number)."""
    table = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)], axis=1)
    sample = additive(table, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))
    around = interval(bootstrap(sample, resamples=resamples, seed=seed), level)
    return Score(name, sample.score(), around.low, around.high, len(values), resamples, level, seed, "", True)


def compare(
    metric: str,
    a: Sequence[Any],
    b: Sequence[Any],
    references: Sequence[Any],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of two systems' predictions on the same references; raises as `score`."""
    found = METRICS[metric]
    first, second = _sample(found, a, references), _sample(found, b, references)
    return paired(first, second, resamples=resamples, seed=seed, level=level)


def _sample(metric: Metric, predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    if len(predictions) != len(references):
        raise DataError(f"{metric.name}: {len(predictions)} predictions for {len(references)} references")
    if not len(predictions):
        raise DataError(f"{metric.name} of no examples is not defined")
    return metric.sample(predictions, references)


def _ratio(above: Array, below: Array) -> Array:
    """`above / below`, 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below != 0)


LabelSets = list[frozenset[Any]]


def _label_sets(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[LabelSets, LabelSets]:
    """One label, or several (multi-label), per example; all of them names or all of them numbers."""
    sides = tuple(
        [frozenset(v) if isinstance(v, (list, tuple, set, frozenset)) else frozenset((v,)) for v in side]
        for side in (predictions, references)
    )
    kinds = {isinstance(label, str) for side in sides for labels in side for label in labels}
    if len(kinds) > 1:
        raise DataError("labels mix names and numbers; decode the ids to label names first")
    return sides[0], sides[1]


def _indicators(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[Array, Array]:
    """Predicted and true labels as 0/1 matrices `[N, C]` over the labels that occur in either."""
    sides = _label_sets(predictions, references)
    classes = {label: i for i, label in enumerate(sorted({label for side in sides for labels in side for label in labels}))}
    tables = tuple(np.zeros((len(side), len(classes))) for side in sides)
    for side, table in zip(sides, tables):
        for row, labels in enumerate(side):
            table[row, [classes[label] for label in labels]] = 1
    return tables[0], tables[1]


def _accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    hits = [[p == r, 1] for p, r in zip(*_label_sets(predictions, references))]
    return additive(hits, lambda sums: _ratio(sums[:, 0], sums[:, 1]))


def _macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    p, t = _indicators(predictions, references)
    count = p.shape[1]

    def value(sums: Array) -> Array:
        hits, total = sums[:, :count], sums[:, count:]
        # as scikit-learn: the mean over the classes that occur in predictions or references of the (re)sample
        return _ratio(_ratio(2 * hits, total).sum(1), (total > 0).sum(1).astype(np.float64))

    return additive(np.concatenate([p * t, p + t], axis=1), value)


def _micro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    p, t = _indicators(predictions, references)
    return additive(np.stack([(p * t).sum(1), (p + t).sum(1)], axis=1), lambda sums: _ratio(2 * sums[:, 0], sums[:, 1]))


def _mcc(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    p, t = _indicators(predictions, references)
    if (p.sum(1) != 1).any() or (t.sum(1) != 1).any():
        raise DataError("mcc: exactly one label per example was expected; for several use micro_f1 or macro_f1")
    count = p.shape[1]

    def value(sums: Array) -> Array:
        correct, n, predicted, true = sums[:, 0], sums[:, 1], sums[:, 2 : 2 + count], sums[:, 2 + count :]
        spread = (n**2 - (predicted**2).sum(1)) * (n**2 - (true**2).sum(1))
        return _ratio(correct * n - (predicted * true).sum(1), np.sqrt(spread))

    return additive(np.concatenate([(p * t).sum(1, keepdims=True), np.ones((len(p), 1)), p, t], axis=1), value)


def _numbers(name: str, values: Sequence[Any]) -> Array:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers, found {values[0]!r}, ...") from None
    if found.ndim != 1 or not np.isfinite(found).all():
        raise DataError(f"{name} must be a list of finite numbers, found shape {found.shape} with {int((~np.isfinite(found)).sum())} not finite")
    return found


def _weighted_correlation(x: Array, y: Array, weights: Array) -> Array:
    """Correlation of `x` and `y` (`[N]` or `[R, N]`) under weights `[R, N]`; 0 where one of them is constant."""
    total = weights.sum(1, keepdims=True)
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    xx, yy, xy = (weights * x * x).sum(1), (weights * y * y).sum(1), (weights * x * y).sum(1)
    varies = (xx > 1e-12 * total[:, 0]) & (yy > 1e-12 * total[:, 0])
    return np.clip(_ratio(np.where(varies, xy, 0.0), np.where(varies, np.sqrt(xx * yy), 1.0)), -1, 1)


def _standard(x: Array) -> Array:
    """Centred and scaled, which no correlation notices and rounding does."""
    x = x / (np.abs(x).max() or 1.0)
    scale = x.std()
    return (x - x.mean()) / (scale if scale > 1e-12 else np.inf)


def _pearson(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    x, y = _standard(_numbers("predictions", predictions)), _standard(_numbers("references", references))
    return Sample(len(x), lambda weights: _weighted_correlation(x, y, weights))


def _ranker(x: Array) -> Callable[[Array], Array]:
    """Weights `[R, N]` -> mean rank of every example within its resample, `[R, N]` (ties share their mean rank)."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def ranks(weights: Array) -> Array:
        sizes = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]

    return ranks


def _spearman(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    x, y = _numbers("predictions", predictions), _numbers("references", references)
    rank_x, rank_y = _ranker(x), _ranker(y)
    return Sample(len(x), lambda weights: _weighted_correlation(rank_x(weights), rank_y(weights), weights))


def _sentences(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    for i, (p, r) in enumerate(zip(predictions, references)):
        if isinstance(p, str) or isinstance(r, str) or len(p) != len(r):
            raise DataError(f"sentence {i + 1}: one tag per token was expected, found {len(p)} predicted and {len(r)} true tags")


def _span_f1(scheme: Scheme) -> Callable[[Sequence[Any], Sequence[Any]], Sample]:
    def sample(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
        _sentences(predictions, references)
        pairs = [(set(spans(p, scheme)), set(spans(r, scheme))) for p, r in zip(predictions, references)]
        rows = [[len(p & r), len(p) + len(r)] for p, r in pairs]
        return additive(rows, lambda sums: _ratio(2 * sums[:, 0], sums[:, 1]), f"micro|scheme:{scheme}|unit:sentence")

    return sample


def _token_accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
    _sentences(predictions, references)
    rows = [[sum(a == b for a, b in zip(p, r)), len(r)] for p, r in zip(predictions, references)]
    return additive(rows, lambda sums: _ratio(sums[:, 0], sums[:, 1]))


def _attachment(relations: bool, punctuation: bool) -> Callable[[Sequence[Any], Sequence[Any]], Sample]:
    """Share of the words with the right head (and relation, subtypes included)."""

    def sample(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
        _sentences(predictions, references)
        rows = []
        for predicted, right in zip(predictions, references):
            chosen = [(p, r) for p, r in zip(predicted, right) if punctuation or r[1].partition(":")[0] != "punct"]
            rows.append([sum(tuple(p) == tuple(r) if relations else p[0] == r[0] for p, r in chosen), len(chosen)])
        kept = "kept" if punctuation else "left out"
        return additive(rows, lambda sums: _ratio(sums[:, 0], sums[:, 1]), f"punct:{kept}|subtypes:kept|unit:sentence")

    return sample


def _rate(name: str, transform: Callable[[Array], Array]) -> Callable[[Sequence[Any], Sequence[Any]], Sample]:
    """Summed negative log-likelihoods (nats) over summed units, transformed."""

    def sample(losses: Sequence[Any], units: Sequence[Any]) -> Sample:
        rows = np.stack([_numbers("losses", losses), _numbers("units", units)], axis=1)
        if (rows[:, 1] < 0).any() or not rows[:, 1].sum():
            raise DataError(f"{name}: the examples have {rows[:, 1].sum():g} units; at least one, and no negative count, was expected")

        def value(sums: Array) -> Array:
            with np.errstate(over="ignore"):  # a perplexity beyond the range of a float is infinite
                return transform(_ratio(sums[:, 0], sums[:, 1]))

        return additive(rows, value)

    return sample


def _nfc(text: object) -> str:
    if not isinstance(text, str):
        raise DataError(f"a text was expected, found {text!r}")
    return unicodedata.normalize("NFC", text)


def _sacrebleu(name: str, **options: object) -> Callable[[Sequence[Any], Sequence[Any]], Sample]:
    """A corpus metric of sacreBLEU; both sides are brought to NFC first, a reference may be several."""

    def sample(predictions: Sequence[Any], references: Sequence[Any]) -> Sample:
        from sacrebleu import metrics  # slow to import, and only here

        metric = getattr(metrics, name)(**options)
        several = [[r] if isinstance(r, str) else list(r) for r in references]
        if not all(several):
            raise DataError(f"example {several.index([]) + 1} has no reference")
        most = max(map(len, several))
        streams = [[_nfc(refs[k]) if k < len(refs) else None for refs in several] for k in range(most)]
        rows = metric._extract_corpus_statistics([_nfc(p) for p in predictions], streams)

        def value(sums: Array) -> Array:
            return np.array([metric._compute_score_from_stats(list(row)).score for row in sums])

        return additive(rows, value, f"{metric.get_signature()}|norm:NFC")

    return sample


_CLASSES = "one label (or collection of labels) per example"
_TAGS = "one sequence of tags per sentence"
_ARCS = "one (head, relation) per word, a sequence per sentence"
_TEXTS = "one text per example; a reference may be a list of texts"
for _metric in (
    Metric("accuracy", _CLASSES, _accuracy),
    Metric("macro_f1", _CLASSES, _macro_f1),
    Metric("micro_f1", _CLASSES, _micro_f1),
    Metric("mcc", "one label per example", _mcc),
    Metric("pearson", "one number per example", _pearson),
    Metric("spearman", "one number per example", _spearman),
    Metric("span_f1", _TAGS + "; spans as seqeval's default and conlleval", _span_f1("lenient")),
    Metric("span_f1_strict", _TAGS + "; spans as seqeval's strict IOB2", _span_f1("iob2")),
    Metric("token_accuracy", _TAGS, _token_accuracy),
    Metric("uas", _ARCS, _attachment(False, True)),
    Metric("las", _ARCS, _attachment(True, True)),
    Metric("las_no_punct", _ARCS + "; words that are no punctuation", _attachment(True, False)),
    Metric("perplexity", "summed loss in nats, and number of tokens, per example", _rate("perplexity", np.exp), False),
    Metric(
        "bits_per_character",
        "summed loss in nats, and number of characters, per example",
        _rate("bits_per_character", lambda rate: rate / np.log(2)),
        False,
    ),
    Metric("bleu", _TEXTS, _sacrebleu("BLEU")),
    Metric("chrf", _TEXTS, _sacrebleu("CHRF")),
    Metric("chrf++", _TEXTS, _sacrebleu("CHRF", word_order=2)),
    Metric("ter", _TEXTS, _sacrebleu("TER"), False),
):
    METRICS.add(_metric.name, _metric)
