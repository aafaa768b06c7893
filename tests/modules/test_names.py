"""Names: what is refused, what must be quoted."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import SpecError
from intarsia.modules import check_name, quoted

GOOD = ["swh", "swh+ner", "lang/swh", "a.b-c@3f2a:x", "Kiswahili cha Kenya", "ŋ'ombe", "ትግርኛ", "CON", "nan", "no", "a" * 200, "..a", "x|y", "a >> b"]
BAD = {
    "": "empty",
    "a" * 201: "201 characters",
    "a\0b": "U\\+0000 at position 1",
    "a\nb": "U\\+000A",
    "\x1b[31m": "U\\+001B",
    "a\u202eb": "U\\+202E",
    "a\u200bb": "U\\+200B",
    "\ud800": "U\\+D800",
    "\U0010ffff": "U\\+10FFFF",
    "a\u2028b": "U\\+2028",
    'a"b': "U\\+0022",
    "a\\b": "U\\+005C",
    " a": "white space",
    "a\u00a0": "white space",
    "/etc/passwd": "slash",
    "a/": "slash",
    ".": "path",
    "..": "path",
    "../x": "path",
    "a/../b": "path",
    "a//b": "path",
    "a/./b": "path",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(("name", "why"), BAD.items(), ids=[ascii(n)[:20] for n in BAD])
def test_bad_names_are_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(SpecError, match=why) as caught:
        check_name(name)
    assert str(caught.value).isascii() and str(caught.value).isprintable()


def test_twins_of_other_normal_forms_are_one_name() -> None:
    assert check_name(unicodedata.normalize("NFD", "Yorùbá")) == check_name("Yorùbá") == "Yorùbá"


@given(st.text(max_size=30))
def test_accepted_names_are_stable_and_can_be_quoted(name: str) -> None:
    try:
        good = check_name(name)
    except SpecError:
        return
    assert check_name(good) == good and len(good) <= 3 * 30
    text = quoted(good)
    assert text == good or (text[0] == text[-1] == '"' and text[1:-1] == good and '"' not in good and "\\" not in good)


def test_only_plain_names_go_without_quotes() -> None:
    assert [quoted(n) for n in ("swh", "a.b-c@3:x/y", "a b", "a+b", "-a", "ŋ")] == ["swh", "a.b-c@3:x/y", '"a b"', '"a+b"', '"-a"', '"ŋ"']
