"""The demo on a tiny base, and (slow) as a newcomer gets it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from intarsia.data import read
from intarsia.demo import plan as plans
from intarsia.demo.pages import page_table
from intarsia.demo.plan import LANGUAGES, PLAN, RECIPE, UNSEEN, Plan
from intarsia.modules import load
from tests.cli.bases import make_base
from tests.cli.run import Here


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    base = make_base(tmp_path_factory.mktemp("demo") / "base")
    return Plan(base=str(base), rows=30, recipe=replace(RECIPE, max_steps=2))


def test_everything_is_there_and_agrees(cli: Here, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLAN", plan)
    out = tmp_path / "out"
    told = cli("demo", "--out", str(out), "--json", "--quiet").ok().json
    assert [m["method"] for m in told["methods"]] == list(plan.methods)
    assert [e["name"] for e in told["expressions"]] == ["head", told["best"], "stack", "average"]
    assert {Path(file).name for file in told["files"]} == {"report.md", "methods.csv", "languages.csv", "cost-quality.png", "languages.png"}

    methods = read(out / "methods.csv")
    for row, entry in zip(methods, told["methods"]):
        module = load(entry["file"])
        assert (row["method"], int(row["trainable"])) == (entry["method"], entry["trainable"])
        assert float(row["test"]) == entry["test"]["value"] and entry["test"]["n"] == plan.rows
        assert Path(entry["file"]).stat().st_size == entry["bytes"] == int(row["bytes"])
        assert module.card.data[0].licence == "CC-BY-SA-4.0" and module.card.languages == ("eng-Latn",) and module.labels is not None
    languages = read(out / "languages.csv")
    assert len(languages) == 4 * len(LANGUAGES)
    english = {row["name"]: float(row["accuracy"]) for row in languages if row["language"] == "eng_Latn"}
    assert english["head"] == next(m["test"]["value"] for m in told["methods"] if m["method"] == "head")

    report = (out / "report.md").read_text("utf-8")
    for entry in told["methods"]:
        assert f"| {entry['method']} | {entry['trainable']:,} |" in report
    assert all(name in report for name in LANGUAGES.values()) and "CC BY-SA 4.0" in report
    for picture in ("cost-quality.png", "languages.png"):
        assert picture in report
        data = (out / picture).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width > 600 and height > 300


def test_the_screen_tells_the_story_and_a_second_run_replaces_the_first(
    cli: Here, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "PLAN", replace(plan, methods={"lora": {}, "pfeiffer": {}}))
    first = cli("demo", "--out", str(tmp_path)).ok()
    for step in range(1, 6):
        assert f"[{step}/5]" in first.out
    assert "Next:  intarsia predict" in first.out and f"intarsia train --base {plan.base}" in first.out
    assert "lora 1/2" in first.err or "lora: 2 steps" in first.err  # progress goes to standard error
    before = json.dumps(list(read(tmp_path / "languages.csv")))
    second = cli("demo", "--out", str(tmp_path), "--quiet").ok()
    assert second.err == "" and json.dumps(list(read(tmp_path / "languages.csv"))) == before


def test_a_folder_that_is_a_file(cli: Here, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLAN", plan)
    (tmp_path / "out").write_text("", "utf-8")
    assert "--out" in cli("demo", "--out", str(tmp_path / "out")).error(5)


def test_the_plan_is_what_was_promised() -> None:
    assert {"lora", "pfeiffer", "bitfit", "head"} <= set(PLAN.methods) and PLAN.base == "me5-small"
    assert len(LANGUAGES) == 6 and set(UNSEEN) <= set(LANGUAGES)


def test_page_table_escapes_and_aligns() -> None:
    assert page_table(["a", "b"], [["x|y", 1234], ["z", None]]).splitlines() == [
        "| a | b |", "|---|---:|", "| x\\|y | 1,234 |", "| z | - |",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_demo_as_a_newcomer_gets_it(cli: Here, tmp_path: Path) -> None:
    told = cli("demo", "--out", str(tmp_path), "--json", "--quiet").ok().json
    dev = {m["method"]: m["test"]["value"] for m in told["methods"]}
    assert min(dev.values()) > 0.8 and max(dev, key=lambda name: dev[name]) != "head"
    assert told["seconds"] < 300, told["seconds"]
