"""The variants of TIES, and DARE, magnitude pruning and sums, against peft's own functions, and TIES against numbers that mergekit 0.1.5 gave."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.modules.arithmetic import add, scale, weighted_sum
from intarsia.modules.merging import dare, dense, magnitude, svd, ties
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import read_peft
from tests.host.kit import disturb
from tests.store import live

SITE = "0.attn.q.bias"


def vectors() -> tuple[Module, Module, Module]:
    """Three modules of 32 numbers each, all of different magnitude within a module."""
    model, _ = live.base("bert")
    host = Host(model).add("m", build("bitfit", at=SITE))
    module = host.extract("m")
    (key,) = module.tensors
    k = torch.arange(32)
    values = [(1 + (f * k) % m) / 8 * torch.where(odd, -1, 1) for f, m, odd in ((7, 37, k % 3 == 0), (11, 41, k % 2 == 0), (5, 43, k % 5 < 2))]
    return tuple(Module(name, module.method, {key: value}, module.base) for name, value in zip("abc", values))  # type: ignore[return-value]


def numbers(module: Module) -> Tensor:
    (value,) = dense(module).tensors.values()
    return value


#: elect, density, weights, result
MERGEKIT: list[tuple[str, float, tuple[float, ...], list[float]]] = [
    ("mass", 0.41, (1.0, 1.0, 1.0), [0.0, 0.0, 0.0, 4.25, 3.625, 4.5, -3.5625, 4.5625, 5.125, -3.375, 4.25, 5.0, 0.0, 0.0, 3.3125, -4.0625, -4.75, 4.1875,
                                     -4.375, 2.875, 3.75, -4.625, -4.75, 3.75, 4.375, 3.625, -5.125, 0.0, 0.0, 4.125, -3.25, 4.125]),
    ("mass", 0.71, (0.5, -0.25, 2.0), [0.0, 0.0, 6.625, 2.0, 2.825, -3.98214, -3.875, 3.925, 4.6, -9.0, 12.125, -2.57143, 2.25, 2.75, 4.25, -4.1, -4.75, 5.375,
                                       -4.375, 2.875, -1.875, -3.625, 4.25, 3.35, 5.33929, -6.25, 13.875, 0.0, -2.75, 2.175, -2.85, -4.10714]),
    ("count", 0.71, (1.0, 1.0), [0.0, 0.0, 1.875, 4.25, 3.625, 3.1875, -3.25, 3.125, 2.5, 2.25, 4.25, 5.0, 0.0, 2.4375, 3.125, -4.0, -1.625, 3.0, -3.1875, 2.875,
                                 3.75, 3.375, -4.75, 1.75, -2.5, 3.625, 4.375, 0.0, -2.75, 3.25, -3.25, 2.9375]),
    ("mass", 0.01, (1.0, 2.0), [0.0] * 21 + [-4.625] + [0.0] * 4 + [-5.125] + [0.0] * 5),
]  # fmt: skip


@pytest.mark.parametrize(("elect", "density", "weights", "want"), MERGEKIT)
def test_ties_is_mergekits(elect: Any, density: float, weights: tuple[float, ...], want: list[float]) -> None:
    """Numbers of mergekit's own merge of these vectors; the third has elections that nobody wins."""
    found = ties(vectors()[: len(weights)], density, weights=weights, variant="mergekit", elect=elect)
    torch.testing.assert_close(numbers(found), torch.tensor(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize(("density", "weights"), [(0.41, (1.0, 1.0, 1.0)), (0.71, (0.5, -0.25, 2.0)), (0.3, (1.0, 1.0)), (0.01, (1.0, 2.0)), (1.0, (1.0, 1.0))])
def test_ties_is_pefts(elect: Any, density: float, weights: tuple[float, ...]) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is an extra of the tests")
    modules = vectors()[: len(weights)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = {"mass": "total", "count": "frequency"}[elect]
        want = merge_utils.ties([numbers(m) for m in modules], torch.tensor(weights), density, method)
    torch.testing.assert_close(numbers(ties(modules, density, weights=weights, variant="peft", elect=elect)), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_is_pefts_with_the_same_draw(drop: float) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is an extra of the tests")
    a, b, _ = vectors()
    ours = [dare(m, drop, seed=5) for m in (a, b)]
    draws = iter([(numbers(m) != 0).float() for m in ours])
    with mock.patch("torch.bernoulli", lambda _: next(draws)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = merge_utils.dare_linear([numbers(a), numbers(b)], torch.tensor([0.7, -0.2]), 1 - drop)
    torch.testing.assert_close(numbers(add(scale(ours[0], 0.7, name="x"), scale(ours[1], -0.2, name="y"))), want, atol=1e-6, rtol=1e-6)


def adapters(folder: Any) -> tuple[Any, list[Module]]:
    """A model of peft with two LoRAs, and the same as modules."""
    import peft

    model, _ = live.base("llama")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **settings), adapter_name="a")
        wrapped.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=4, **settings))
        wrapped.save_pretrained(str(folder))
    plain, _ = live.base("llama")
    return wrapped, [read_peft(folder / name, sites=resolve(plain), base=fingerprint(plain))[0] for name in "ab"]


def changed(wrapped: Any, name: str) -> Sequence[Tensor]:
    layers = [m for _, m in wrapped.named_modules() if hasattr(m, "get_delta_weight") and name in getattr(m, "lora_A", {})]
    return [layer.get_delta_weight(name).detach() for layer in layers]


def placed(module: Module) -> Sequence[Tensor]:
    found = dense(module).tensors
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("how", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_weighted_adapters_of_peft(how: str, tmp_path: Any) -> None:
    """`add_weighted_adapter` on whole changes; on factors (`linear`, `ties` ...) it mixes A with A and B with B, which is no sum of changes."""
    pytest.importorskip("peft", reason="peft is an extra of the tests")
    wrapped, (a, b) = adapters(tmp_path)
    weights = [0.7, 0.4]
    rank = {} if how == "cat" else {"svd_rank": 16}
    wrapped.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=how, density=None if how in ("cat", "svd") else 0.5, **rank)
    if how == "ties_svd":
        ours = svd(ties([a, b], 0.5, weights=weights, variant="peft"), 16)[0]
    elif how == "magnitude_prune_svd":
        kept = [magnitude(m, 0.5, scope="tensor") for m in (a, b)]
        ours = svd(add(*(scale(m, w, name=f"{m.name}-s") for m, w in zip(kept, weights))), 16)[0]
    else:
        ours = weighted_sum([a, b], weights)
    for mine, theirs in zip(placed(ours), changed(wrapped, "sum"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_factors_mixed_apart_are_no_sum(tmp_path: Any) -> None:
    """What peft's default `linear` does, for those who compare."""
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    wrapped, _ = adapters(tmp_path)
    wrapped.add_adapter("c", peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.add_weighted_adapter(["a", "c"], [0.5, 0.5], "mixed", combination_type="linear")
    exact = [0.5 * x + 0.5 * y for x, y in zip(changed(wrapped, "a"), changed(wrapped, "c"))]
    assert not all(torch.allclose(x, y, atol=1e-3) for x, y in zip(exact, changed(wrapped, "mixed")))


def test_the_paper_leaves_undecided_entries_out() -> None:
    """Where two entries of opposite sign cancel, both peers take the positive one."""
    model, _ = live.base("bert")
    host = Host(model).add("m", build("bitfit", at=SITE))
    disturb(host, "m", 1, 0.5)
    a = host.extract("m")
    b = Module("n", a.method, {key: -t for key, t in a.tensors.items()}, a.base)
    assert not numbers(ties([a, b], 1.0)).any()
    for variant in ("peft", "mergekit"):
        torch.testing.assert_close(numbers(ties([a, b], 1.0, variant=variant)), numbers(a).abs())  # type: ignore[arg-type]
