"""Tag schemes of token data: IOB2, IOB1, BIOES; checking them and converting between tags and spans.

`lenient` reads any mixture of them the way `conlleval` and seqeval's default do: a span starts wherever one could start.
`iob2` is seqeval's strict mode for that scheme: a span is a `B-` and the `I-` of the same type right after it, a stray `I-`
is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from intarsia.errors import DataError

Scheme = Literal["iob2", "lenient"]
PREFIXES = ("B", "I", "E", "S")


class Span(NamedTuple):
    """Tokens `start ... end - 1` are an entity of type `kind` (`"_"` if the tags name none)."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Irregular:
    """A tag that the scheme does not allow where it stands."""

    row: int
    token: int
    tag: str
    why: str


def split_tag(tag: str) -> tuple[str, str]:
    """`"B-PER"` -> `("B", "PER")`; the outside tag is `("O", "")`, a bare `"B"` has type `"_"`.

    Raises:
        DataError: not a tag of any of these schemes.
    """
    if tag == "O":
        return "O", ""
    prefix, _, kind = tag.partition("-")
    if prefix not in PREFIXES:
        raise DataError(f"{tag!r} is not a tag of a span scheme: 'O', or B-, I-, E- or S- and a type, was expected")
    return prefix, kind or "_"


def spans(tags: Sequence[str], scheme: Scheme = "lenient") -> list[Span]:
    """Entities of one sentence, in order.

    Raises:
        DataError: a tag is of no scheme, or (`iob2`) not of this one.
    """
    found: list[Span] = []
    start, last, last_kind = -1, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        if scheme == "iob2" and prefix in ("E", "S"):
            raise DataError(f"{tag!r} is not an IOB2 tag; score with the lenient scheme or convert the tags")
        inside = start >= 0
        if inside and (prefix in ("B", "S", "O") or last in ("E", "S") or kind != last_kind):
            found.append(Span(last_kind, start, i))
            inside, start = False, -1
        if prefix in ("B", "S") or (not inside and prefix != "O" and scheme == "lenient"):
            start = i
        last, last_kind = prefix, kind
    return found


def to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags of any scheme as IOB2 (read leniently)."""
    return tags_of(spans(tags), len(tags))


def tags_of(entities: Iterable[Span], length: int) -> tuple[str, ...]:
    """IOB2 tags of a sentence of `length` tokens with these entities.

    Raises:
        DataError: entities overlap or lie outside the sentence.
    """
    tags = ["O"] * length
    for span in entities:
        if not 0 <= span.start < span.end <= length or any(tag != "O" for tag in tags[span.start : span.end]):
            raise DataError(f"{span} overlaps another or lies outside a sentence of {length} tokens")
        tail = "" if span.kind == "_" else f"-{span.kind}"
        tags[span.start : span.end] = [f"B{tail}"] + [f"I{tail}"] * (span.end - span.start - 1)
    return tuple(tags)


def detect_scheme(column: Sequence[Sequence[str]]) -> str | None:
    """`iob2`, `iob1` or `bioes`: the first that all tags obey; `mixed` if none does; None if these are not span tags."""
    try:
        prefixes = {split_tag(tag)[0] for tags in column for tag in tags}
    except DataError:
        return None
    if not prefixes - {"O"}:
        return None
    for scheme in ("iob2", "iob1", "bioes"):
        if not irregularities(column, scheme):
            return scheme
    return "mixed"


def irregularities(column: Sequence[Sequence[str]], scheme: str = "iob2") -> list[Irregular]:
    """Every tag that `iob2`, `iob1` or `bioes` does not allow where it stands."""
    rule = {"iob2": _iob2, "iob1": _iob1, "bioes": _bioes}[scheme]
    found: list[Irregular] = []
    for row, tags in enumerate(column):
        parts = [("O", ""), *map(split_tag, tags), ("O", "")]
        for token in range(1, len(parts)):
            if why := rule(parts[token - 1], parts[token]):
                at = min(token, len(tags)) - 1
                found.append(Irregular(row, at, tags[at], why))
    return found


def _iob2(last: tuple[str, str], this: tuple[str, str]) -> str:
    if this[0] in ("E", "S"):
        return f"{this[0]}- is not an IOB2 prefix"
    if this[0] == "I" and last[1] != this[1]:
        return f"I-{this[1]} does not continue an entity of its type"
    return ""


def _iob1(last: tuple[str, str], this: tuple[str, str]) -> str:
    if this[0] in ("E", "S"):
        return f"{this[0]}- is not an IOB1 prefix"
    if this[0] == "B" and last[1] != this[1]:
        return f"B-{this[1]} does not follow an entity of its type"
    return ""


def _bioes(last: tuple[str, str], this: tuple[str, str]) -> str:
    is_open, continues = last[0] in ("B", "I"), this[0] in ("I", "E")
    if continues and not (is_open and last[1] == this[1]):
        return f"{this[0]}-{this[1]} does not continue an entity of its type"
    if is_open and not continues:
        return f"the entity of type {last[1]} before it is not closed by E-"
    return ""
