"""Faults that other libraries had in saving, loading, merging and arithmetic, as laws over all methods; `docs/faults.md` maps them.

What is not here: that a stored module gives the same outputs to the bit on another copy of the base and under another name,
and that a folded copy equals the active module (`tests/host/test_laws.py`, over all methods and families).
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import ModuleError, UsageError
from intarsia.host import Host
from intarsia.methods import METHODS, build
from intarsia.modules import Module, arithmetic, dumps, informed, load, loads, merging, save
from intarsia.modules.arithmetic import average, scale, weighted_sum
from intarsia.modules.module import identity, tensor_sha256
from intarsia.patches import Head
from tests import zoo
from tests.host.kit import disturb, run, same_state, small, state
from tests.modules.test_arithmetic import ADDITIVE, pair, same, says
from tests.modules.test_derived_cards import OF_ONE, OF_TWO, public, two
from tests.network import forbid

EVERY = [method for method in METHODS if method != "head"]


@lru_cache
def made(method: str) -> Module:
    host = Host(zoo.make("bert")[0]).add("a", small(method, "bert"))
    disturb(host, "a")
    return host.extract("a")


def unchanged(module: Module) -> bool:
    return identity(module, {key: tensor_sha256(t) for key, t in module.tensors.items()}) == module.digest


@pytest.mark.parametrize("method", EVERY)
def test_a_file_with_anything_missing_added_or_emptied_is_refused_and_leaves_no_trace(method: str) -> None:
    """peft and adapters load such files in silence, or with a warning; here every tensor is accounted for, by name."""
    module = made(method)
    model, _ = zoo.make("bert")
    before, host = state(model), Host(model)
    key = max(module.tensors, key=lambda k: (module.tensors[k].is_floating_point(), module.tensors[k].numel()))
    stray = key.rpartition(".")[0] + ".stray"
    for tensors, words in (
        ({k: t for k, t in module.tensors.items() if k != key}, "1 missing"),
        ({**module.tensors, stray: torch.zeros(2)}, "1 unexpected"),
        ({**module.tensors, key: module.tensors[key].new_zeros(0)}, "another shape|as many values|values of shape"),
    ):
        with pytest.raises(ModuleError, match=words) as caught:
            host.insert(loads(dumps(replace(module, tensors=tensors))))
        assert key.partition("/")[0] in str(caught.value)
    assert host.names == ()
    host.insert(module)
    assert unchanged(module), "putting a module on a model does not touch it"
    host.close()
    assert same_state(before, state(model)), "nor the base"


@pytest.mark.parametrize("method", ADDITIVE)
def test_operands_and_base_stay_as_they_are(method: str) -> None:
    """peft's weighted combination of PiSSA adapters changes the base and the adapter it reads."""
    host, inputs, a, b = pair("bert", method)
    base = {k: t.clone() for k, t in host.model.state_dict().items()}
    quiet = says(host, inputs, None)
    for result in (weighted_sum([a, b], [0.5, -2.0]), average([a, a, a]), scale(a, 3.0), average([a], [1.0])):
        for tensor in result.tensors.values():  # no result shares memory that writing to it would change an operand by
            if tensor.is_floating_point():
                tensor.add_(1.0)
    assert all(torch.equal(t, base[k]) for k, t in host.model.state_dict().items()) and torch.equal(says(host, inputs, None), quiet)
    assert unchanged(a) and unchanged(b)


@pytest.mark.parametrize("method", ADDITIVE)
def test_combining_a_module_with_itself_is_the_module(method: str) -> None:
    """peft: the identity combination of rsLoRA is too large by the root of the rank; adapters: an average divides twice."""
    host, inputs, a, _ = pair("bert", method)
    for result in (average([a], [1.0]), average([a, a, a]), average([a, a], [0.9, 0.1]), weighted_sum([a, a], [0.25, 0.75])):
        same(host, inputs, result, "a", 1e-6)
    same(host, inputs, weighted_sum([a], [2.0]), "2*a")  # weights are never normalised unless asked to (`average`)


def test_weights_and_names_are_checked_by_every_function_that_takes_them() -> None:
    """peft zips fewer weights than adapters, and gives nothing for a name that exists."""
    a, b = two()
    rooms = {"arithmetic": arithmetic, "merging": merging, "informed": informed}
    weighted, named = set(), set()
    for path in public():
        room, _, name = path.partition(".")
        function = getattr(rooms[room], name)
        given = inspect.signature(function).parameters
        if "weights" in given:
            weighted.add(name)
            rest: dict[str, Any] = {"variant": "peft"} if name == "ties" else {}
            more = ([{}, {}],) if room == "informed" else ()
            for weights in ([1.0], [1.0, 1.0, 1.0], []):
                with pytest.raises(UsageError, match=f"2 modules and {len(weights)} weights"):
                    function([a, b], *more, weights=weights, **rest)
            with pytest.raises(UsageError, match="finite"):
                function([a, b], *more, weights=[1.0, float("inf")], **rest)
        if "name" in given and name not in ("assemble", "from_changes"):
            named.add(path)
            call = {**OF_ONE, **OF_TWO}[path]
            with pytest.raises(UsageError, match="cannot be called 'a'"):
                _with_name(call, path, "a")
    assert weighted == {"average", "weighted_sum", "ties", "fisher", "regmean"} and len(named) == len(public()) - 2


