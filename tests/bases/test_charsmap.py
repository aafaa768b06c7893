"""The normaliser built from a table of characters: laws on random tables, and the real table in `test_real.py`."""

from __future__ import annotations

import random
import struct
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from intarsia.bases.charsmap import precompile, with_compositions

chars = st.characters(exclude_categories=("Cs", "Mn", "Mc", "Me"), exclude_characters="\0\r\n")
tables = st.dictionaries(chars, st.text(chars, max_size=4), min_size=1, max_size=40)


def units(data: bytes) -> int:
    return struct.unpack_from("<I", data)[0] // 4


@given(tables, st.text(chars, max_size=20))
def test_every_character_goes_to_its_entry(table: dict[str, str], text: str) -> None:
    made = normalizers.Precompiled(precompile(table))
    for char in {*table, *text}:
        assert made.normalize_str(char) == table.get(char, char)


def test_keys_do_not_disturb_one_another() -> None:
    # many keys under one first byte, so that the nodes of the trie lie closely packed
    rng = random.Random(0)
    keys = rng.sample([chr(c) for c in range(0x3400, 0x9FFF)], 3000)
    table = {key: f"<{i}>" for i, key in enumerate(keys)}
    data = precompile(table)
    made = normalizers.Precompiled(data)
    for char in map(chr, range(0x3400, 0x9FFF)):
        assert made.normalize_str(char) == table.get(char, char)
    assert units(data) < 12_000


def test_a_table_of_nothing_changes_nothing() -> None:
    assert normalizers.Precompiled(precompile({"x": "x"})).normalize_str("a é \u0301 日") == "a é \u0301 日"


@pytest.mark.parametrize("table", [{"": "a"}, {"a": "\0"}, {"a\0": "b"}])
def test_what_the_format_cannot_hold_is_refused(table: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no empty key and no NUL"):
        precompile(table)


def test_compositions_are_canonical_composition() -> None:
    table = with_compositions({"ａ": "a"})
    made = normalizers.Precompiled(precompile(table))
    for base in "aeiouyAEIOUYcnsz":
        for mark in "\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u030c":
            assert made.normalize_str(base + mark) == unicodedata.normalize("NFC", base + mark)
    assert table["ａ\u0301"] == "á"  # a variant the table knows; it is met as `ａ` first, which the next line shows
    assert made.normalize_str("ａ\u0301") == "a"
    assert "Ａ\u0301" not in table  # a variant the table does not know
    assert all(len(key) == 1 or len(key.encode()) < 6 for key in table)


def test_compositions_that_follow_from_shorter_ones_are_left_out() -> None:
    table = with_compositions({"ａ": "a", "ǆ": "dž"})
    assert "dz\u030c" not in table
    assert table["z\u030c"] == "ž"
