"""The pattern language against an independent reading of it, and the messages of a site map."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import SiteError, SpecError
from intarsia.sites import Selection, Site, SiteMap, View, layer_indices, matches
from intarsia.sites.address import expand_braces

WORD = st.sampled_from(["attn", "xattn", "q", "v", "0", "11", "encoder", "ffn", "norm", "weight"])
NAME = st.lists(WORD, min_size=1, max_size=5).map(".".join)
SEGMENT = WORD | st.sampled_from(["*", "**", "#"])
PLAIN = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)


def by_regex(pattern: str, name: str) -> bool:
    """A pattern without braces and commas as a regular expression over whole words."""
    words = {"*": r"[^.]+\.", "#": r"[0-9]+\.", "**": r"(?:[^.]+\.)*"}
    body = "".join(words.get(word) or re.escape(word) + r"\." for word in pattern.split("."))
    return re.fullmatch(r"(?:[^.]+\.)*" + body, name + ".") is not None


@given(PLAIN, NAME)
def test_patterns_are_regular_expressions_over_words(pattern: str, name: str) -> None:
    assert matches(pattern, name) == by_regex(pattern, name)


@given(NAME, st.integers(0, 4))
def test_a_name_is_covered_by_its_ends(name: str, start: int) -> None:
    words = name.split(".")
    tail = ".".join(words[min(start, len(words) - 1) :])
    assert matches(tail, name) and matches("**", name) and matches(f"**.{tail}", name)
    assert not matches("x" + tail, name)


@given(st.lists(PLAIN, min_size=1, max_size=3), NAME)
def test_commas_and_braces_are_alternatives(patterns: list[str], name: str) -> None:
    any_of = any(matches(pattern, name) for pattern in patterns)
    assert matches(",".join(patterns), name) == any_of
    assert matches("{" + ",".join(patterns) + "}", name) == any_of
    assert matches("encoder.{" + ",".join(patterns) + "}", name) == any(matches(f"encoder.{p}", name) for p in patterns)


def test_braces_multiply_and_nest() -> None:
    assert expand_braces("{a,b}.{c,d}") == ["a.c", "a.d", "b.c", "b.d"]
    assert set(expand_braces("{a,{b,c}}.d")) == {"a.d", "b.d", "c.d"}
    for broken in ("a{b", "a}b", "{a,{b}"):
        with pytest.raises(SpecError, match="unbalanced brace"):
            expand_braces(broken)


def test_words_are_whole() -> None:
    assert matches("attn.q", "encoder.3.attn.q") and not matches("attn.q", "3.xattn.q")
    assert not matches("attn", "3.attn.q") and matches("norm.weight", "0.attn.q.norm.weight")


@given(st.integers(1, 30), st.data())
def test_layers_are_read_as_python_reads_slices(count: int, data: st.DataObject) -> None:
    low, high = (data.draw(st.none() | st.integers(-40, 40)) for _ in range(2))
    text = f"{'' if low is None else low}:{'' if high is None else high}"
    assert layer_indices(text, count) == set(range(count)[low:high])
    index = data.draw(st.integers(-count, count - 1))
    assert layer_indices(str(index), count) == {range(count)[index]}
    assert layer_indices(f"{index},{text}", count) == {range(count)[index], *range(count)[low:high]}


def test_layers_that_do_not_exist() -> None:
    assert layer_indices(None, 3) is None and layer_indices("", 3) is None
    with pytest.raises(SiteError, match="layer 7 does not exist: the stack has 3 layers"):
        layer_indices("7", 3)
    for text in ("a", "1-2", "1:2:3", "1,,2"):
        with pytest.raises(SpecError, match="not a list of numbers and ranges"):
            layer_indices(text, 3)


@pytest.fixture
def sites() -> SiteMap:
    found = [Site(f"{layer}.{role}", f"m.{layer}.{role}", features=4, layer=layer) for layer in range(3) for role in ("attn.q", "ffn")]
    found += [Site("0.attn.q.weight", "m", "weight", layer=0, param="weight"), Site("embed", "e", features=4)]
    found += [Site("0.attn.k.weight", "m", "weight", layer=0, param="weight", view=View(1, 0, 2))]
    return SiteMap(found, model="Tiny", layers={"": 3}, missing={"attn.mem": "its attention is closed", "pooler": "it has none"})


def test_selecting(sites: SiteMap) -> None:
    assert [s.name for s in sites.select("attn.q", layers="-2:")] == ["1.attn.q", "2.attn.q"]
    assert [s.name for s in sites.select("**", port="weight")] == ["0.attn.q.weight", "0.attn.k.weight"]
    assert len(sites.select("**", layers="0")) == 4, "sites outside blocks are left out"
    assert [s.name for s in sites.parameters()] == ["0.attn.q.weight"]
    chosen = sites.select("ffn")
    assert chosen.expect(3) is chosen and chosen[1:].expect(2)[0].name == "1.ffn" and "3 sites: 0.ffn, 1.ffn" in repr(chosen)
    with pytest.raises(SiteError, match="expected to select 5 sites of Tiny, it selects 3"):
        chosen.expect(5)
    assert isinstance(chosen[:1], Selection)


def test_selecting_nothing_says_why(sites: SiteMap) -> None:
    with pytest.raises(SiteError, match=r"Tiny has no 'attn.mem' sites: its attention is closed"):
        sites.select("attn.mem")
    with pytest.raises(SiteError, match="its attention is closed"):
        sites.select("{attn,xattn}.mem", port="mem")
    with pytest.raises(SiteError, match=r"did you mean 'attn\.q'.*intarsia inspect"):
        sites.select("attn.w")
    with pytest.raises(SiteError, match="selects none of the 2 weight sites"):
        sites.select("ffn", port="weight")
    with pytest.raises(SiteError, match=r"with layers='5:' selects none"):
        sites.select("ffn", layers="5:")


def test_an_unknown_name(sites: SiteMap) -> None:
    with pytest.raises(SiteError, match=r"Tiny has no site '0\.attn\.qq'; did you mean '0\.attn\.q'"):
        sites["0.attn.qq"]
    assert "0.attn.qq" not in sites and sites.get("0.attn.qq") is None and sites.get("embed") is sites["embed"]


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 5))
def test_features_of_a_view(groups: int, start: int, width: int) -> None:
    assert View(groups, start, width).features == groups * width
