"""Merging by entries: against a plain rewriting of the papers' formulas on dense matrices, and by laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.modules.arithmetic import average
from intarsia.modules.merging import dare, dense, magnitude, svd, ties
from tests import zoo
from tests.host.kit import disturb, run
from tests.modules.test_arithmetic import pair, same, says


def changes(module: Module) -> dict[str, Tensor]:
    """Dense changes by site, computed from the module's tensors alone."""
    return {k.split("/")[0]: t for k, t in dense(module).tensors.items()}


@pytest.mark.parametrize("method", ["lora", "adalora", "lokr", "loha", "gralora", "full", "ln", "bitfit", "ia3", "hira"])
def test_multiplied_out_it_is_the_same(method: str) -> None:
    host, inputs, a, _ = pair("bert", method)
    same(host, inputs, dense(a), "a")
    same(host, inputs, magnitude(a, 1.0), "a")
    same(host, inputs, dare(a, 0.0), "a")
    same(host, inputs, magnitude(a, 0.0), None, 1e-6)


def test_ties_is_the_papers() -> None:
    _, _, a, b = pair("bert", "lora")
    c = Module("c", a.method, {k: t.flip(0) for k, t in a.tensors.items()}, a.base)
    found = changes(ties([a, b, c], 0.3, weight=0.7))
    vectors = [torch.cat([x[k].flatten() for k in sorted(x)]) for x in map(changes, (a, b, c))]
    kept = []
    for vector in vectors:
        limit = vector.abs().sort(descending=True).values[round(0.3 * len(vector)) - 1]
        kept.append(torch.where(vector.abs() >= limit, vector, 0.0))
    want = []
    for entries in zip(*(v.tolist() for v in kept)):
        sign = (sum(entries) > 0) - (sum(entries) < 0)
        agreeing = [e for e in entries if e * sign > 0]
        want.append(0.7 * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    torch.testing.assert_close(torch.cat([found[k].flatten() for k in sorted(found)]), torch.tensor(want), atol=1e-6, rtol=1e-5)


def test_ties_of_one_thing_is_the_thing_trimmed() -> None:
    host, inputs, a, _ = pair("bert", "lora")
    host.insert(magnitude(a, 0.4), name="trimmed")
    same(host, inputs, ties([a, a], 0.4), "trimmed", 1e-6)


def test_exactly_so_many_entries_stay_and_equals_by_place() -> None:
    _, _, a, _ = pair("bert", "lora")
    total = sum(t.numel() for t in changes(a).values())
    for keep in (0.1, 0.333, 0.9):
        assert sum(int((t != 0).sum()) for t in changes(magnitude(a, keep)).values()) == round(keep * total)
        each = changes(magnitude(a, keep, scope="tensor"))
        assert all(int((t != 0).sum()) == round(keep * t.numel()) for t in each.values())
    even = Module("even", a.method, {k: torch.ones_like(t) for k, t in a.tensors.items()}, a.base)
    one, other = magnitude(even, 0.37), magnitude(even, 0.37)
    assert one == other and sum(int((t != 0).sum()) for t in changes(one).values()) == round(0.37 * total)


def test_dare_keeps_the_mean_and_repeats() -> None:
    _, _, a, _ = pair("bert", "full")
    one = dare(a, 0.75, seed=3)
    assert one == dare(a, 0.75, seed=3) and one != dare(a, 0.75, seed=4)
    before, after = changes(a), changes(one)
    kept = torch.cat([(after[k] != 0).flatten() for k in before])
    assert abs(float(kept.float().mean()) - 0.25) < 0.01
    for key, value in before.items():
        assert torch.allclose(after[key], torch.where(after[key] != 0, value * 4, 0.0))


def test_svd_is_the_nearest_and_says_how_near() -> None:
    host, inputs, a, b = pair("llama", "lora")
    summed = average([a, b])
    exact, residual = svd(summed, 8)
    assert residual == 0.0
    same(host, inputs, exact, "0.5*a + 0.5*b")
    small, residual = svd(summed, 3)
    assert {t.shape[1] for k, t in small.tensors.items() if k.endswith("up")} == {3}
    full, near = changes(summed), changes(small)
    lost = sum(float((full[k] - near[k]).square().sum()) for k in full)
    assert residual == pytest.approx((lost / sum(float(t.square().sum()) for t in full.values())) ** 0.5, rel=1e-4)
    for key, value in full.items():
        values = torch.linalg.svdvals(value)
        assert float((value - near[key]).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4, abs=1e-6)


def test_svd_of_a_factor_that_is_no_product() -> None:
    host, inputs, a, _ = pair("bert", "lokr")
    result, residual = svd(a, 32)
    assert residual < 1e-6
    same(host, inputs, result, "a")
    assert 0 < svd(a, 1)[1] < 1


def test_refusals() -> None:
    _, _, a, b = pair("bert", "fourierft")
    with pytest.raises(ModuleError, match=r"seed and the layer's shape"):
        ties([a, b])
    _, _, a, b = pair("bert", "lora")
    with pytest.raises(UsageError, match="two or more"):
        ties([a])
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="share"):
            magnitude(a, wrong)
    with pytest.raises(UsageError, match="below 1"):
        dare(a, 1.0)
    with pytest.raises(UsageError, match="rank"):
        svd(a, 0)
    with pytest.raises(UsageError, match="scope"):
        magnitude(a, 0.5, scope="layer")  # type: ignore[arg-type]


def test_sites_of_one_module_only_are_merged_alone() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", build("lora", rank=2, at="attn.q")).add("b", build("lora", rank=2, at="attn.v"))
    for seed, name in enumerate("ab"):
        disturb(host, name, seed)
    result = ties([host.extract("a"), host.extract("b")], 1.0)
    same(host, inputs, result, "a + b")
    assert not torch.allclose(run(model, inputs), says(host, inputs, "a + b"), atol=1e-5)
