"""The probe: counts that a second counting agrees with, explicit words where something cannot be measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from intarsia.bases import Base
from intarsia.errors import DataError
from intarsia.host import Host
from intarsia.languages.bits import bits
from intarsia.languages.corpus.build import Corpus
from intarsia.languages.evidence import TABLE
from intarsia.languages.measures import fit, measures, pieces_in_script
from intarsia.languages.probe import coverage_of, probe
from intarsia.languages.typology import read_csv
from intarsia.methods import METHODS
from intarsia.store.store import Store
from tests.cli.run import Here
from tests.languages.test_typology import CSV


def test_counts(base: Base) -> None:
    found = measures(base.tokenizer, ["katomi lu", "", "ⲕⲁⲧⲟ lu"])
    assert (found.lines, found.words, found.unknown_words) == (2, 4, 1)
    assert found.unknown_word_share == 0.25 and found.scripts == {"Latin": 10, "Coptic": 4} and found.script == "Latin"
    assert {point for point, _, _ in found.lacking} == {"U+2C95", "U+2C81", "U+2CA7", "U+2C9F"}
    assert found.pieces == 6 + 2 + 1 + 2 and found.pieces_per_word == 11 / 4
    assert found.pieces_in_script == 52 and pieces_in_script(base.tokenizer, "Coptic") == 0


def test_combining_marks_stay_in_words(base: Base) -> None:
    word = "ક્રિયા"  # a splitter that drops marks makes three words of it
    assert measures(base.tokenizer, [f"{word} {word}"]).words == 2
    assert fit([word], [word]).words == 1.0 and fit(["ka\u0301to"], ["kato"]).words == 0.0 and fit(["ka\u0301to"], ["kato"]).stripped == 1.0


def test_fit_of_a_text_to_itself_and_to_another() -> None:
    assert set(fit(["a bc def ghij"], ["Def, ghij!"]).to_dict().values()) == {1.0}
    assert set(fit(["abcd"], ["wxyz"]).to_dict().values()) == {0.0}


class Uniform(torch.nn.Module):
    """Gives every piece the same chance."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.zeros(*input_ids.shape, 67)}


def test_bits_are_a_code_length(base: Base) -> None:
    """A model that knows nothing needs log2 V bits a piece, an unknown piece log2 of the text's characters each."""
    model = Uniform(base.model.config)
    found = bits(model, base.tokenizer, ["abc de"])
    assert found.bits == pytest.approx(5 * math.log2(67) / 6) and found.unknown == 0
    found = bits(model, base.tokenizer, ["abc ⲇⲉ"])
    assert found.bits == pytest.approx((3 * math.log2(67) + 2 * math.log2(6)) / 6) and found.unknown == 2


def test_without_an_lm_head_it_says_so(bare: Base, base: Base, corpus: Corpus) -> None:
    assert probe(corpus.texts(), "kab", bare, bits_lines=2).bits is None
    assert "no LM head" in probe(corpus.texts(), "kab", bare).bits_note
    assert "headless" in [row.key for row in probe(corpus.texts(), "kab", bare).advice]
    with_head = probe(corpus.texts(), "kab", base, bits_lines=2)
    assert with_head.bits is not None and with_head.bits > 0 and "headless" not in [row.key for row in with_head.advice]
    with pytest.raises(DataError, match="no words"):
        probe([" "], "kab", base)


def test_neighbours_and_their_modules(base: Base, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV, "utf-8")
    host = Host(base.model, tokenizer=base.tokenizer, base_name="tiny")
    host.add("lang-shi", METHODS["bitfit"].build(), roles={"language": "shi"})
    store = Store(tmp_path / "store")
    store.add(host.extract("lang-shi"))
    coverage = coverage_of(store, host.fingerprint)
    host.close()
    assert coverage == {"shi": ("lang-shi",)}
    found = probe(corpus.texts(), "kab", base, typology=read_csv(tmp_path / "t.csv"), coverage=coverage, bits_lines=0)
    assert found.neighbours is not None and found.neighbours.path == ("Afro-Asiatic", "Berber", "kab")
    shi = next(n for n in found.neighbours.near if n.language == "shi" and n.by == "family")
    assert shi.modules == ("lang-shi",) and shi.measure == 2
    assert found.neighbours.observed == {"syntax": (2, 3), "phonology": (1, 1)}
    assert {"relatives", "family"} <= {row.key for row in found.advice}
    assert found.to_dict()["measures"]["words"] == found.measures.words


def test_an_unseen_script_comes_first(base: Base) -> None:
    found = probe(["ⲕⲁⲧⲟ ⲙⲓ lu"] * 2, "cop", base, bits_lines=0, task_texts=["something else"])
    assert found.advice[0].key == "script" and any("does not know" in w for w in found.warnings)
    assert any("another variety" in w for w in found.warnings)
    assert all(row.findings and row.grade for row in TABLE)


def test_the_verb(cli: Here, folder: Path, bibles: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV, "utf-8")
    words = ("lang", "probe", str(bibles[0]), "--language", "kab", "--base", str(folder), "--typology", str(tmp_path / "t.csv"), "--store", str(tmp_path / "s"))
    found = cli(*words, "--bits-lines", "2", "--json").ok().json
    assert found["iso"] == "kab" and found["measures"]["unknown_word_share"] == 0 and found["bits"] > 0
    shown = cli(*words, "--bits-lines", "0").ok().out
    assert "pieces per word" in shown and "Ebrahimi & Kann" in shown and "shi" in shown
    assert "not a registered language" in cli("lang", "probe", str(bibles[0]), "--language", "q-q", "--base", str(folder)).error(2)
