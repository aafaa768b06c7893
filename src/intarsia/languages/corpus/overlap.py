"""Overlap of a corpus with the texts of a task: whole lines, and the task's sentences inside longer lines.

Both sides are normalised (`data.normal_form`: case, white space, punctuation and compatibility forms aside).  A sentence of fewer
than six words is looked for as a whole line only: short ones occur everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from intarsia.data.characters import word_spans
from intarsia.data.check import normal_form
from intarsia.languages.corpus.sources import Line

LEAST_WORDS = 6
ANCHOR = 24  # characters by which sentences are looked up


@dataclass(frozen=True, slots=True)
class Hit:
    """A sentence of the task in a line of the corpus.

    Attributes:
        line: of the corpus.
        sentence: of the task.
        where: place of the sentence in its file.
        whole: the line is the sentence.
    """

    line: Line
    sentence: str
    where: str
    whole: bool


def overlap(lines: Sequence[Line], sentences: Iterable[tuple[str, str]]) -> list[Hit]:
    """Where sentences of a task occur in a corpus, in the order of the corpus.

    Args:
        sentences: (place, text) pairs.
    """
    whole: dict[str, tuple[str, str]] = {}
    anchored: dict[str, list[tuple[str, str, str]]] = {}
    for where, text in sentences:
        form = normal_form(text)
        if not form:
            continue
        whole.setdefault(form, (where, text))
        if len(word_spans(text)) >= LEAST_WORDS and len(form) >= ANCHOR:
            anchored.setdefault(form[:ANCHOR], []).append((form, where, text))
    found = []
    for line in lines:
        form = normal_form(line.text)
        if form in whole:
            where, text = whole[form]
            found.append(Hit(line, text, where, True))
            continue
        hit = _inside(form, anchored)
        if hit is not None:
            found.append(Hit(line, hit[2], hit[1], False))
    return found


def _inside(form: str, anchored: dict[str, list[tuple[str, str, str]]]) -> tuple[str, str, str] | None:
    for start in range(len(form) - ANCHOR + 1):
        for candidate in anchored.get(form[start : start + ANCHOR], ()):
            if form.startswith(candidate[0], start):
                return candidate
    return None
