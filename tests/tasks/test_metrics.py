"""Metrics against scikit-learn, scipy, seqeval and sacreBLEU; laws of the bootstrap."""

from __future__ import annotations

import math
import unicodedata
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from intarsia.errors import DataError, SpecError, UsageError
from intarsia.tasks.metrics import METRICS, compare, score
from intarsia.tasks.resample import Sample, additive, bootstrap, interval, over_seeds, paired, weights

LABELS = st.sampled_from(["a", "b", "c", "d"])
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=30)
TAGS = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y", "B", "I"])
LENIENT_TAGS = st.one_of(TAGS, st.sampled_from(["E-X", "S-X", "E-Y", "S-Y"]))
NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=25)


def value(metric: str, predictions: object, references: object) -> float:
    return score(metric, predictions, references, resamples=0).value  # type: ignore[arg-type]


def sentences(tags: st.SearchStrategy[str]) -> st.SearchStrategy[list[list[tuple[str, str]]]]:
    return st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=8), min_size=1, max_size=5)


# against the reference implementations


@settings(deadline=None)
@given(PAIRS)
def test_classification_agrees_with_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    p, r = [a for a, _ in pairs], [b for _, b in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": sk.accuracy_score(r, p),
            "macro_f1": sk.f1_score(r, p, average="macro", zero_division=0),
            "micro_f1": sk.f1_score(r, p, average="micro", zero_division=0),
            "mcc": sk.matthews_corrcoef(r, p),
        }
    for name, number in expected.items():
        assert value(name, p, r) == pytest.approx(number, abs=1e-12), name


@settings(deadline=None)
@given(st.lists(st.tuples(st.sets(LABELS), st.sets(LABELS)), min_size=1, max_size=15))
def test_several_labels_per_example_agree_with_scikit_learn(pairs: list[tuple[set[str], set[str]]]) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    p, r = [sorted(a) for a, _ in pairs], [sorted(b) for _, b in pairs]
    names = sorted({label for pair in pairs for side in pair for label in side})
    assume(len(names) > 1)  # scikit-learn takes one column for two classes
    matrices = [np.array([[name in row for name in names] for row in side]) for side in (r, p)]
    for average in ("macro", "micro"):
        assert value(f"{average}_f1", p, r) == pytest.approx(sk.f1_score(*matrices, average=average, zero_division=0))
    assert value("accuracy", p, r) == pytest.approx(sk.accuracy_score(*matrices))


