"""`Table`: a value with provenance, whose digest is its content."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import Table, concat
from intarsia.errors import DataError

TRAPS = ["nan", "NA", "None", "no", "on", "007", "1e5", "TRUE", "12:30", "", " ", "-0", "inf"]
cells = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=6)
tables = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries({"a": st.lists(cells, min_size=n, max_size=n), "b": st.lists(st.lists(cells, max_size=3), min_size=n, max_size=n)})
)


def test_strings_stay_strings() -> None:
    table = Table.of({"text": TRAPS})
    assert table["text"] == tuple(TRAPS)
    assert [row["text"] for row in table] == TRAPS


@given(tables)
def test_equal_content_equal_digest(columns: dict[str, list]) -> None:
    table = Table.of(columns)
    again = Table.of(dict(reversed(columns.items())), source="another.tsv")
    assert table.digest == again.digest, "neither column order nor the file enters"
    assert pickle.loads(pickle.dumps(table)) == table == copy.deepcopy(table)


@given(tables, tables)
def test_different_content_different_digest(one: dict[str, list], other: dict[str, list]) -> None:
    assert (Table.of(one).digest == Table.of(other).digest) == (one == other)


@pytest.mark.parametrize(
    "one, other",
    [
        ({"a": ["x", "y"]}, {"a": ["xy", ""]}),
        ({"a": ["xy"]}, {"a": [["x", "y"]]}),
        ({"a": [["x", "y"]]}, {"a": [["xy"]]}),
        ({"a": [["x"], ["y"]]}, {"a": [["x", "y"], []]}),
        ({"a": ["x"], "b": ["y"]}, {"a": ["y"], "b": ["x"]}),
        ({"a": ["x"]}, {"b": ["x"]}),
        ({"a": ["é"]}, {"a": ["e\u0301"]}),
    ],
)
def test_digest_sees_boundaries_names_and_forms(one: dict, other: dict) -> None:
    assert Table.of(one).digest != Table.of(other).digest


def test_select_only_rename_concat_keep_provenance() -> None:
    table = Table(("text", "label"), (("a", "b", "c"), ("x", "y", "z")), ("f.tsv",) * 3, (2, 3, 5), ("f.tsv:4: bad",), 1)
    picked = table.select([2, 0, 2])
    assert picked["text"] == ("c", "a", "c") and picked.lines == (5, 2, 5) and picked.where(0) == "f.tsv:5"
    assert table[1] == {"text": "b", "label": "y"} and table[1:]["label"] == ("y", "z") and table[-1]["text"] == "c"
    assert table.only("label").names == ("label",) and table.only("label").skipped == 1
    renamed = table.rename({"text": "sentence"})
    assert renamed.names == ("sentence", "label") and renamed["sentence"] == table["text"]
    joined = concat([table, Table.of({"label": ["q"], "text": ["d"]})])
    assert joined["text"] == ("a", "b", "c", "d") and joined["label"] == ("x", "y", "z", "q")
    assert joined.source == "f.tsv+<memory>" and joined.where(3) == "<memory> row 4" and joined.skipped == joined.renormalised == 1


def test_a_table_cannot_be_changed() -> None:
    table = Table.of({"text": [["a", "b"]]})
    with pytest.raises(AttributeError):
        table.names = ()  # type: ignore[misc]
    assert isinstance(table["text"][0], tuple)


def test_unknown_column_suggests() -> None:
    table = Table.of({"sentence": ["a"], "label": ["b"]}, source="x.tsv")
    with pytest.raises(DataError, match=r"x\.tsv has no column 'sentense'; did you mean 'sentence'\?"):
        table["sentense"]
    with pytest.raises(DataError, match="no column"):
        table.rename({"txt": "text"})
    with pytest.raises(DataError, match="lists of tokens were expected"):
        table.tokens("sentence")
    with pytest.raises(DataError, match="column of text was expected"):
        Table.of({"tokens": [["a"]]}).texts("tokens")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"a": [1]}, "not a string"),
        ({"a": [None]}, "not a string"),
        ({"a": [["x", 2]]}, "not a string"),
        ({"a": ["x", ["y"]]}, "mixes str, tuple"),
        ({"a": ["x"], "b": ["y", "z"]}, "2 cells, the table has 1 rows"),
        ({}, "needs distinct column names"),
    ],
)
def test_malformed_tables_are_refused(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Table.of(columns)


def test_concat_refuses_other_columns() -> None:
    with pytest.raises(DataError, match="the columns differ"):
        concat([Table.of({"a": ["x"]}), Table.of({"b": ["x"]})])
    with pytest.raises(DataError, match="at least one"):
        concat([])
