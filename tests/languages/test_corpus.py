"""Corpora: nothing goes without being counted, books are held out whole, test sentences are refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.data.check import normal_form
from intarsia.errors import DataError, StoreError, UsageError
from intarsia.languages.corpus.build import Corpus, OverlapError, Plan, build, read_corpus, save
from intarsia.languages.corpus.duplicates import Duplicates, grams, jaccard
from intarsia.languages.corpus.filters import Length, Normalise, Script, Words, apply
from intarsia.languages.corpus.identity import Identity, Profile
from intarsia.languages.corpus.overlap import overlap
from intarsia.languages.corpus.sources import Line, Source, kind_of, load
from intarsia.languages.corpus.splits import GOSPELS, choose_books, pairs, split
from intarsia.languages.romanise import Cipher
from tests.languages.conftest import verses, write_bible


def lines(*texts: str) -> list[Line]:
    return [Line(text, str(i + 1)) for i, text in enumerate(texts)]


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_bible_reads_alike_from_tsv_and_xml(tmp_path: Path) -> None:
    found = dict(list(verses(3).items())[:5])
    tsv = write_bible(tmp_path / "a.tsv", found)
    segments = "".join(f'<seg id="b.{ident}" type="verse">\n  {text}\n</seg>' for ident, text in found.items())
    xml = tmp_path / "a.xml"
    xml.write_text(f'<?xml version="1.0" encoding="utf-8"?><cesDoc><text><body>{segments}</body></text></cesDoc>', "utf-8")
    assert kind_of(tsv) == kind_of(xml) == "bible"
    assert load(Source(str(tsv), "bible")).lines == load(Source(str(xml), "bible")).lines
    assert [line.book for line in load(Source(str(tsv), "bible")).lines] == ["MAT"] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("MAT 1\ttext\n", "no verse id"), ("b.MAT.1.1\ta\nb.MAT.1.1\tb\n", "occurs twice"), ("b.MAT.1.1 text\n", "a tab and the verse"), ("b.MAT.1.1\t \n", "no lines")],
)
def test_a_malformed_bible_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.tsv").write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        load(Source(str(tmp_path / "a.tsv"), "bible"))


def test_xml_entities_are_never_expanded(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text('<!DOCTYPE x [<!ENTITY a "aaaa">]><x><seg id="b.MAT.1.1" type="verse">&a;</seg></x>', "utf-8")
    with pytest.raises(DataError, match="document type"):
        load(Source(str(tmp_path / "a.xml"), "bible"))


def test_treebank_and_declaration(tmp_path: Path) -> None:
    bank = "# sent_id = s1\n# text = Ta mee.\n1\tTa\t_\n2\tmee\t_\n\n1-2\tdel\t_\n1\tde\t_\n2\tel\t_\n3\tpan\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No\n4\t.\t_\n"
    (tmp_path / "a.conllu").write_text(bank, "utf-8")
    found = load(Source(str(tmp_path / "a.conllu"), "treebank")).lines
    assert [(line.ident, line.text) for line in found] == [("s1", "Ta mee."), ("2", "del pan.")]
    (tmp_path / "a.html").write_text("<html><head><title>no</title></head><body><h1>One</h1><p>Two\n &amp; three</p><script>x</script></body></html>", "utf-8")
    assert [line.text for line in load(Source(str(tmp_path / "a.html"), "udhr")).lines] == ["One", "Two & three"]


@given(st.lists(st.text("abcdeé ,.1", max_size=30), min_size=1, max_size=4))
def test_a_cipher_can_be_read_back_and_leaves_no_letter(texts: list[str]) -> None:
    cipher = Cipher.of(texts, "ⲁⲃⲅⲇⲉⲍ")
    assert [cipher.read(cipher.write(text)) for text in texts] == texts
    assert not set("abcdeé") & set("".join(map(cipher.write, texts)))


def test_a_cipher_that_could_not_be_read_back_is_refused() -> None:
    for texts, letters, message in (["abc"], "ⲁⲃ", "3 letters"), (["abⲁ"], "ⲁⲃⲅ", "must not occur"), (["ab"], "ⲁⲁ", "different single letters"):
        with pytest.raises(UsageError, match=message):
            Cipher.of(texts, letters)


# -- filters -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_filter_accounts_for_every_line(texts: list[str]) -> None:
    here = lines(*texts)
    profiles = Profile.of("aa", ["ab ab ba"]), Profile.of("bb", ["xy yx xx"])
    for step in (Normalise(), Length(2, 20), Script("Latin"), Words("toxicity", ("ab",)), Duplicates(), Identity(profiles[0], (profiles[1],))):
        kept, told, dropped = apply(step, here)
        assert len(kept) + len(dropped) == len(here) == told.before and told.after == len(kept)
        assert [line.ident for line in kept] == [line.ident for line in here if line.ident not in {d.line.ident for d in dropped}]


@given(st.text(max_size=60), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_normalising_twice_is_normalising_once(text: str, form: str) -> None:
    clean = Normalise(form)
    assert clean.text(clean.text(text)) == clean.text(text)


def test_marks_and_case_can_be_taken_away() -> None:
    assert Normalise(lower=True, strip_marks=("U+0305",)).text("A\u0305BC\u0301") == "ab\u0107"
    with pytest.raises(UsageError, match="code point"):
        Normalise(strip_marks=("U+XYZ",))


def test_words_on_a_list_go_as_whole_words() -> None:
    kept, _, dropped = apply(Words("personal data", ("Jane Doe", "555-1234")), lines("I saw JANE  doe.", "Jane and Doe", "call 555-1234!", "5551234 is whole", "none"))
    assert [d.line.ident for d in dropped] == ["1", "3", "4"] and [line.ident for line in kept] == ["2", "5"]  # punctuation is no difference


@given(st.integers(0, 2**31), st.floats(0.5, 0.95))
@settings(max_examples=25, deadline=None)
def test_near_duplicates_are_those_whose_grams_say_so(seed: int, threshold: float) -> None:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices("abcdefgh", k=40)) for _ in range(4)]
    for text in list(texts):
        words = text.split()
        for _ in range(draw.randint(0, 6)):
            words[draw.randrange(len(words))] = draw.choice("xyz")
        texts.append(" ".join(words))
    kept, _, dropped = apply(Duplicates(threshold), lines(*texts))
    sets = {line.ident: grams(normal_form(line.text)) for line in lines(*texts)}
    for gone in dropped:
        assert any(int(line.ident) < int(gone.line.ident) and jaccard(sets[line.ident], sets[gone.line.ident]) >= threshold for line in kept)
    equal_only, _, _ = apply(Duplicates(2.0), lines(*texts))
    assert len(equal_only) == len({normal_form(text) for text in texts})


def test_identity_drops_other_languages_and_never_short_lines() -> None:
    wanted = Profile.of("kab", list(verses(0).values()))
    other = Profile.of("en", list(verses(1, ("an", "the", "of", "in", "er", "st", "ou", "al")).values()))
    judge = Identity(wanted, (other,))
    assert all(judge.language(text) == "kab" for text in verses(5).values())
    wrong = list(verses(6, ("an", "the", "of", "in", "er", "st", "ou", "al")).values())
    assert all(judge.language(text) == "en" for text in wrong)
    assert judge.language("the of") == "kab"
    with pytest.raises(UsageError, match="at least one other"):
        Identity(wanted, ())


# -- splits ------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(["MAT", "MAR", "ACT", "ROM", "TIT", "JUD", "REV", "GAL"]), st.integers(1, 400), min_size=2), st.floats(0.01, 0.4))
def test_chosen_books_are_small_and_near_the_share(counts: dict[str, int], share: float) -> None:
    books = choose_books(counts, share)
    others = [book for book in counts if book not in GOSPELS]
    if round(share * sum(counts.values())) and others:
        assert books and not set(books) & set(GOSPELS)
        off = abs(sum(counts[b] for b in books) - share * sum(counts.values()))
        assert off <= min(abs(counts[b] - share * sum(counts.values())) for b in others) + 1  # no single book is nearer


def test_books_are_whole_and_blocks_are_drawn(bibles: tuple[Path, Path]) -> None:
    verse = list(load(Source(str(bibles[0]), "bible")).lines)
    plain = [Line(f"line {i}", str(i), 1) for i in range(200)]
    parts = split([*verse, *plain], 0.1)
    assert {line.book for line in parts.dev if line.book}.isdisjoint({line.book for line in parts.train if line.book})
    assert 0 < sum(not line.book for line in parts.dev) <= 40
    assert len(parts.train) + len(parts.dev) == len(verse) + 200
    assert split([*verse, *plain], 0.1) == parts
    with pytest.raises(UsageError, match="no book 'XYZ'"):
        split(verse, books=("XYZ",))


def test_pairs_go_by_id_and_length() -> None:
    here = [Line("a" * n, f"MAT.1.{i}") for i, n in enumerate((10, 10, 10, 100), 1)]
    there = [Line("b" * 20, f"MAT.1.{i}") for i in (1, 2, 4)]
    found, out = pairs(here, there)
    assert [p.ident for p in found] == ["MAT.1.1", "MAT.1.2"]
    assert out == {"not in the other text": 1, "lengths that do not agree": 1}


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_a_corpus_comes_back_from_its_folder_and_a_changed_one_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    save(corpus, tmp_path / "kab")
    again = read_corpus(tmp_path / "kab")
    assert again.digest == corpus.digest and again.train.texts("text") == corpus.train.texts("text")
    assert again.parallel_dev is not None and again.parallel_dev.texts("target") == corpus.parallel_dev.texts("target")  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="exists"):
        save(corpus, tmp_path / "kab")
    with (tmp_path / "kab" / "dev.tsv").open("a", encoding="utf-8") as handle:
        handle.write("X\ty\tz\n")
    with pytest.raises(DataError, match="was changed"):
        read_corpus(tmp_path / "kab")


def test_dev_shares_no_line_and_no_book_with_train(corpus: Corpus) -> None:
    assert corpus.dev is not None
    train, dev = ({normal_form(t) for t in table.texts("text")} for table in (corpus.train, corpus.dev))
    assert not train & dev
    assert corpus.manifest["held_out_books"] and not {i.split(".")[0] for i in corpus.dev.texts("id")} & {i.split(".")[0] for i in corpus.train.texts("id")}
    held = set(corpus.dev.texts("id"))
    assert corpus.parallel_train is not None and corpus.parallel_dev is not None
    assert set(corpus.parallel_dev.texts("id")) <= held and not set(corpus.parallel_train.texts("id")) & held


def test_every_source_line_is_kept_or_among_the_dropped(tmp_path: Path) -> None:
    found = verses(0)
    found["REV.9.1"] = next(iter(found.values()))
    plan = Plan("kab", (Source(str(write_bible(tmp_path / "a.tsv", found)), "bible"),), (Normalise(), Length(7), Duplicates()))
    made = build(plan)
    there = [*made.train.texts("id"), *(made.dev.texts("id") if made.dev else ()), *(line.ident for _, line, _ in made.dropped)]
    assert sorted(there) == sorted(found)
    assert sum(sum(step["dropped"].values()) for step in made.manifest["steps"]) == len(made.dropped) > 1
    assert "licence unknown" in " ".join(made.manifest["warnings"]) and "religious text only" in " ".join(made.manifest["warnings"])


def test_sentences_of_the_test_data_are_refused_and_shown_or_taken_out(bibles: tuple[Path, Path]) -> None:
    texts = list(verses(0).values())
    inside = " ".join(texts[5].rstrip(".").split()[:6]).upper()
    asked = (("test:1", texts[3]), ("test:2", inside), ("test:3", "katomi"))
    plan = Plan("kab", (Source(str(bibles[0]), "bible"),), (Normalise(),), task_texts=asked)
    with pytest.raises(OverlapError) as caught:
        build(plan)
    assert {hit.where for hit in caught.value.hits} == {"test:1", "test:2"} and "--drop-overlap" in str(caught.value)
    made = build(replace(plan, drop_overlap=True))
    left = [*made.train.texts("text"), *(made.dev.texts("text") if made.dev else ())]
    assert not overlap([Line(text, "x") for text in left], asked)
    assert made.manifest["steps"][-1]["dropped"] == {"sentence of the task's test data": len(caught.value.hits)}


def test_filters_that_leave_nothing_say_what_they_dropped(bibles: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"script dropped \d+ \(mostly Latin\)"):
        build(Plan("kab", (Source(str(bibles[0]), "bible"),), (Script("Coptic"),)))
