"""The demo's bundled data: what is promised is there, whole and under its licence."""

from __future__ import annotations

import pytest

from intarsia.demo.files import data_path
from intarsia.errors import DataError
from tests.shared import shared

SIZES = {
    "eng_Latn/train.tsv": 701,
    "eng_Latn/dev.tsv": 99,
    **{f"{language}/test.tsv": 204 for language in ("eng_Latn", "deu_Latn", "swh_Latn", "amh_Ethi", "kab_Latn", "quy_Latn")},
}
LABELS = {"science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"}


def rows(name: str) -> list[list[str]]:
    header, *lines = data_path(name).read_text("utf-8").rstrip("\n").split("\n")
    assert header == "index_id\tcategory\ttext"
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize("name", SIZES)
def test_every_part_is_whole(name: str) -> None:
    found = rows(name)
    assert len(found) == SIZES[name]
    assert all(len(row) == 3 and row[1] in LABELS and row[2].strip() for row in found)


def test_the_test_parts_are_parallel_and_apart_from_training() -> None:
    english = {row[0]: row[1] for row in rows("eng_Latn/test.tsv")}
    for name in SIZES:
        if name.endswith("test.tsv"):
            assert {row[0]: row[1] for row in rows(name)} == english
    seen = {row[0] for part in ("train", "dev") for row in rows(f"eng_Latn/{part}.tsv")}
    assert not seen & english.keys()


def test_nothing_else_and_less_than_a_megabyte() -> None:
    files = [path for path in data_path().rglob("*") if path.is_file()]
    assert {path.relative_to(data_path()).as_posix() for path in files} == {*SIZES, "LICENSE-DATA.md"}
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_unchanged_from_the_source() -> None:
    for name in SIZES:
        assert data_path(name).read_bytes() == shared(f"data/sib200/{name}").read_bytes()


def test_the_licence_names_source_and_terms() -> None:
    text = data_path("LICENSE-DATA.md").read_text("utf-8")
    for needed in ("593cea88519930f776c1a4a1980b6a35b39dca57", "Apache License 2.0", "Attribution-ShareAlike 4.0", "2309.07445"):
        assert needed in text


@pytest.mark.parametrize("name", ["eng_Latn/tset.tsv", "../files.py", "/etc/passwd"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="the demo has no data"):
        data_path(name)
