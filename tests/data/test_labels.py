"""`LabelMap`: by name, refusing what it does not know."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import LabelMap, Table, twins
from intarsia.errors import DataError

NAMES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


@given(NAMES, st.randoms())
def test_order_of_rows_does_not_matter(names: list[str], random: object) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    labels = LabelMap.of(names, allow_twins=True)
    assert labels == LabelMap.of(shuffled + shuffled, allow_twins=True)
    assert [labels.names[i] for i in labels.encode(shuffled)] == shuffled
    assert [labels.id(name) for name in labels] == list(range(len(labels)))
    for again in (pickle.loads(pickle.dumps(labels)), copy.deepcopy(labels), LabelMap(labels.names)):
        assert again == labels and hash(again) == hash(labels) and again.id(names[0]) == labels.id(names[0])


def test_numbers_are_sorted_as_numbers() -> None:
    assert LabelMap.of(["10", "2", "-1", "b", "a"]).names == ("-1", "2", "10", "a", "b")


def test_tags() -> None:
    labels = LabelMap.of((("O", "B-PER"), ()), (("I-PER",),))
    assert labels.names == ("B-PER", "I-PER", "O")
    assert labels.encode_tags([["O", "I-PER"], []]) == ((2, 1), ())
    with pytest.raises(DataError, match=r"row 2: .*'B-LOC' \(1x\)"):
        labels.encode_tags([["O"], ["O", "B-LOC"]])


def test_unknown_labels_give_the_set_difference() -> None:
    train = LabelMap.of(["sports", "travel", "health"])
    dev = Table(("label",), (("sports", "sport", "sport", "polit"),), ("dev.tsv",) * 4, (2, 3, 4, 5))
    with pytest.raises(DataError) as caught:
        train.encode(dev.texts("label"), dev.where)
    message = str(caught.value)
    assert message.startswith("dev.tsv:3: ") and "'sport' (2x); did you mean 'sports'?" in message and "'polit' (1x)" in message
    assert "not here: 'health', 'travel'" in message
    with pytest.raises(DataError, match="unknown label 'sprots'; did you mean 'sports'"):
        train.id("sprots")
    assert "sports" in train and "sprots" not in train and 3 not in train


@pytest.mark.parametrize("pair", [("Sports", "sports "), ("very  bad", "very_bad"), ("é", "e\u0301"), ("ﬁ", "fi"), ("STRASSE", "straße")])
def test_twins_are_found_and_refused(pair: tuple[str, str]) -> None:
    assert [set(group) for group in twins([*pair, "other"])] == [set(pair)]
    with pytest.raises(DataError, match="differ only in case, space or Unicode form"):
        LabelMap.of([*pair, "other"])
    assert len(LabelMap.of(pair, allow_twins=True)) == 2
    assert twins(["science/technology", "science", "technology"]) == []


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", "")])
def test_malformed_inventories_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="distinct, non-empty"):
        LabelMap(names)
