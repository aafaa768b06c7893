"""`convert`: there and back through the peers' formats with equal outputs; what is lost is said, nothing is replaced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intarsia import bases
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Card, load, save
from intarsia.patches import Head
from tests.cli.bases import make_base
from tests.cli.run import Here
from tests.host.kit import disturb

METHODS = {"lora": build("lora", rank=3), "pf": build("pfeiffer", reduction=4), "headed": build("lora", rank=2).with_head(Head(("x", "y")))}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    loaded = bases.load(make_base(folder / "base"))
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    for seed, (name, method) in enumerate(METHODS.items()):
        host.add(name, method)
        disturb(host, name, seed)
        save(replace(host.extract(name), card=Card(base=str(folder / "base"))), folder / f"{name}.safetensors")
    return folder


def says(room: Path, file: Path) -> torch.Tensor:
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer).insert(load(file, name="m"))
    with host.using("m"), torch.no_grad():
        return host.model.eval()(**loaded.tokenizer("cat dog 12", return_tensors="pt")).logits


@pytest.mark.parametrize(("name", "to"), [("lora", "peft"), ("lora", "adapterhub"), ("pf", "adapterhub")])
def test_there_and_back(cli: Here, room: Path, tmp_path: Path, name: str, to: str) -> None:
    source = room / f"{name}.safetensors"
    shown = cli("convert", str(source), str(tmp_path / "peer"), "--to", to, "--json").ok().json
    assert (shown["from"], shown["to"], shown["left_out"]) == ("intarsia", to, [])
    back = tmp_path / "back.safetensors"
    cli("convert", str(tmp_path / "peer"), str(back), "--to", "intarsia", "--base", str(room / "base"), "--name", "again").ok()
    assert load(back).name == "again"
    torch.testing.assert_close(says(room, back), says(room, source), atol=1e-6, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "peer"]


def test_the_base_is_the_one_that_the_source_names(cli: Here, room: Path, tmp_path: Path) -> None:
    cli("convert", str(room / "lora.safetensors"), str(tmp_path / "peer"), "--to", "peft").ok()
    assert json.loads((tmp_path / "peer" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(room / "base")
    cli("convert", str(tmp_path / "peer"), str(tmp_path / "back"), "--to", "intarsia").ok()
    bare = tmp_path / "bare.safetensors"
    save(replace(load(room / "lora.safetensors"), card=Card()), bare)
    assert "--base" in cli("convert", str(bare), str(tmp_path / "x"), "--to", "peft").error(2)


def test_what_could_not_be_carried_is_printed(cli: Here, room: Path, tmp_path: Path) -> None:
    out = cli("convert", str(room / "headed.safetensors"), str(tmp_path / "peer"), "--to", "peft").ok().out
    assert "left out: " in out and "head" in out
    assert cli("convert", str(room / "headed.safetensors"), str(tmp_path / "more"), "--to", "peft", "--json").ok().json["left_out"]


def test_nothing_is_replaced(cli: Here, room: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        assert "exists already" in cli("convert", str(room / "lora.safetensors"), str(tmp_path / name), "--to", "peft").error(5)
    cli("convert", str(room / "lora.safetensors"), str(tmp_path / "peer"), "--to", "peft").ok()
    assert "exists already" in cli("convert", str(tmp_path / "peer"), str(tmp_path / "file"), "--to", "intarsia").error(5)
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "folder").iterdir())


def test_refusals_leave_nothing(cli: Here, room: Path, tmp_path: Path) -> None:
    words = ("convert", str(room / "lora.safetensors"), str(tmp_path / "x"), "--to")
    assert "did you mean" in cli(*words, "pef").error(2)
    assert "already" in cli(*words, "intarsia").error(2)
    assert "peft's" in cli(*words, "adapterhub", "--task-type", "SEQ_CLS").error(2)
    cli("convert", str(room / "pf.safetensors"), str(tmp_path / "x"), "--to", "peft").error(4)
    cli("convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "intarsia").error(5)
    make_base(tmp_path / "other", seed=1)
    line = cli(*words, "peft", "--base", str(tmp_path / "other")).error(4)
    assert "another base" in line and "weights" in line
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    cli(*words, "peft", "--base", str(tmp_path / "other"), "--force-base").ok()
