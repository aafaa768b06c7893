"""Routers from the command line: fusion trained, skills and table together, computed and searched ones, EMEA, reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.cli import main
from intarsia.modules import load
from tests.cli.bases import make_base, make_topics
from tests.cli.run import Here

FEW = ("--max-steps", "8", "--lr", "0.003", "--quiet")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("router")
    make_base(path / "base")
    for number, name in enumerate(("train", "dev", "test")):
        make_topics(path / f"{name}.csv", 36 if name == "train" else 18, number)
        lines = (path / f"{name}.csv").read_text().splitlines()
        told = [f"{line},{'source' if i == 0 else 'xy'[i % 2]}" for i, line in enumerate(lines)]
        (path / f"{name}-by.csv").write_text("\n".join(told) + "\n")
    for name in ("a", "b"):
        words = ["train", "--base", str(path / "base"), "--train", str(path / "train.csv"), "--out", str(path / name), "--name", name, "--set", "rank=2", "--seed", "ab".index(name).__str__()]
        assert main([*words, *FEW]) == 0
    return path


def members(room: Path) -> list[str]:
    return ["--base", str(room / "base"), "-m", str(room / "a/module.safetensors"), "-m", str(room / "b/module.safetensors")]


def test_fusion_is_trained_evaluated_and_reported(cli: Here, room: Path) -> None:
    words = ["train", "--train", str(room / "train.csv"), "--dev", str(room / "dev.csv"), "--out", str(room / "f"), "--name", "f"]
    told = cli(*words, "--method", "fusion", "--set", "dropout=0", *members(room), *FEW, "--json").ok().json
    module = load(told["file"])
    assert module.method.name == "fusion" and module.labels is not None and module.card.recipe["expression"] == "fuse(a, b; router=f)"
    assert {load(room / n / "module.safetensors").digest for n in "ab"} <= set(module.requires)
    used = [*members(room), "-m", told["file"], "--expr", "fuse(a, b; router=f)"]
    found = cli("eval", *used, f"test={room / 'test.csv'}", "--json").ok().json
    assert 0 <= found["data"]["test"]["metrics"]["accuracy"]["value"] <= 1
    shown = cli("explain", "fuse(a, b; router=f)", *used[:-2], "--json").ok().json
    assert shown["refusal"] is None and shown["folds"] is False
    report = cli("router", "report", str(room / "test-by.csv"), *used, "--by", "source", "--picture", str(room / "f.png"), "--json").ok().json
    assert (room / "f.png").read_bytes().startswith(b"\x89PNG") and set(report["members"]) == {"a", "b"}
    assert all(abs(sum(site["usage"].values()) - 1) < 1e-6 and site["information"]["source"] >= -1e-9 for site in report["sites"].values())
    assert "entropy" in cli("router", "report", str(room / "test.csv"), *used).ok().out
    assert "two or more" in cli("train", *words[1:-2], "--name", "g", "--method", "fusion", "--base", str(room / "base"), "-m", str(room / "a/module.safetensors")).error(2)


def test_skills_and_their_table_are_trained_together(cli: Here, room: Path) -> None:
    words = ["train", "--base", str(room / "base"), "--train", str(room / "train-by.csv"), "--dev", str(room / "dev-by.csv"), "--out", str(room / "z"), "--name", "z"]
    more = ["--method", "polytropon", "--new", "s0=lora:rank=2", "--new", "s1=lora:rank=2", "--along", "s1=0.01", "--task-set", "context=task=source"]
    told = cli(*words, *more, *FEW, "--json").ok().json
    module = load(told["file"])
    assert module.method.settings["tasks"] == ("x", "y") and module.card.recipe["expression"] == "fuse(s0, s1; router=z, space=phi)"
    files = [word for name in ("s0", "s1") for word in ("-m", f"{name}={room / 'z/along' / name}.safetensors")]
    found = cli("eval", "--base", str(room / "base"), *files, "-m", told["file"], "--expr", "fuse(s0, s1; router=z, space=phi)", f"test={room / 'test-by.csv'}", "--json").ok().json
    assert found["data"]["test"]["metrics"]["accuracy"]["n"] == 18
    assert "which column tells it" in cli(*words[:-4], "--out", str(room / "zz"), "--name", "z", "--method", "polytropon", "--new", "s0=lora", "--new", "s1=lora").error(2)


def test_computed_and_searched(cli: Here, room: Path) -> None:
    expr, arrow = "fuse(a, b; router=r)", room / "arrow.safetensors"
    made = cli("router", "make", "arrow", "--expr", expr, *members(room), "--set", "top=1", "--out", str(arrow), "--json").ok().json
    module = load(arrow)
    assert module.digest == made["digest"] and len(module.requires) == 2
    cli("eval", *members(room), "-m", str(arrow), "--expr", expr, "--head", "a", f"test={room / 'test.csv'}", "--json").ok()
    data = [word for name in "ab" for word in ("--data", f"{name}={room / 'train.csv'}")]
    cli("router", "make", "gaussians", "--expr", expr, *members(room), *data, "--out", str(room / "g.safetensors")).ok()
    found = cli("router", "search", str(room / "dev.csv"), "--expr", "fuse(a, b; router=r, space=phi)", "--head", "a", *members(room), "--steps", "12", "--out",
                str(room / "hub.safetensors"), "--json").ok().json  # fmt: skip
    assert set(found["weights"]) == {"a", "b"} and found["best"] <= found["loss_before"] + 1e-6
    cli("eval", *members(room), "-m", str(room / "hub.safetensors"), "--expr", "fuse(a, b; router=r, space=phi)", "--head", "a", f"test={room / 'test.csv'}").ok()
    low = cli("router", "adapt", f"a={room / 'dev.csv'}", f"b={room / 'test.csv'}", "--expr", expr, *members(room), "--steps", "5", "--lr", "0.05", "--out", str(room / "ada.safetensors"), "--json").ok().json
    assert low["entropy"] <= low["entropy_before"] + 1e-3
    made = ("router", "make", "centroids", "--expr", expr, *members(room), "--out", str(room / "c.safetensors"))
    cli(*made, *data, "--set", "temperature=0.5").ok()
    assert load(room / "c.safetensors").method.settings["temperature"] == 0.5
    assert "no setting 'tau'" in cli(*made, *data, "--set", "tau=1").error(2)
    assert "centroids wants --data" in cli(*made, *data[:2]).error(2)
    assert "no use for --gate" in cli(*made, *data, "--gate", "a=b").error(2)
    assert "no use for --data" in cli("router", "make", "arrow", "--expr", expr, *members(room), *data, "--out", "x").error(2)
    assert "are trained" in cli("router", "make", "experts", "--expr", expr, *members(room), "--out", "x").error(2)
    assert "phatgoose" in cli("router", "ls").ok().out


def test_emea(cli: Here, room: Path) -> None:
    found = cli("router", "emea", str(room / "test.csv"), "--expr", "fuse(a, b; router=r)", "--head", "a", *members(room), "--steps", "2", "--lr", "1", "--batch-size", "6", "--json").ok().json
    assert found["emea"]["entropy"] <= found["ensemble"]["entropy"] + 1e-6 and found["emea"]["entropy_before"] == pytest.approx(found["ensemble"]["entropy"], abs=1e-5)
    assert found["emea"]["metrics"]["accuracy"]["n"] == 18


def test_cut_rows_are_told(cli: Here, room: Path) -> None:
    (room / "long.csv").write_text(f"text,label\n{'word ' * 400},animals\n")
    told = cli("router", "emea", str(room / "long.csv"), "--expr", "fuse(a, b; router=r)", "--head", "a", *members(room), "--steps", "0", "--task-set", "max_length=16").ok()
    assert "1 truncated" in told.err and "longer than the model reads" in told.err


def test_a_routed_mixture_is_no_sum_to_merge(cli: Here, room: Path) -> None:
    assert "no weighted sum" in cli("merge", "phi(0.5*a + 0.5*b)", *members(room)[2:], "--to-module", str(room / "m.safetensors")).error(2)
