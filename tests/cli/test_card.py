"""`card show`, `check`, `set`, `render`: completing a card never touches what the module is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.modules import Card, Metric, Module, dumps, load, put_card, read_header, save
from tests.cli.run import Here
from tests.modules.make import module, sparse
from tests.modules.test_card import FULL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save(module(card=Card(title="Topics", languages=("swh",), data=FULL.data[:1], recipe={"seed": 3})), path)
    return path


COMPLETE = ["script=Latn", 'task=topics', "base=o/n", "method=lora", "licence=cc-by-4.0", "contact=a@b.org", "intended_use=News.", "out_of_scope=People.",
            "cost.seconds=12.5", "cost.device=cpu"]  # fmt: skip


def evaluation(path: Path, digests: dict[str, str], **data: float) -> Path:
    score = lambda value: {"accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}}  # noqa: E731
    path.write_text(json.dumps({"expression": "m", "digests": digests, "data": {name.replace("__", ":"): {"metrics": score(value)} for name, value in data.items()}}))
    return path


def test_a_card_is_checked_completed_and_checked_again(cli: Here, file: Path, tmp_path: Path) -> None:
    before = load(file)
    checked = cli("card", "check", str(file))
    line = checked.error(4)
    for word in ("licence", "contact", "intended_use", "out_of_scope", "task", "metrics", "cost", "script"):
        assert word in line
    rows = [row.split("  ") for row in checked.out.splitlines()[1:]]
    assert all(row[0] and ("=" in row[-1] or "--eval" in row[-1]) for row in rows) and len(rows) == len(before.card.missing())

    out = cli("card", "set", str(file), *COMPLETE, "--eval", str(evaluation(tmp_path / "e.json", {"m": before.digest}, test=0.8, test__swh=0.7))).ok().out
    assert "complete" in out
    after = load(file)
    assert cli("card", "check", str(file)).ok().out.strip().endswith("the card is complete")
    assert after.digest == before.digest and all(torch.equal(t, before.tensors[k]) for k, t in after.tensors.items())
    assert after.card.licence == "CC-BY-4.0" and after.card.title == "Topics" and after.card.recipe == {"seed": 3}
    assert after.card.metrics == (Metric("accuracy", "test", "", 0.8, 0.8 - 0.1, 0.8 + 0.1, 40, (3,)), Metric("accuracy", "test", "swh", 0.7, 0.7 - 0.1, 0.7 + 0.1, 40, (3,)))


def test_every_line_of_the_check_is_something_one_can_type(cli: Here, tmp_path: Path) -> None:
    """From an empty card: type what it says until nothing is missing but what is measured."""
    path = tmp_path / "m.safetensors"
    save(module(card=Card(bias_evaluation="")), path)
    for _ in range(3):  # data are named first, then asked for details
        for row in cli("card", "check", str(path), "--json").json["missing"]:
            if "--eval" not in row["type"]:
                key, _, value = row["type"].partition("=")
                cli("card", "set", str(path), f"{key}={'ab' * 32 if key.endswith('sha256') else value.strip(chr(34))}").ok()
    shown = cli("card", "check", str(path), "--json").json
    assert [row["what"] for row in shown["missing"]] == ["metrics"] and not shown["complete"]


def stored(kind: str) -> tuple[Module, Any]:
    return (module(tensors=sparse()) if kind in ("sparse", "int8") else module()), (kind if kind in ("int8", "bf16") else None)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "sparse"])
def test_the_file_is_the_one_that_would_have_been_written_with_that_card(kind: str, tmp_path: Path) -> None:
    """Byte for byte: tensors keep their codes, nothing is rounded again, the version stays."""
    made, dtype = stored(kind)
    digest = save(made, tmp_path / "m", dtype=dtype)
    version = read_header(tmp_path / "m").version
    held = load(tmp_path / "m")
    assert put_card(tmp_path / "m", FULL) == digest
    assert (tmp_path / "m").read_bytes() == dumps(replace(held, card=FULL), dtype=dtype) and read_header(tmp_path / "m").version == version


def test_a_damaged_file_is_not_sealed_again(file: Path) -> None:
    """Every flipped byte of header or tensors is refused as by `load`, and the file stays as it is."""
    sound = file.read_bytes()
    for place in (*range(0, len(sound), 97), len(sound) - 1):
        bad = bytearray(sound)
        bad[place] ^= 1
        file.write_bytes(bad)
        with pytest.raises(Exception, match="module file"):
            put_card(file, FULL)
        assert file.read_bytes() == bytes(bad)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name]


def test_the_write_is_atomic(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="no space left"):
        put_card(file, FULL)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(("words", "message"), [
    (["license=MIT"], "did you mean 'licence'"), (["intended=x"], "did you mean 'intended_use'"), (["nonsense=1"], "known: title"), (["licence"], "KEY=VALUE"),
    (["metrics=1"], "intarsia eval"), (["parents=x"], "how the module was made"), (["data=x"], "data.1.name"), (["data.1.license=MIT"], "did you mean 'licence'"),
    (["data.3.name=x"], "there are 1 sources"), (["data.2.licence=MIT"], "name it first"), (["data.1.sha256=12"], "64 lower-case"), (["licence.x=1"], "no statement"),
    (["languages=eng_Latn"], "write 'eng-Latn'"), (["script=Latin"], "ISO 15924"), (["cost.seconds=long"], "a number"), (["cost.trainable=1.5"], "whole number"),
    (["cost.bytes=-1"], "whole number"), (["cost.hours=1"], "no 'hours'"), (["contact=a", "contact=b"], "given twice"), ([], "say what to set"), (["languages=[]x"], "BCP-47"),
    (["warnings=[1]"], "sentences"), (["languages=[1]"], "BCP-47 tags"), (["recipe=x"], "recipe.epochs"),
])  # fmt: skip
def test_what_cannot_be_set_is_refused_and_nothing_is_written(cli: Here, file: Path, words: list[str], message: str) -> None:
    before = file.read_bytes()
    assert message in cli("card", "set", str(file), "description=new", *words).error(2) if words else cli("card", "set", str(file)).error(2)
    assert file.read_bytes() == before


def test_lists_numbers_and_sources(cli: Here, file: Path) -> None:
    cli("card", "set", str(file), "languages=swh, kab-Latn", "warnings=One.", "recipe.epochs=3", "recipe.optimiser=adamw", "data.origin=https://a.b/?x=1", "data.2.name=More",
        "data.2.rows=7", "data.2.licence=cc0-1.0", "cost.bytes=12").ok()  # fmt: skip
    cli("card", "set", str(file), 'warnings=["One.", "Two, and more."]').ok()
    card = read_header(file).card
    assert card.languages == ("swh", "kab-Latn") and card.warnings == ("One.", "Two, and more."), "a warning is added, never taken away"
    assert card.recipe == {"seed": 3, "epochs": 3, "optimiser": "adamw"}
    assert [(d.name, d.origin, d.rows, d.licence) for d in card.data] == [("SIB-200", "https://a.b/?x=1", 701, "CC-BY-SA-4.0"), ("More", "", 7, "CC0-1.0")]
    assert card.cost is not None and card.cost.bytes == 12


def test_an_evaluation_of_something_else_is_refused(cli: Here, file: Path, tmp_path: Path) -> None:
    mine, required = load(file).digest, load(file).requires[0]
    words = ("card", "set", str(file), "--eval")
    assert "not an evaluation of this module" in cli(*words, str(evaluation(tmp_path / "a", {"m": "ef" * 32}, test=0.5))).error(4)
    assert "together with other" in cli(*words, str(evaluation(tmp_path / "b", {"m": mine, "other": "ef" * 32}, test=0.5))).error(4)
    cli(*words, str(evaluation(tmp_path / "c", {"m": mine, "lang": required}, test=0.5))).ok()
    cli(*words, str(evaluation(tmp_path / "c", {"m": mine}, test=0.6))).ok()
    assert [m.value for m in read_header(file).card.metrics] == [0.6], "measured again, it replaces the number"
    (tmp_path / "d").write_text(json.dumps({"digests": {"m": mine}, "data": 3}))
    assert "not the result of an evaluation" in cli(*words, str(tmp_path / "d")).error(2)
    (tmp_path / "d").write_text((tmp_path / "c").read_text().replace('"value": 0.6', '"value": null'))
    assert "not the result of an evaluation" in cli(*words, str(tmp_path / "d")).error(2), "a metric without a value is not left out in silence"
    cli(*words, str(tmp_path / "none")).error(3)


def test_an_evaluation_on_another_base_is_refused(cli: Here, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    forced = evaluation(tmp_path / "forced", {"m": load(file).digest}, test=0.5)
    forced.write_text(json.dumps({**json.loads(forced.read_text()), "forced_base": {"m": "weights: a, found b"}}))
    assert "measured with --force-base" in cli("card", "set", str(file), "--eval", str(forced)).error(4)
    assert file.read_bytes() == before


def test_show_has_every_statement(cli: Here, file: Path) -> None:
    put_card(file, FULL)
    out = cli("card", "show", str(file)).ok().out
    for word in ("Topics in Swahili", "swh, kab-Latn", "SIB-200", "https://example.org/sib", "0.81", "[0.76, 0.86]", "1, 2, 3", "not evaluated", "News topics.",
                 "Decisions about people.", "CC-BY-SA-4.0", "a@example.org", "Trained on translated text.", "seconds=62.5", "lr=0.0005", "multilingual-e5-small"):  # fmt: skip
        assert word in out, word
    assert "missing" not in out
    shown = cli("card", "show", str(file), "--json").ok().json
    assert shown["missing"] == [] and shown["card"]["contact"] == "a@example.org"
    put_card(file, Card())
    assert "missing: title" in cli("card", "show", str(file)).ok().out


def test_render(cli: Here, file: Path, tmp_path: Path) -> None:
    put_card(file, replace(FULL, base="me5-small"))
    out = cli("card", "render", str(file)).ok().out
    assert out.startswith("---\n") and 'base_model: "intfloat/multilingual-e5-small"' in out and "## Bias evaluation\n\nnot evaluated" in out
    assert 'base_model: "o/n"' in cli("card", "render", str(file), "--base-model", "o/n").ok().out
    target = tmp_path / "README.md"
    cli("card", "render", str(file), "--out", str(target)).ok()
    assert target.read_text("utf-8") == out
    assert "exists already" in cli("card", "render", str(file), "--out", str(target)).error(5)


def test_what_is_no_module(cli: Here, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    for verb in (("show",), ("check",), ("set",), ("render",)):
        rest = ("title=x",) if verb == ("set",) else ()
        cli("card", *verb, str(tmp_path / "none.safetensors"), *rest).error(5)
        cli("card", *verb, str(tmp_path / "junk"), *rest).error(4)
