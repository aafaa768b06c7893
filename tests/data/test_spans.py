"""Tag schemes: conversions are inverse, checks find what was broken."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import Span, detect_scheme, irregularities, spans, tags_of, to_iob2
from intarsia.errors import DataError

KINDS = st.sampled_from(["PER", "LOC", "a-b", "_"])


@st.composite
def entities(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Disjoint entities, some touching, and the length of their sentence."""
    found, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        start = at + draw(st.integers(0, 2))
        at = start + draw(st.integers(1, 3))
        found.append(Span(draw(KINDS), start, at))
    return found, at + draw(st.integers(0, 2))


def bioes(found: list[Span], length: int) -> tuple[str, ...]:
    tags = ["O"] * length
    for kind, start, end in found:
        tail = "" if kind == "_" else f"-{kind}"
        tags[start:end] = [f"S{tail}"] if end == start + 1 else [f"B{tail}", *[f"I{tail}"] * (end - start - 2), f"E{tail}"]
    return tuple(tags)


def iob1(found: list[Span], length: int) -> tuple[str, ...]:
    tags = [tag.replace("B", "I", 1) if tag[0] == "B" else tag for tag in tags_of(found, length)]
    for before, this in pairwise(found):
        if before.end == this.start and before.kind == this.kind:
            tags[this.start] = "B" + tags[this.start][1:]
    return tuple(tags)


@given(entities())
def test_every_scheme_gives_its_entities_back(drawn: tuple[list[Span], int]) -> None:
    found, length = drawn
    tags = tags_of(found, length)
    assert spans(tags, "iob2") == spans(tags, "lenient") == found
    for other, name in ((bioes(found, length), "bioes"), (iob1(found, length), "iob1")):
        assert spans(other) == found and to_iob2(other) == tags
        assert irregularities([other], name) == []
    assert detect_scheme([tags]) == ("iob2" if found else None)


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "I-Y", "B-Y", "E-X", "S-Y", "B", "I"]), max_size=8))
def test_conversion_makes_any_tags_regular(tags: list[str]) -> None:
    regular = to_iob2(tags)
    assert len(regular) == len(tags) and irregularities([regular]) == [] and to_iob2(regular) == regular
    assert all(a < b <= c for (_, a, b), (_, c, _) in pairwise(spans(tags))), "disjoint and in order"


def test_irregularities_are_named() -> None:
    column = [["O", "I-PER"], ["B-PER", "I-LOC", "I-LOC"], ["B-X", "O"]]
    assert [(odd.row, odd.token, odd.tag) for odd in irregularities(column)] == [(0, 1, "I-PER"), (1, 1, "I-LOC")]
    assert [(odd.row, odd.token) for odd in irregularities([["B-X", "O"], ["B-X"]], "bioes")] == [(0, 1), (1, 0)]
    assert detect_scheme(column) == "mixed"
    assert detect_scheme([["I-X", "B-X"]]) == "iob1"
    assert detect_scheme([["S-X", "O"]]) == "bioes"
    assert detect_scheme([["NOUN", "VERB"]]) is None and detect_scheme([["O", "O"]]) is None


def test_what_is_no_tag_is_refused() -> None:
    for tags in (["NOUN"], [""], ["X-PER"], ["b-per"]):
        with pytest.raises(DataError, match="not a tag of a span scheme"):
            spans(tags)
    with pytest.raises(DataError, match="not an IOB2 tag"):
        spans(["S-X"], "iob2")
    for broken in ([Span("X", 0, 2), Span("Y", 1, 3)], [Span("X", 2, 5)], [Span("X", 1, 1)]):
        with pytest.raises(DataError, match="overlaps another or lies outside"):
            tags_of(broken, 3)
