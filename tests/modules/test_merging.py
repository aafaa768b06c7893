"""Merging by entries: against a plain rewriting of the papers' formulas on dense matrices, and by laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.modules.arithmetic import add, average, scale
from intarsia.modules.merging import aligned, dare, dense, from_changes, magnitude, sparse_union, svd, ties
from intarsia.modules.terms import kind_of, scattered
from intarsia.patches import Dense
from intarsia.patches.matrix import canonical_shape
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


# --- chosen entries and columns -----------------------------------------------------------------------------------------


def whole(host: Host, module: Module) -> Module:
    """The same changes as whole tensors."""
    values = {}
    for place, (term, value) in aligned([module])[0].items():
        if kind_of(term.factor) is not None:
            shape = canonical_shape(host.sites[term.site])
            values[place] = (replace(term, factor=Dense()), scattered(term.factor, {**term.tensors, "values": value}, shape))
        else:
            values[place] = (term, value)
    made = from_changes([module], values, None, None, "whole")
    return replace(module, method=made.method, tensors=made.tensors)


MERGES: dict[str, Callable[[Module, Module], Module]] = {
    "ties": lambda a, b: ties([a, b], 1.0), "count": lambda a, b: ties([a, b], 1.0, elect="count"), "union": lambda a, b: sparse_union([a, b]),
    "mergekit": lambda a, b: ties([a, b], 1.0, weights=[1.0, 2.0], variant="mergekit"), "dare": lambda a, b: add(dare(a, 0.5, seed=1), b),
    "average": lambda a, b: average([a, b], [1, 3]), "none": lambda a, b: add(magnitude(a, 0.0), b),
}  # fmt: skip


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("method", ["lt_sft", "spiel", "rosa", "s2ft"])
def test_entries_are_merged_as_the_whole_tensors_they_stand_for(method: str, merge: str) -> None:
    """And stay entries: nothing of the result is as large as a weight, unless one of the modules is."""
    if (method, merge) == ("s2ft", "dare"):
        pytest.skip("columns are drawn as they are stored: where they lie in the tensor does not follow from the module")
    host, _, a, b = pair("bert", method)
    found, want = MERGES[merge](a, b), MERGES[merge](whole(host, a), whole(host, b))
    left, right = aligned([whole(host, found), want])
    assert left.keys() == right.keys()
    for place, (_, value) in left.items():
        torch.testing.assert_close(value, right[place][1], atol=1e-7, rtol=1e-6)
    if method != "rosa":  # there a low-rank change of the same matrices stands beside them
        assert found.n_parameters <= a.n_parameters + b.n_parameters and {key.rpartition(".")[2] for key in found.tensors} == {"index", "values"}


def test_a_share_of_chosen_entries_is_one_of_those() -> None:
    _, _, a, _ = pair("bert", "lt_sft")
    for keep in (0.25, 0.5):
        assert magnitude(a, keep).n_parameters == round(keep * a.n_parameters)
    host, inputs, a, _ = pair("bert", "shira")
    nothing = magnitude(a, 0.0)
    assert nothing.n_parameters == 0
    same(host, inputs, nothing, None, 1e-7)


def test_a_change_beside_a_layer_and_one_of_its_weight_vote_together() -> None:
    """LoRA's change of a matrix and full fine-tuning's are changes of one matrix: one election, one mean."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", build("lora", rank=2, at="attn.q")).add("b", build("full")).add("c", build("lt_sft", density=0.3))
    for seed, name in enumerate("abc"):
        disturb(host, name, seed)
    a, b, c = (host.extract(name) for name in "abc")
    here, there, chosen = aligned([a, b, c])
    place = ("0.attn.q.weight", "matrix")
    low, full, entries = here[place][1], there[place][1], chosen[place][1]
    assert low.shape == full.shape == entries.shape and not any(site == "0.attn.q" for site, _ in here)
    for elect in ("mass", "count"):
        found = changes(ties([a, b], 1.0, elect=elect))[place[0]]  # type: ignore[arg-type]
        clash, mass = low.sign() != full.sign(), torch.where(low.abs() > full.abs(), low, full)
        want = torch.where(clash, mass if elect == "mass" else torch.zeros_like(mass), (low + full) / 2)
        torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-6)
    three = changes(sparse_union([a, b, c]))[place[0]]
    torch.testing.assert_close(three, (low + full + entries) / (2.0 + (entries != 0)), atol=1e-7, rtol=1e-6)
    same(host, inputs, add(a, b, c), "a + b + c")


def test_svd_takes_full_fine_tuning_down_to_a_rank() -> None:
    """The way to a LoRA of a fine-tuned model: exact at full rank, with the residual below it; vectors stay."""
    host, inputs, a, _ = pair("bert", "full")
    exact, residual = svd(a, 10**6)
    assert residual == 0.0 and exact.method.patches == a.method.patches
    near, residual = svd(a, 4)
    assert 0 < residual < 1 and near.nbytes < a.nbytes / 2
    full, small = aligned([a, near])
    lost = sum(float((full[place][1] - small[place][1]).double().square().sum()) for place in full)
    size = sum(float(value.double().square().sum()) for _, value in full.values())
    assert residual == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    host.insert(near, name="near")
    same(host, inputs, scale(near, 2.0), "2*near")
    assert {t.shape[1] for k, t in near.tensors.items() if k.endswith("factor.up")} == {4}
    assert torch.linalg.matrix_rank(small["0.attn.q.weight", "matrix"][1]) == 4