@settings(deadline=None)
@given(NUMBERS)
def test_correlations_agree_with_scipy(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array(pairs, dtype=float).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {"pearson": stats.pearsonr(x, y).statistic, "spearman": stats.spearmanr(x, y).statistic}
    for name, number in expected.items():
        assert value(name, x, y) == pytest.approx(0.0 if math.isnan(number) else number, abs=1e-9), name


@settings(deadline=None)
@given(sentences(LENIENT_TAGS))
def test_lenient_span_f1_agrees_with_seqeval(drawn: list[list[tuple[str, str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    p, r = [[a for a, _ in s] for s in drawn], [[b for _, b in s] for s in drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert value("span_f1", p, r) == pytest.approx(seqeval.f1_score(r, p), abs=1e-12)
        assert value("token_accuracy", p, r) == pytest.approx(seqeval.accuracy_score(r, p))


@settings(deadline=None)
@given(sentences(TAGS))
def test_strict_span_f1_agrees_with_seqeval(drawn: list[list[tuple[str, str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme")
    p, r = [[a for a, _ in s] for s in drawn], [[b for _, b in s] for s in drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not any(tag[0] == "B" for side in (p, r) for s in side for tag in s):
            assert value("span_f1_strict", p, r) == 0
            return
        expected = seqeval.f1_score(r, p, mode="strict", scheme=scheme.IOB2)
    assert value("span_f1_strict", p, r) == pytest.approx(expected, abs=1e-12)


HYPOTHESES = ["the cat sat on the mat", "a dog barked", "", "nothing in common", "the cat"]
REFERENCES = ["the cat sat on a mat", "the dog barked loudly", "empty", "xyz", "the cat"]


@pytest.mark.parametrize("name, kind, options", [("bleu", "BLEU", {}), ("chrf", "CHRF", {}), ("chrf++", "CHRF", {"word_order": 2}), ("ter", "TER", {})])
def test_text_metrics_are_sacrebleus(name: str, kind: str, options: dict) -> None:
    import sacrebleu

    reference = getattr(sacrebleu, kind)(**options)
    found = score(name, HYPOTHESES, REFERENCES, resamples=50)
    assert found.value == pytest.approx(reference.corpus_score(HYPOTHESES, [REFERENCES]).score)
    assert found.signature == f"{reference.get_signature()}|norm:NFC" and "version:" in found.signature
    assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
    second = [*REFERENCES[:2], "other", "nothing in common", "the dog"]
    several = value(name, HYPOTHESES, [[a, b] for a, b in zip(REFERENCES, second)])
    assert several == pytest.approx(reference.corpus_score(HYPOTHESES, [REFERENCES, second]).score)


YORUBA = "Ọjọ́ ìbí mi ni ọjọ́ kẹrin oṣù kẹta, ẹ kú ọdún."


@pytest.mark.parametrize("name, perfect", [("bleu", 100.0), ("chrf", 100.0), ("chrf++", 100.0), ("ter", 0.0)])
def test_unicode_forms_do_not_count_as_errors(name: str, perfect: float) -> None:
    forms = [unicodedata.normalize(form, YORUBA) for form in ("NFD", "NFC")]
    assert forms[0] != forms[1]
    assert value(name, [forms[0]], [forms[1]]) == value(name, [forms[1]], [forms[0]]) == pytest.approx(perfect)


def test_perplexity_and_bits() -> None:
    assert value("perplexity", [math.log(8) * 3, math.log(2)], [3, 1]) == pytest.approx(2 ** (10 / 4))
    assert value("bits_per_character", [math.log(2) * 6, 0.0], [2, 1]) == pytest.approx(2.0)
    assert value("perplexity", [1e6], [1]) == math.inf
    for units in ([0], [-1]):
        with pytest.raises(DataError, match="units"):
            value("perplexity", [1.0], units)


# defined edges


@pytest.mark.parametrize(
    "metric, predictions, references, expected",
    [
        ("mcc", ["a", "a"], ["a", "a"], 0.0),
        ("mcc", ["a", "a"], ["a", "b"], 0.0),
        ("macro_f1", ["a"], ["b"], 0.0),
        ("macro_f1", ["a", "a"], ["a", "a"], 1.0),
        ("pearson", [1.0, 1.0], [1.0, 2.0], 0.0),
        ("pearson", [1e9 + 0.1] * 3, [1.0, 2.0, 3.0], 0.0),
        ("pearson", [3.0], [4.0], 0.0),
        ("spearman", [0, 0, 0], [1, 2, 3], 0.0),
        ("spearman", [1, 2, 1000], [1, 2, 3], 1.0),
        ("pearson", [1e-200, 2e-200, 3e-200], [-1, -2, -3], -1.0),
        ("span_f1", [["O"]], [["O"]], 0.0),
        ("span_f1", [["I-X"]], [["B-X"]], 1.0),
        ("span_f1_strict", [["I-X"]], [["B-X"]], 0.0),
        ("token_accuracy", [[], ["O"]], [[], ["O"]], 1.0),
        ("bleu", [""], ["a"], 0.0),
        ("accuracy", [1, 2], [1, 3], 0.5),
        ("macro_f1", [[], []], [[], []], 0.0),
        ("micro_f1", [["a"], []], [["a"], []], 1.0),
    ],
)
def test_edges_are_defined(metric: str, predictions: list, references: list, expected: float) -> None:
    found = score(metric, predictions, references, resamples=30)
    assert found.value == pytest.approx(expected) and not math.isnan(found.low or 0)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_nothing_and_unequal_numbers_are_refused(metric: str) -> None:
    with pytest.raises(DataError, match="of no examples"):
        score(metric, [], [])
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        score(metric, ["a"], ["a", "b"])


@pytest.mark.parametrize(
    "metric, predictions, references, message",
    [
        ("accuracy", [0, 1], ["a", "b"], "mix names and numbers"),
        ("macro_f1", [0, 1], ["a", "b"], "mix names and numbers"),
        ("mcc", [["a", "b"]], ["a"], "exactly one label"),
        ("pearson", [float("nan"), 1.0], [1.0, 2.0], "1 not finite"),
        ("spearman", ["a", "b"], [1.0, 2.0], "must be numbers"),
        ("span_f1", [["O"]], [["O", "O"]], "found 1 predicted and 2 true tags"),
        ("span_f1", ["OO"], [["O", "O"]], "one tag per token"),
        ("span_f1", [["NOUN"]], [["NOUN"]], "not a tag"),
        ("bleu", [None], ["a"], "a text was expected"),
        ("bleu", ["a"], [[]], "example 1 has no reference"),
    ],
)
def test_what_a_metric_cannot_read_is_refused(metric: str, predictions: list, references: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(metric, predictions, references)


def test_unknown_metric_suggests() -> None:
    with pytest.raises(SpecError, match=r"unknown metric 'makro_f1'; did you mean 'macro_f1'"):
        score("makro_f1", ["a"], ["a"])


# resampling


INPUTS = {
    "accuracy": (["a", "b", "a", "c"], ["a", "a", "a", "b"]),
    "macro_f1": (["a", "b", "a", "c"], ["a", "a", "a", "b"]),
    "micro_f1": ([["a"], ["b", "c"], [], ["c"]], [["a"], ["b"], ["a"], ["c"]]),
    "mcc": (["a", "b", "a", "c"], ["a", "a", "a", "b"]),
    "pearson": ([1.0, 2.0, 4.0, 0.5], [2.0, 1.0, 7.0, 0.0]),
    "spearman": ([1.0, 2.0, 2.0, 0.5], [2.0, 1.0, 7.0, 2.0]),
    "span_f1": ([["B-X", "I-X"], ["O"], ["I-Y"], ["B-X", "B-X"]], [["B-X", "O"], ["B-X"], ["B-Y"], ["B-X", "I-X"]]),
    "span_f1_strict": ([["B-X", "I-X"], ["O"], ["I-Y"], ["B-X", "B-X"]], [["B-X", "I-X"], ["B-X"], ["B-Y"], ["B-X", "I-X"]]),
    "token_accuracy": ([["B-X", "I-X"], ["O"], [], ["B-X"]], [["B-X", "O"], ["O"], [], ["O"]]),
    **{
        name: (
            [[(2, "a"), (0, "root")], [(0, "root")], [(0, "root"), (1, "punct")], [(2, "a"), (0, "b"), (1, "punct:x")]],
            [[(2, "b"), (0, "root")], [(0, "root")], [(2, "a"), (0, "root")], [(3, "a"), (0, "b"), (2, "punct:x")]],
        )
        for name in ("uas", "las", "las_no_punct")
    },
    "perplexity": ([3.0, 1.0, 0.5, 7.0], [3, 2, 1, 4]),
    "bits_per_character": ([3.0, 1.0, 0.5, 7.0], [3, 2, 1, 4]),
    "bleu": (HYPOTHESES[:2] + HYPOTHESES[3:], REFERENCES[:2] + REFERENCES[3:]),
    "chrf": (HYPOTHESES[:2] + HYPOTHESES[3:], REFERENCES[:2] + REFERENCES[3:]),
    "chrf++": (HYPOTHESES[:2] + HYPOTHESES[3:], REFERENCES[:2] + REFERENCES[3:]),
    "ter": (HYPOTHESES[:2] + HYPOTHESES[3:], REFERENCES[:2] + REFERENCES[3:]),
}


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_weights_are_repetitions(metric: str) -> None:
    """The law that makes the fast bootstrap right: a weighted score is the score of the repeated examples."""
    predictions, references = INPUTS[metric]
    sample = METRICS[metric].sample(predictions, references)
    (block,) = weights(4, 25, seed=3)
    for row, found in zip(block.astype(int), sample.value(block)):
        chosen = [i for i in range(4) for _ in range(row[i])]
        again = METRICS[metric].sample([predictions[i] for i in chosen], [references[i] for i in chosen])
        assert found == pytest.approx(again.score(), abs=1e-9)
    assert np.array_equal(sample.value(block)[::-1], sample.value(block[::-1])), "rows of weights are scored independently"


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_order_does_not_matter_and_seeds_repeat(metric: str) -> None:
    predictions, references = INPUTS[metric]
    one = score(metric, predictions, references, resamples=40, seed=5)
    assert one == score(metric, predictions, references, resamples=40, seed=5)
    assert one.value == pytest.approx(score(metric, predictions[::-1], references[::-1], resamples=0).value)
    assert one.higher_is_better == METRICS[metric].higher_is_better and one.size == 4
    assert one.low is not None and one.high is not None and one.low <= one.high
    bare = score(metric, predictions, references, resamples=0)
    assert (bare.low, bare.high) == (None, None) and "[" not in str(bare) and "[" in str(one)


def test_blocks_of_weights_are_resamples_and_do_not_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(weights(7, 50, seed=1)))
    assert whole.shape == (50, 7) and (whole.sum(1) == 7).all() and len(np.unique(whole, axis=0)) > 40
    monkeypatch.setattr("intarsia.tasks.resample._CELLS", 21)
    blocks = list(weights(7, 50, seed=1))
    assert len(blocks) == 17 and np.array_equal(np.concatenate(blocks), whole)
    assert not np.array_equal(np.concatenate(list(weights(7, 50, seed=2))), whole)


def test_the_interval_has_the_width_of_the_binomial() -> None:
    predictions, references = ["a"] * 300 + ["b"] * 100, ["a"] * 400
    found = score("accuracy", predictions, references, resamples=4000, seed=0)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.006) and found.high == pytest.approx(0.75 + half, abs=0.006)
    narrow = score("accuracy", predictions, references, resamples=4000, level=0.5)
    assert found.low < narrow.low < 0.75 < narrow.high < found.high  # type: ignore[operator]


def test_coverage_of_the_interval() -> None:
    """About 95 of 100 intervals of Bernoulli(0.7) samples hold 0.7."""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        right = generator.random(120) < 0.7
        found = interval(bootstrap(additive(np.stack([right, np.ones(120)], 1), lambda s: s[:, 0] / s[:, 1]), resamples=300, seed=trial))
        hits += found.low <= 0.7 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_paired_test() -> None:
    references = ["a"] * 200
    good, bad = ["a"] * 160 + ["b"] * 40, ["a"] * 120 + ["b"] * 80
    better = compare("accuracy", good, bad, references)
    worse = compare("accuracy", bad, good, references)
    assert better.value == pytest.approx(0.2) and better.low > 0 and better.p == pytest.approx(1 / 1001)
    assert (worse.value, worse.p) == (-better.value, better.p) and worse.low == pytest.approx(-better.high)
    same = compare("accuracy", good, good, references)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    swapped = ["b"] * 2 + good[2:160] + ["a"] * 2 + good[162:]
    assert compare("accuracy", good, swapped, references).p > 0.5, "equal scores by different errors"


def test_paired_p_values_are_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(1)
    small = 0
    for trial in range(200):
        a, b = (additive((generator.random(80) < 0.6)[:, None], lambda s: s[:, 0] / 80) for _ in range(2))
        small += paired(a, b, resamples=200, seed=trial).p < 0.1
    assert 0.03 <= small / 200 <= 0.18


def test_pairing_needs_the_same_examples() -> None:
    one, two = (Sample(n, lambda w: w[:, 0]) for n in (3, 4))
    with pytest.raises(DataError, match="one system has 3, the other 4"):
        paired(one, two)
    with pytest.raises(UsageError, match=r"level=1\.5"):
        interval(np.zeros(3), 1.5)


def test_over_seeds() -> None:
    found = over_seeds([0.5, 0.7, 0.9])
    assert (found.mean, found.deviation, found.runs) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    assert over_seeds([0.5]).deviation is None
    with pytest.raises(DataError):
        over_seeds([])
