"""The readers on the real files they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.data import LabelMap, check, detect_scheme, read, spans
from intarsia.errors import DataError
from tests.shared import shared


def files(folder: str, pattern: str) -> list[Path]:
    found = sorted(shared(folder).glob(pattern))
    assert found
    return found


def test_sib200() -> None:
    labels = None
    for language in ("eng_Latn", "kab_Latn", "quy_Latn", "amh_Ethi", "zho_Hans", "arb_Arab", "nqo_Nkoo"):
        train, dev, test = (read(shared(f"data/sib200/{language}/{name}.tsv")) for name in ("train", "dev", "test"))
        assert (len(train), len(dev), len(test)) == (701, 99, 204) and train.names == ("index_id", "category", "text")
        assert train.skipped == 0 and train.where(0).endswith("train.tsv:2")
        labels = labels or LabelMap.of(train["category"])
        assert LabelMap.of(test["category"]) == labels and len(labels) == 7
    assert sorted(labels or ()) == sorted(read(shared("data/sib200/eng_Latn/labels.txt"))["text"])


def test_csv_with_quotes() -> None:
    train = read(shared("data/nusax/datasets/sentiment/acehnese/train.csv"))
    assert len(train) == 500 and set(train["label"]) == {"negative", "neutral", "positive"}
    banking = read(shared("data/banking77/banking_data/train.csv"))
    assert len(banking) == 10003 and len(LabelMap.of(banking["category"])) == 77
    assert any("\n" in text for text in banking.texts("text")), "records that span lines"
    references = read(shared("data/e2e/testset_w_refs.csv"))
    assert len(references) == 4693 and references.names == ("mr", "ref")
    with pytest.raises(DataError, match="has no name in the header"):
        read(shared("data/nusax/datasets/mt/train.csv"))
    assert len(read(shared("data/nusax/datasets/mt/train.csv"), columns="indonesian,acehnese")) == 500


def test_tsv_without_quoting() -> None:
    sst2 = read(shared("data/sst2/data/SST-2/train.tsv"))
    assert len(sst2) == 60614 and set(sst2["label"]) == {"0", "1"}
    assert all(text.endswith(" ") for text in sst2.texts("sentence")[:5]), "white space stays"
    quoted = [text for name in ("train", "dev", "test") for text in read(shared(f"data/sib200/eng_Latn/{name}.tsv")).texts("text") if '"' in text]
    assert len(quoted) == 53, "quotes are text"
    cola = read(shared("data/cola/acceptability_corpus/raw/in_domain_train.tsv"), header=False, columns="text=3,label=1")
    assert len(cola) == 8551 and set(cola["label"]) == {"0", "1"}
    news = read(shared("data/agnews_part/data/agnews/test.tsv"), header=False, columns="text,label")
    assert len(LabelMap.of(news["label"])) == 4
    verses = read(shared("data/bible/tsv/ewe-Ewe-NT.tsv"), header=False, columns="verse,text")
    assert verses["verse"][0] == "b.MAT.1.1" and len(verses) > 7000


def test_conll_files() -> None:
    for path in files("data/masakhaner1", "data/*/dev.txt"):
        table = read(path, format="conll")
        tags = table.tokens("tags")
        assert detect_scheme(tags) in ("iob2", "mixed") and {kind for row in tags for kind, _, _ in spans(row)} <= {"PER", "LOC", "ORG", "DATE"}
    for path in files("data/masakhapos", "data/*/dev.txt"):
        assert set(LabelMap.of(read(path, format="conll")["tags"])) >= {"NOUN", "VERB", "PUNCT"}


def test_conllu_and_iob2_files_agree_with_their_text() -> None:
    for path in [*files("data/ud", "*PUD/*.conllu"), *files("data/ud", "*Manx*/*.conllu"), *files("data/uner", "*/*-test.iob2")]:
        columns = "tokens=form,tags=upos,text" if path.suffix == ".conllu" else "tokens=1,tags=2,text"
        table = read(path, columns=columns)
        assert len(table) == path.read_text("utf-8").replace("\r", "").strip().count("\n\n") + 1
        if path.suffix == ".iob2":
            for row in table:
                assert "".join(row["tokens"]).replace(" ", "")[:1] == str(row["text"]).replace(" ", "")[:1]


def test_parallel_files() -> None:
    for path in files("data/americasnlp21/data", "*/train.es"):
        other = next(one for one in path.parent.glob("train.*") if one.suffix != ".es")
        table = read([other, path], columns=f"{other.suffix[1:]},es")
        assert len(table) == len(table["es"]) > 1000
    folder = shared("data/americasnlp21/data/aymara-spanish")
    with pytest.raises(DataError, match=r"dev\.aym has 996, .*train\.es has 6531"):
        read([folder / "dev.aym", folder / "train.es"])


def test_jsonl_with_numbers() -> None:
    path = shared("data/xcopa/data/qu/test.qu.jsonl")
    with pytest.raises(DataError, match=r"qu\.jsonl:1:\d+: 'label' is a number"):
        read(path)
    table = read(path, columns="premise,choice1,choice2,label", numeric=["label"])
    assert len(table) == 500 and set(table["label"]) == {"0", "1"}


def test_check_finds_the_known_overlap() -> None:
    """Manx Bible and treebank share sentences; SIB-200 splits share none."""
    manx = read(files("data/ud", "*Manx*/*.conllu")[0], columns="text")
    bible = read(files("data/bible", "tsv/glv*.tsv")[0], header=False, columns="verse,text")
    overlap = check(bible.only("text"), test=manx).overlaps[0]
    assert 0 < overlap.normalised < 0.05 * overlap.rows
    sib = [read(shared(f"data/sib200/eng_Latn/{name}.tsv")) for name in ("train", "dev", "test")]
    report = check(*sib, label="category")
    assert report.errors == () and [o.normalised for o in report.overlaps] == [0, 0, 0]
    assert list(report.splits[0].scripts) == ["Latin"]
