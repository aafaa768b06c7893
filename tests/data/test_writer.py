"""Write, then read: the same table, or a refusal; never another table."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.data import Table, json_line, read, write, write_jsonl
from intarsia.errors import DataError, StoreError, UsageError

HOSTILE = st.sampled_from(['"', '""', ",", "\t", "\n", "\r", "\r\n", " ", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ufeff", "\u200b",
                           "nan", "NA", "no", "007", "1e5", "TRUE", "#", "-DOCSTART-", "e\u0301", "\u037e", "\uff0c", "\\", "\\n", "{", "😀",
                           "\u0000"])  # fmt: skip
TEXT = st.lists(st.one_of(HOSTILE, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=6).map("".join)
TOKEN = st.one_of(HOSTILE, st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5)
SENTENCES = st.lists(st.lists(st.tuples(TOKEN, TOKEN), min_size=1, max_size=4), min_size=1, max_size=4)


def again(table: Table, folder: Path, kind: str, **options: object) -> Table | None:
    """The table after writing and reading, or None if the format refuses it."""
    path = folder / f"again.{kind}"
    try:
        write(table, path, format=kind)
    except DataError:
        return None
    return read(path, format=kind, normalise="none", **options)  # type: ignore[arg-type]


def same(one: Table | None, other: Table) -> bool:
    return one is not None and one.names == other.names and one.columns == other.columns and one.digest == other.digest


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_string_tables_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.getbasetemp()
    table = Table(("text", "la,b\"el"), tuple(zip(*rows)), ("<memory>",) * len(rows), (0,) * len(rows))
    content = "".join(text for row in rows for text in row)
    for kind in ("csv", "jsonl"):
        assert same(again(table, folder, kind), table) == ("\0" not in content), "csv and jsonl hold everything but NUL"
    plain = not any(sign in content for sign in "\t\n\r\0")
    assert same(again(table, folder, "tsv"), table) == plain
    texts = table.only("text")
    holds = not any(sign in text for text, _ in rows for sign in "\n\r\0") and not rows[0][0].startswith("\ufeff")
    assert same(again(texts, folder, "text"), texts) == holds
    for kind in ("csv", "tsv"):
        one = again(texts, folder, kind)
        assert one is None or same(one, texts), "also with one column, where a blank line is an empty cell"


@settings(max_examples=60, deadline=None)
@given(sentences=SENTENCES)
def test_token_tables_come_back(tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, str]]]) -> None:
    folder = tmp_path_factory.getbasetemp()
    columns = {"tokens": [[a for a, _ in s] for s in sentences], "tags": [[b for _, b in s] for s in sentences]}
    table = Table.of(columns)
    content = [text for s in sentences for pair in s for text in pair]
    assert same(again(table, folder, "jsonl"), table) == ("\0" not in "".join(content))
    holds = not any(sign in text for text in content for sign in "\t\n\r\0") and all(text.strip(" ") for text in content)
    holds &= all(token != "-DOCSTART-" for s in sentences for token, _ in s) and not content[0].startswith("\ufeff")
    assert same(again(table, folder, "conll", delimiter="\t"), table) == holds
    for kind in ("csv", "tsv", "text"):
        with pytest.raises(DataError, match=r"lists of tokens|one column"):
            write(table, folder / f"x.{kind}", format=kind)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_reading_normalises_every_cell(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "n.csv"
    table = Table(("a", "b"), tuple(zip(*rows)), ("<memory>",) * len(rows), (0,) * len(rows))
    try:
        write(table, path)
    except DataError:
        return
    found = read(path)
    assert [tuple(row.values()) for row in found] == [tuple(unicodedata.normalize("NFC", text) for text in row) for row in rows]
    assert found.renormalised == sum(any(unicodedata.normalize("NFC", text) != text for text in row) for row in rows)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, style=st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)]))
def test_csv_agrees_with_the_standard_library(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], style: tuple[str, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "std.csv"
    rows = [(a.replace("\0", ""), b.replace("\0", "")) for a, b in rows]
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator=style[0], quoting=style[1]).writerows([("a", "b"), *rows])  # type: ignore[arg-type]
    assert [tuple(row.values()) for row in read(path, normalise="none")] == rows


def test_json_lines_do_not_split_anywhere() -> None:
    row = {"text": "a\u2028b\u2029c\x85d\ne", "p": [0.25, 1], "n": None}
    line = json_line(row)
    assert len(line.splitlines()) == 1 and json.loads(line) == row
    for value in (float("nan"), float("inf"), object(), {1, 2}):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            json_line({"x": value})


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_jsonl([{"a": 1}], path)
    before = path.read_bytes()
    with pytest.raises(DataError):
        write_jsonl([{"a": 2}, {"a": float("nan")}], path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.jsonl"], "the old file stays, no rest is left"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(StoreError, match="cannot be written"):
        write_jsonl([], tmp_path / "no" / "folder.jsonl")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        write(Table.of({"text": ["\ud800"]}), tmp_path / "s.txt")
    with pytest.raises(UsageError, match="cannot write the format"):
        write(Table.of({"text": ["a"]}), tmp_path / "x.parquet")
    assert os.listdir(tmp_path) == ["out.jsonl"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
