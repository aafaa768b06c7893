"""`module show`: what the file says, without and with reading its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module, save
from intarsia.patches import Head
from tests import zoo
from tests.cli.run import Here


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module]:
    model, _ = zoo.make("bert")
    host = Host(model, base_name="tiny")
    host.add("topic", build("lora", rank=2).with_head(Head(("a", "b"))), roles={"language": "swh"})
    module = host.extract("topic")
    path = tmp_path_factory.mktemp("module") / "topic.safetensors"
    save(module, path)
    return path, module


def test_json(cli: Here, stored: tuple[Path, Module]) -> None:
    path, module = stored
    shown = cli("module", "show", str(path), "--json").ok().json
    assert (shown["name"], shown["digest"], shown["labels"]) == ("topic", module.digest, ["a", "b"])
    assert shown["parameters"] == module.n_parameters and shown["size"] == path.stat().st_size
    assert shown["roles"] == {"language": "swh"} and set(shown["tensors"]) == set(module.tensors)
    assert shown["base"] == module.base.to_dict()


def test_text(cli: Here, stored: tuple[Path, Module]) -> None:
    path, module = stored
    out = cli("module", "show", str(path), "--tensors").ok().out
    for part in (module.digest, "rank=2", "a, b", "language=swh", *module.tensors):
        assert part in out
    assert "bias evaluation" in cli("module", "show", str(path), "--card").ok().out.lower()


def test_a_flipped_byte_is_found_when_asked_to_verify(cli: Here, stored: tuple[Path, Module], tmp_path: Path) -> None:
    path, _ = stored
    assert "every byte verified" in cli("module", "show", str(path), "--verify").ok().out
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    cli("module", "show", str(bad), "--verify").error(4)


def test_what_is_no_module(cli: Here, tmp_path: Path) -> None:
    cli("module", "show", str(tmp_path / "nothing.safetensors")).error(5)
    (tmp_path / "junk").write_bytes(b"junk")
    cli("module", "show", str(tmp_path / "junk")).error(4)