def _with_name(call: Any, path: str, name: str) -> None:
    """The call of a public function with `name=`, whatever else it is given there."""
    room, _, function = path.partition(".")
    module = {"arithmetic": arithmetic, "merging": merging, "informed": informed}[room]
    plain = getattr(module, function)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, lambda *words, **settings: plain(*words, **{**settings, "name": name}))
        call_again = call if call.__name__ == "<lambda>" else getattr(module, function)
        call_again(*two())


def test_saving_loading_and_merging_open_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft asks the hub for the size of the vocabulary when it saves."""
    forbid(monkeypatch)
    for method in ("lora", "full", "lt_sft"):
        module = made(method)
        save(module, tmp_path / method)
        again = load(tmp_path / method)
        save(average([again, scale(again, 2.0)]), tmp_path / "merged")
        Host(zoo.make("bert")[0]).insert(load(tmp_path / "merged"))


@pytest.mark.parametrize("method", ["lora", "ia3", "full", "prefix", "pfeiffer", "vera", "compacter", "lt_sft"])
def test_a_new_head_is_always_stored(method: str, tmp_path: Path) -> None:
    """peft loses a fresh classifier without `task_type`; adapters drops what layers share."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", small(method, "bert").with_head(Head(("x", "y"), dropout=0.0)))
    disturb(host, "a")
    save(host.extract("a"), tmp_path / "a")
    other, _ = zoo.make("bert")
    guest = Host(other).insert(load(tmp_path / "a"), name="b")
    with host.using("a"), guest.using("b"):
        want, got = run(model, inputs), run(other, inputs)
    assert want.shape[-1] == 2 and torch.equal(want, got) and load(tmp_path / "a").labels == ("x", "y")
    headless = {k: t for k, t in host.extract("a").tensors.items() if ".weight" not in k or not k.startswith("head")}
    if len(headless) < len(host.extract("a").tensors):
        with pytest.raises(ModuleError, match="missing"):
            Host(zoo.make("bert")[0]).insert(replace(host.extract("a"), tensors=headless))


def test_a_multiplier_of_zero_destroys_nothing() -> None:
    """peft merges (IA)^3 by dividing again: a zero cannot be taken back. Here a fold is a copy, and arithmetic is on v - 1."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", build("ia3"))
    for tensor in host.tensors("a").values():
        tensor.detach().zero_()
    before, module = {k: t.clone() for k, t in model.state_dict().items()}, host.extract("a")
    host.fold("a")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    same(host, inputs, average([module, module]), "a", 1e-6)
    same(host, inputs, arithmetic.subtract(module, module), None, 1e-6)
    same(host, inputs, arithmetic.add(scale(module, 0.5), scale(module, 0.5)), "a", 1e-5)


def test_values_that_overflow_when_rounded_are_refused(tmp_path: Path) -> None:
    """Rounding to fewer bits can make an infinity; nothing is written then, in any of the forms."""
    for value, kinds in ((1e300, ("fp32", "bf16", "int8")), (3.4e38, ("bf16",)), (float("nan"), (None, "fp32", "bf16", "int8"))):
        dtype = torch.float64 if value > 1e38 else torch.float32
        tensor = torch.full((4, 8), value, dtype=dtype if value > 3.5e38 or value != value else torch.float32)
        module = replace(made("lora"), tensors={"0.attn.q/lora.factor.up": tensor})
        for kind in kinds:
            with pytest.raises(ModuleError, match="NaN or infinite"):
                save(module, tmp_path / "m", dtype=kind)  # type: ignore[arg-type]
            assert not list(tmp_path.iterdir())


def test_functions_take_modules_and_no_model() -> None:
    """mergekit needs the base in the folder to merge LoRA adapters."""
    for path in public():
        room, _, name = path.partition(".")
        function = getattr({"arithmetic": arithmetic, "merging": merging, "informed": informed}[room], name)
        assert not {"host", "model", "base"} & set(inspect.signature(function).parameters), name


def test_mixed_types_are_added_in_single_precision_or_better() -> None:
    """A bf16, an fp32 and an fp64 module: nothing is rounded to the least of them."""
    host, inputs, a, b = pair("bert", "lora")
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    several = [replace(m, name=f"m{i}", tensors={k: t.to(d) for k, t in m.tensors.items()}) for i, (m, d) in enumerate(zip((a, b, a), dtypes))]
    for module in several:
        host.insert(module)
    result = weighted_sum(several, [0.5, -1.0, 2.0])
    same(host, inputs, result, "0.5*m0 + -1*m1 + 2*m2", 1e-4)
    assert {t.dtype for t in result.tensors.values()} <= {torch.float32, torch.float64}
