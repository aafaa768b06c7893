"""composable-sft: the reference outputs beside the samples are ours, alone and together; what is written is what was read."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from intarsia.errors import ModuleError, StoreError
from intarsia.host import Host
from intarsia.methods import build, union
from intarsia.modules import Module, dumps, loads
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import Report, read_sft, write_sft
from intarsia.store.convert.sft import _difference
from tests import zoo
from tests.shared import shared

pytestmark = pytest.mark.filterwarnings("ignore:.*is a pickle")


def place(name: str) -> Path:
    return shared(f"fixtures/adapterhub/composable_sft/{name}")


@cache
def base() -> PreTrainedModel:
    return AutoModelForTokenClassification.from_pretrained(place("base")).eval()


@cache
def read(name: str, with_weights: bool = True) -> tuple[Module, Report]:
    model = base()
    weights = model.state_dict() if with_weights else None
    return read_sft(place(name), sites=resolve(model), base=fingerprint(model), weights=weights, allow_pickle=True)


def logits(host: Host, expression: str | None) -> Tensor:
    with torch.no_grad(), host.using(expression):
        return host.model(**load_file(place("inputs.safetensors"))).logits


def test_outputs_are_the_reference() -> None:
    want = load_file(place("reference.safetensors"))
    host = Host(base())
    try:
        for name in ("lang_sft", "task_sft"):
            module, report = read(name)
            assert report.complete and "entries change" in report.notes[0]
            host.insert(loads(dumps(module)))
        for expression, case in ((None, "base"), ("lang_sft", "lang"), ("lang_sft + task_sft", "lang+task"), ("task_sft", "task_after_revert_lang")):
            torch.testing.assert_close(logits(host, expression), want[case], atol=1e-5, rtol=1e-5)
    finally:
        host.close()


@pytest.mark.parametrize("name", ["lang_sft", "task_sft"])
def test_what_is_written_is_what_was_read(name: str, tmp_path: Path) -> None:
    module, _ = read(name)
    model = base()
    report = write_sft(module, tmp_path / name, sites=resolve(model), weights=model.state_dict())
    assert report.complete
    again, _ = read_sft(tmp_path / name, sites=resolve(model), base=fingerprint(model), weights=model.state_dict(), allow_pickle=True)
    assert again.method == module.method
    for key, tensor in module.tensors.items():  # a head goes through its absolute value
        torch.testing.assert_close(again.tensors[key], tensor, atol=0 if "sparse" in key else 1e-6, rtol=0)
    theirs, ours = (torch.load(p / "pytorch_diff.bin", weights_only=False) for p in (place(name), tmp_path / name))
    changed = {param: parts for param, parts in theirs["diffs"].items() if len(parts["values"])}
    assert changed.keys() == ours["diffs"].keys() and theirs["abs"].keys() == ours["abs"].keys()
    for param, parts in changed.items():
        mine = ours["diffs"][param]
        assert parts["size"] == mine["size"] and list(parts["index_steps"]) == mine["index_steps"] and torch.equal(parts["values"], mine["values"])


def test_steps_are_of_the_first_dimension() -> None:
    change = torch.zeros(2, 3)
    change[1, 0], change[0, 2] = 5.0, 7.0
    found = _difference(change)
    assert (found["size"], found["index_steps"]) == (torch.Size([2, 3]), [1, 3]) and torch.equal(found["values"], torch.tensor([5.0, 7.0]))  # type: ignore[arg-type]


def test_a_head_without_the_base_is_left_out_and_said() -> None:
    module, report = read("task_sft", False)
    assert len(report.left_out) == 2 and all("weights=model.state_dict()" in text for text in report.left_out)
    assert not any(patch.tag == "head" for patch in module.method.patches)


def test_it_is_a_pickle() -> None:
    model = base()
    with pytest.raises(StoreError, match="allow_pickle=True"):
        read_sft(place("lang_sft"), sites=resolve(model), base=fingerprint(model))


@pytest.mark.parametrize(("value", "message"), [
    ({"diffs": {"bert.nothing": {}}}, "nothing in it"), ({"other": torch.ones(1)}, "does not have"),
    ({"diffs": {"elsewhere.weight": {"size": torch.Size([2]), "index_steps": [1], "values": torch.ones(1)}}}, "none of"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([5]), "index_steps": [1, 9], "values": torch.ones(2)}}}, "do not rise"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([5]), "index_steps": [1, 0], "values": torch.ones(2)}}}, "do not rise"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([6]), "index_steps": [1], "values": torch.ones(1)}}}, "has the size"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([5]), "index_steps": [1], "values": torch.ones(2)}}}, "1 indices"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([5]), "index_steps": [1]}}}, "belong together"),
    ({"diffs": {"classifier.bias": {"size": torch.Size([5]), "index_steps": [1], "values": torch.tensor([float("nan")])}}}, "NaN"),
])  # fmt: skip
def test_damaged_files(value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from intarsia.store.convert.pickle_child import flat

    def opened(path: Path, numpy: bool) -> dict[tuple[str, ...], Tensor]:
        found: dict[tuple[str, ...], Tensor] = {}
        flat(value, (), found)
        return found

    monkeypatch.setattr("intarsia.store.convert.sft.read_pickled", opened)
    (tmp_path / "pytorch_diff.bin").touch()
    model = base()
    with pytest.raises(ModuleError, match=message):
        read_sft(tmp_path, sites=resolve(model), base=fingerprint(model), weights=model.state_dict(), allow_pickle=True)


def test_two_changes_of_one_parameter_are_refused(tmp_path: Path) -> None:
    model, _ = zoo.make("bert")
    method = union("twice", build("lt_sft", density=0.1, at="attn.q.weight"), build("lt_sft", density=0.1, at="attn.q.weight"))
    with pytest.raises(ModuleError, match="two patches"):
        write_sft(Host(model).add("m", method).extract("m"), tmp_path / "out", sites=resolve(model))


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "ia3"])
def test_what_is_no_change_of_entries_is_refused(method: str, tmp_path: Path) -> None:
    model, _ = zoo.make("bert")
    with pytest.raises(ModuleError, match="single entries"):
        write_sft(Host(model).add("m", build(method)).extract("m"), tmp_path / "out", sites=resolve(model))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)
