"""A module on a base it was not made for: refused for every field of the fingerprint; and tensors whose names do not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from intarsia.errors import ModuleError
from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.sites.fingerprint import COMPARED
from tests import zoo
from tests.host.kit import small

OTHER: dict[str, Any] = {
    "architecture": "roberta", "layers": (7,), "width": 4096, "vocabulary": 12, "quantisation": '{"load_in_4bit":true}',
    "shapes": "00" * 16, "weights": "11" * 16, "tokenizer": "22" * 16,
}  # fmt: skip


def host_and_module(method: str = "lora") -> tuple[Host, Module]:
    host = Host(zoo.make("bert")[0]).add("a", small(method))
    module = host.extract("a")
    return host.remove("a"), module


@pytest.mark.parametrize("field", COMPARED)
def test_every_field_of_another_base_is_named(field: str) -> None:
    host, module = host_and_module()
    known = {"tokenizer": "33" * 16} if field == "tokenizer" else {}  # compared only where both are known
    host._fingerprint = replace(host.fingerprint, **known)
    wrong = loads(dumps(replace(module, base=replace(host.fingerprint, **{field: OTHER[field]}))))
    with pytest.raises(ModuleError, match=rf"another base: {field}: .*--force-base") as caught:
        host.insert(wrong)
    assert str(OTHER[field])[:8] in str(caught.value)
    assert host.names == ()
    assert host.insert(wrong, force_base=True).names == ("a",)


def test_the_fields_are_all_tried_here() -> None:
    assert set(OTHER) == set(COMPARED)


@pytest.mark.parametrize(("build", "field"), [({"seed": 1}, "weights"), ({"num_hidden_layers": 3}, "layers"), ({"num_hidden_layers": 1}, "layers"), ({"vocab_size": 98}, "vocabulary")])
def test_real_other_bases(build: dict[str, Any], field: str) -> None:
    """Other weights, a layer more, a layer less, a word more."""
    _, module = host_and_module()
    with pytest.raises(ModuleError, match=f"another base: {field}"):
        Host(zoo.make("bert", **build)[0]).insert(module)


def mismatched(module: Module, what: str) -> tuple[dict[str, torch.Tensor], str]:
    tensors = dict(module.tensors)
    keys = sorted(tensors)
    if what == "missing":
        return {k: t for k, t in tensors.items() if k != keys[0]}, f"1 missing.*{re.escape(keys[0])}"
    if what == "extra":
        return {**tensors, "1.ffn.up/lora.down": torch.zeros(4, 32)}, r"1 unexpected.*1\.ffn\.up"
    if what == "prefixed":
        return {f"model.{k}": t for k, t in tensors.items()}, rf"{len(keys)} missing.*{len(keys)} unexpected.*model\."
    if what == "shape":
        return {**tensors, keys[0]: torch.zeros(9, 9)}, f"1 of another shape.*{re.escape(keys[0])}"
    return {k: t for i, (k, t) in enumerate(sorted(tensors.items())) if i % 2}, f"{(len(keys) + 1) // 2} missing"


@pytest.mark.parametrize("what", ["missing", "extra", "prefixed", "shape", "half"])
@pytest.mark.parametrize("method", ["lora", "pfeiffer", "ia3", "full", "prefix"])
def test_names_that_do_not_fit_are_counted_and_named(method: str, what: str) -> None:
    host, module = host_and_module(method)
    if method == "prefix" and what == "half" and len(module.tensors) < 2:
        pytest.skip("one tensor has no half")
    tensors, message = mismatched(module, what)
    broken = loads(dumps(replace(module, tensors=tensors)))
    with pytest.raises(ModuleError, match=message):
        host.insert(broken)
    assert host.names == ()
    assert host.insert(module).names == ("a",), "a refused module leaves no trace"
