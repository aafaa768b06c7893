"""Whether predictions have collapsed to one answer, as fresh heads with too small a learning rate do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from intarsia.errors import listing
from intarsia.train.task import Prediction

LEAST = 10
"""Answers below which one value among them says nothing, where the right answers are not at hand."""


def only_answer(predictions: Sequence[Prediction]) -> str | None:
    """The one answer that all predictions are, None if there are several or fewer than `LEAST`."""
    answers = Counter(_units(p.value for p in predictions))
    return str(next(iter(answers))) if len(answers) == 1 and answers.total() >= LEAST else None


def collapsed(predictions: Sequence[Prediction], references: Sequence[Any]) -> str | None:
    """A warning if all answers are the same although the references differ, else None.

    Args:
        predictions: one per row.
        references: the right answers in the predictions' form (`task.references(table)`): labels, lists of labels, numbers, texts.
    """
    answers = Counter(_units(p.value for p in predictions))
    wanted = Counter(_units(references))
    if len(answers) != 1 or len(wanted) < 2:
        return None
    (answer,) = answers
    common, count = wanted.most_common(1)[0]
    return (
        f"all {answers.total()} predictions are {answer!r}, while the references have {len(wanted)} different values "
        f"({listing(map(repr, wanted), 6)}; the most frequent is {common!r} with {100 * count / wanted.total():.0f} %); "
        "the head has not learnt: raise its learning rate or train longer"
    )


def _units(values: Iterable[Any]) -> Iterable[Hashable]:
    """Single answers: every tag of a sentence; a set of labels as a whole; numbers up to six digits."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield float(f"{value:.6g}") if isinstance(value, float) else value
