"""`explain`: sizes are the file's, folding is what `merge` does, commuting sites commute, refusals are those of `predict`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia import bases
from intarsia.cli.explain import carried
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import load, save
from intarsia.patches import Head
from tests.cli.bases import make_base
from tests.cli.run import Here
from tests.host.kit import disturb

KINDS = {
    "a": build("lora", rank=3), "b": build("lora", rank=2), "bias": build("bitfit"), "pf": build("pfeiffer", reduction=4),
    "pg": build("pfeiffer", reduction=8), "ia": build("ia3"), "ib": build("ia3"), "p3": build("prefix", length=3),
    "p4": build("prefix", length=4), "xy": build("lora", rank=2).with_head(Head(("x", "y"))),
    "uv": build("pfeiffer", reduction=4).with_head(Head(("u", "v"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    loaded = bases.load(make_base(folder / "base"))
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    for seed, (name, method) in enumerate(KINDS.items()):
        host.add(name, method)
        disturb(host, name, seed, 0.3)
        save(host.extract(name), folder / f"{name}.safetensors")
    return folder


def given(room: Path, *names: str) -> list[str]:
    return [*(word for name in names for word in ("-m", f"{name}={room / name}.safetensors")), "--base", str(room / "base")]


def test_sizes_are_those_of_the_file(cli: Here, room: Path) -> None:
    found = cli("explain", "a >> 0.5*a - b", *given(room, "a", "b", "pf"), "--json").ok().json
    assert found["unused"] == ["pf"] and found["forwards"] == 1 and found["refusal"] is None and found["heads"] == []
    for name in "ab":
        module = load(room / f"{name}.safetensors")
        total = sum(t.numel() for t in module.tensors.values())
        assert found["modules"][name] == {"tensors": len(module.tensors), "trainable": total, "stored": total}
    total = sum(found["modules"][name]["stored"] for name in "ab")
    assert sum(site["stored"] for site in found["sites"]) == total, "a module that comes twice is stored once"
    assert {site["order"] for site in found["sites"]} == {"a >> 0.5*a - b"}
    assert [step["module"] for step in found["sites"][0]["steps"]] == ["a", "a", "b"]


@pytest.mark.parametrize(("one", "two", "promised"), [
    ("a", "b", True), ("a", "bias", True), ("ia", "ib", True), ("a", "pf", True), ("a", "ia", False), ("pf", "pg", False), ("p3", "p4", False),
])  # fmt: skip
def test_where_all_sites_promise_to_commute_the_outputs_do(cli: Here, room: Path, one: str, two: str, promised: bool) -> None:
    sites = cli("explain", f"{one} >> {two}", *given(room, one, two), "--json").ok().json["sites"]
    assert all(site["laws"]["commute"]["holds"] for site in sites) == promised
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    for name in (one, two):
        host.insert(load(room / f"{name}.safetensors", name=name))
    said = []
    for order in (f"{one} >> {two}", f"{two} >> {one}", one):
        with host.using(order) as model, torch.no_grad():
            said.append(model.eval()(**loaded.tokenizer("cat dog 12", return_tensors="pt")).logits)
    assert not torch.allclose(said[0], said[2], atol=1e-3), "the second module does nothing"
    if promised:
        torch.testing.assert_close(said[0], said[1], atol=1e-4, rtol=1e-4)
    elif one != "p3":  # keys and values that stand in front have no order for attention; it is not promised all the same
        assert not torch.allclose(said[0], said[1], atol=1e-4)


@pytest.mark.parametrize(("expression", "folds"), [("a", True), ("a >> b", True), ("xy", True), ("0.5*a + 2*ia", True), ("a + pf", False), ("p3", False)])
def test_folding_is_what_merge_does(cli: Here, room: Path, tmp_path: Path, expression: str, folds: bool) -> None:
    names = [name for name in KINDS if name in expression.replace("*", " ").split()]
    found = cli("explain", expression, *given(room, *names), "--json").ok().json
    assert found["folds"] == folds == (found["why_not_folded"] is None)
    merged = cli("merge", expression, *given(room, *names), "--out", str(tmp_path / "new"))
    if folds:
        merged.ok()
    else:
        assert found["why_not_folded"] in merged.error(2)


def test_a_layer_tied_to_the_embeddings_does_not_fold(cli: Here, room: Path, tmp_path: Path) -> None:
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer).add("top", build("lora", rank=2, at="head"))
    save(host.extract("top"), tmp_path / "top.safetensors")
    assert "tied" in cli("explain", "top", *given(room), "-m", str(tmp_path / "top.safetensors"), "--json").ok().json["why_not_folded"]


@pytest.mark.parametrize(("words", "names", "message"), [
    (["xy >> uv"], ("xy", "uv"), "head="), (["0.5*xy + 0.5*uv"], ("xy", "uv"), "labels differ"), (["0.5*p3 + 0.5*p4"], ("p3", "p4"), "a >> b"),
    (["a", "--head", "a"], ("a",), "not a module with a head"),
])  # fmt: skip
def test_a_refusal_is_printed_and_is_an_error(cli: Here, room: Path, words: list[str], names: tuple[str, ...], message: str) -> None:
    result = cli("explain", *words, *given(room, *names), "--json")
    line = result.error(2)
    assert message in line and line.removeprefix("error: ") == result.json["refusal"] and not result.json["folds"]
    assert "refused" in cli("explain", *words, *given(room, *names)).out


def test_a_named_head_answers_alone(cli: Here, room: Path) -> None:
    found = cli("explain", "xy >> uv", "--head", "uv", *given(room, "xy", "uv"), "--json").ok().json
    assert [site["order"] for site in found["sites"] if site["port"] == "logits"] == ["uv"] and found["heads"] == ["xy", "uv"]


def test_text(cli: Here, room: Path) -> None:
    out = cli("explain", "a >> bias >> xy", *given(room, "a", "bias", "xy")).ok().out
    assert "legal" in out and "without the head of xy" in out and "N.attn.q" in out and "Laws by port" in out
    assert "nothing to fold" in cli("explain", "base", *given(room)).ok().out
    assert "did you mean 'bias'" in cli("explain", "bia", *given(room, "bias")).error(2)


def test_every_tensor_belongs_to_a_step_or_is_tied(room: Path) -> None:
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    for name in KINDS:
        host.insert(load(room / f"{name}.safetensors", name=name))
        module = carried(host, name)
        tied = sum(t.numel() for k, t in host.tensors(name).items() if k.startswith("tied/"))
        assert sum(step.stored for steps in module.steps.values() for step in steps) + tied == module.stored
