"""Columns of a table as tasks read them: text, label, tokens, number; and which column plays which role.

Every cell is brought to the task's Unicode form here, so texts, labels and references are always in the same one.  Works on
`intarsia.data.Table` and on anything with its rows (a list of dictionaries).  Nothing here knows a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intarsia.data import LabelMap, normalise
from intarsia.errors import DataError, listing, nearest
from intarsia.train.task import Rows

Where = Callable[[int], str]

#: role of a column -> names it often has, the first being ours
ROLES: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question", "question1", "tweet", "content", "document"),
    "pair": ("pair", "text2", "sentence2", "hypothesis", "question2", "answer"),
    "label": ("label", "labels", "category", "class", "intent", "sentiment", "topic", "gold_label"),
    "value": ("value", "score", "rating", "label", "similarity"),
    "tokens": ("tokens", "words", "form", "forms"),
    "heads": ("heads", "head"),
    "relations": ("relations", "deprel", "deprels"),
    "tags": ("tags", "ner_tags", "pos_tags", "ner", "pos", "upos", "labels"),
    "source": ("source", "src"),
    "target": ("target", "tgt", "reference"),
    "prompt": ("prompt", "instruction", "mr", "input"),
    "completion": ("completion", "output", "response", "ref"),
}


def names(table: Rows) -> tuple[str, ...]:
    """Column names of a table."""
    found = getattr(table, "names", None)
    return tuple(found) if found is not None else tuple(table[0]) if len(table) else ()


def where(table: Rows) -> Where:
    """Row -> its place, for messages."""
    found: Where | None = getattr(table, "where", None)
    return found or (lambda row: f"row {row + 1}")


def has(table: Rows, name: str) -> bool:
    """Whether a table has a column."""
    return name in names(table)


def cells(table: Rows, name: str, form: str = "NFC") -> tuple[Any, ...]:
    """A column, in a Unicode form: strings, or tuples of strings.

    Raises:
        DataError: no rows, no such column, or a cell that is neither.
    """
    if not len(table):
        raise DataError(f"{_source(table)} has no rows")
    if not has(table, name):
        raise DataError(
            f"{_source(table)} has no column {name!r}{nearest(name, names(table))} "
            f"its columns are: {listing(map(repr, names(table)))}"
        )
    place = where(table)
    return tuple(_normal(table[row][name], name, place, row, form) for row in range(len(table)))


def _normal(cell: Any, name: str, place: Where, row: int, form: str) -> str | tuple[str, ...]:
    if isinstance(cell, str):
        return normalise(cell, form)
    if isinstance(cell, (tuple, list)) and all(isinstance(token, str) for token in cell):
        return tuple(normalise(token, form) for token in cell)
    raise DataError(f"{place(row)}: column {name!r} holds {cell!r}; text or a list of words was expected")


def texts(table: Rows, name: str, form: str = "NFC") -> tuple[str, ...]:
    """A column of strings; raises DataError if a cell is a list."""
    column = cells(table, name, form)
    for row, cell in enumerate(column):
        if not isinstance(cell, str):
            raise DataError(f"{where(table)(row)}: column {name!r} holds a list of words; text was expected")
    return column


def tokens(table: Rows, name: str, form: str = "NFC") -> tuple[tuple[str, ...], ...]:
    """A column of word lists; raises DataError if a cell is plain text."""
    column = cells(table, name, form)
    for row, cell in enumerate(column):
        if isinstance(cell, str):
            raise DataError(
                f"{where(table)(row)}: column {name!r} holds plain text; a list of words was expected "
                "(read token files with --format conll, iob2 or conllu)"
            )
    return column


def numbers(table: Rows, name: str) -> tuple[float, ...]:
    """A column of finite numbers written as text.

    Raises:
        DataError: a cell is not a number; the message names its place.
    """
    found = []
    for row, cell in enumerate(texts(table, name)):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{where(table)(row)}: column {name!r} holds {cell!r}; a finite number such as 3.5 was expected"
            )
        found.append(value)
    return tuple(found)


def label_sets(table: Rows, name: str, separator: str, form: str = "NFC") -> tuple[tuple[str, ...], ...]:
    """A column of several labels per row: lists, or text cut at `separator`; an empty cell has none."""
    return tuple(
        cell if isinstance(cell, tuple) else tuple(part.strip() for part in cell.split(separator) if part.strip())
        for cell in cells(table, name, form)
    )


def inventory(table: Rows, column: Sequence[Any], name: str, least: int = 2) -> LabelMap:
    """The labels that occur in a column of `table`.

    Args:
        least: how many different labels there must be; with one only there is nothing to learn.

    Raises:
        DataError: an empty label, twins, or too few different labels.
    """
    for row, cell in enumerate(column):
        if cell == "" or (isinstance(cell, tuple) and "" in cell):
            raise DataError(f"{where(table)(row)}: column {name!r} has an empty label")
    found = {label for cell in column for label in ((cell,) if isinstance(cell, str) else cell)}
    if len(found) < least:
        raise DataError(
            f"column {name!r} of {_source(table)} has {len(found)} different label(s) ({listing(map(repr, sorted(found))) or 'none'}), "
            f"at least {least} were expected: there is nothing to learn; is this the right column?"
        )
    return LabelMap.of(column)


def infer_columns(table: Rows, roles: Sequence[str] = tuple(ROLES)) -> dict[str, str]:
    """Which column of a table plays which role, by its name.

    Args:
        roles: the roles to fill, in order; a column plays one of them only.

    Returns: role -> column name; roles without a column are left out.
    """
    free = list(names(table))
    found: dict[str, str] = {}
    for role in roles:
        hit = next((name for name in ROLES[role] if name in free), None)
        if hit is not None:
            found[role] = hit
            free.remove(hit)
    return found


def _source(table: Rows) -> str:
    return str(getattr(table, "source", "the table"))
