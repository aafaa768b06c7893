"""Low-rank, subspace and orthogonal methods on models: what files hold, equalities between methods, training rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import SpecError
from intarsia.host import Host
from intarsia.methods import Group, build
from intarsia.methods.budget import Orthonormal, RankBudget, cores, kept, smoothed, triplets
from intarsia.methods.method import side
from intarsia.modules import load, save
from intarsia.patches import Affine, LowRank
from intarsia.train.rates import optimiser_groups
from intarsia.train.recipe import Recipe
from tests import zoo
from tests.host import kit

FEW = ("bert", "llama")


def laid(family: str, method: str, **settings: Any) -> tuple[Host, dict[str, Tensor]]:
    """A model with module `a`, away from its start."""
    model, inputs = zoo.make(family)
    host = Host(model).add("a", build(method, **{**kit.SMALL.get(method, {}), **settings}))
    kit.disturb(host, "a")
    return host, inputs


def answers(host: Host, inputs: dict[str, Tensor], text: str = "a") -> Tensor:
    with host.using(text):
        return kit.run(host.model, inputs)


@pytest.mark.parametrize("method", ["lora_fa", "miss", "vera", "fourierft", "intrinsic", "said", "svft", "lora_xs"])
def test_frozen_parts_are_not_in_the_file(method: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    host, inputs = laid("bert", method)
    module = host.extract("a")
    assert module.n_parameters == host.count(host.method("a")), "every stored number is trained"
    save(module, tmp_path / "a.safetensors")
    other = Host(zoo.make("bert")[0]).insert(load(tmp_path / "a.safetensors"))
    assert torch.equal(answers(other, inputs), answers(host, inputs))


def test_random_patterns_are_not_in_the_file_and_aligned_ones_are() -> None:
    for pattern, stored in (("random", False), ("aligned", True)):
        host, _ = laid("bert", "svft", pattern=pattern)
        module = host.extract("a")
        assert any(k.endswith("index") for k in module.tensors) is stored
        assert module.n_parameters == host.count(host.method("a"))


def test_seeds_make_other_modules() -> None:
    first, again, other = (answers(*laid("bert", "lora_fa", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-4)


def test_rslora_is_lora_with_another_alpha() -> None:
    (host, inputs), (other, _) = laid("bert", "rslora", rank=4, alpha=3.0), laid("bert", "lora", rank=4, alpha=6.0)
    assert torch.equal(answers(host, inputs), answers(other, inputs))


def test_miss_is_lora_with_tiled_identities() -> None:
    host, inputs = laid("bert", "miss", rank=4)
    other = Host(zoo.make("bert")[0]).add("a", build("lora", rank=4, alpha=4.0))
    given = host.tensors("a")
    with torch.no_grad():
        for key, value in other.tensors("a").items():
            value.copy_(given[key.replace("/lora.", "/shards.")] if key.endswith("up") else torch.eye(4).repeat(1, value.shape[1] // 4))
    assert torch.allclose(answers(other, inputs), answers(host, inputs), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_pissa_leaves_the_base_and_keeps_a_plain_product(family: str) -> None:
    host, inputs = laid(family, "pissa")
    expected = answers(host, inputs)
    plain = host.extract("a", flatten=True)
    form = next(p.form for p in plain.method.patches)
    assert isinstance(form, Affine) and form.factor == LowRank(8)
    clean = Host(zoo.make(family)[0])
    assert kit.same_state(kit.state(host.close()), kit.state(zoo.make(family)[0]))
    clean.insert(plain)
    assert torch.allclose(answers(clean, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_hira_multiplies_the_weight(family: str) -> None:
    host, _ = laid(family, "hira")
    folded = host.fold("a")
    site = host.sites["0.attn.q"]
    w0, w = (m.get_submodule(site.path).weight for m in (host.model, folded))
    tensors = host.tensors("a")
    product = tensors["0.attn.q.weight/hira.factor.up"] @ tensors["0.attn.q.weight/hira.factor.down"]
    assert torch.allclose(w, w0 * (1 + product), atol=1e-6)


@pytest.mark.parametrize("method", ["oft", "boft", "hra"])
def test_rotations_keep_the_geometry_of_the_rows(method: str) -> None:
    host, _ = laid("llama", method, **({"gain": False} if method == "boft" else {}))
    folded = host.fold("a")
    for name in ("0.attn.q", "1.attn.v"):
        w0, w = (m.get_submodule(host.sites[name].path).weight for m in (host.model, folded))
        assert torch.allclose(w @ w.T, w0 @ w0.T, atol=1e-5) and not torch.allclose(w, w0, atol=1e-2)


def test_vera_shares_its_pair_over_the_model() -> None:
    host, _ = laid("llama", "vera")
    frames = {id(d.form.factor.frame) for _, deltas in host.deltas("a") for d in deltas}
    assert len(frames) == 1
    assert {tuple(d.form.factor.shape) for _, deltas in host.deltas("a") for d in deltas} == {(32, 32), (16, 32)}


@pytest.mark.parametrize(("start", "exact"), [("unit", False), ("zeros", True)])
def test_what_does_not_start_at_the_base_says_so(start: str, exact: bool) -> None:
    """FourierFT and C3A start at random as released; both start at the base on request.  SVFT the other way round."""
    other = {"unit": "glorot"}.get(start, start)
    gated = {"start": "zeros"} if exact else {"start": "kaiming", "gate": True}
    for method, settings in (("fourierft", {"start": start}), ("c3a", {"start": other}), ("svft", gated)):
        model, inputs = zoo.make("bert")
        host = Host(model).add("a", build(method, **{**kit.SMALL[method], **settings}))
        assert torch.equal(answers(host, inputs), answers(host, inputs, "base")) is exact, method


@pytest.mark.parametrize("projection", ["fastfood", "sparse", "dense"])
def test_intrinsic_gradient_is_the_projection_of_the_full_one(projection: str) -> None:
    """d loss / d theta = P^T (d loss / d parameters), with P read off by unit vectors."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("full", build("full")).add("a", build("intrinsic", dimension=7, projection=projection))
    grads = {}
    for name in ("full", "a"):
        with host.using(name):
            kit.answer(model(**inputs)).pow(2).mean().backward()
        grads[name] = {k: p.grad for k, p in host.parameters(name).items()}
    (theta,) = host.parameters("a").values()
    forms = {site.name: d.form for site, deltas in host.deltas("a") for d in deltas}
    expected = torch.zeros(7)
    with torch.no_grad():
        for i in range(7):
            theta.copy_(torch.eye(7)[i])
            expected[i] = sum((forms[k.split("/")[0]].constant() * g).sum() for k, g in grads["full"].items())
    assert torch.allclose(next(iter(grads["a"].values())), expected, atol=1e-4 * float(expected.abs().max()))


def test_lora_plus_rates() -> None:
    host, _ = laid("bert", "lora_plus", ratio=20.0)
    found = optimiser_groups(host, "a", Recipe(learning_rate=1e-3))
    by_rate = {round(g["lr"], 6): {id(p) for p in g["params"]} for g in found}
    assert set(by_rate) == {1e-3, 2e-2}
    named = host.parameters("a")
    assert by_rate[2e-2] == {id(p) for n, p in named.items() if n.endswith(".up")}
    assert by_rate[1e-3] == {id(p) for n, p in named.items() if n.endswith(".down")}
    plain, _ = laid("bert", "lora")
    assert list(plain.tagged("a")) == [""], "without such a group nothing is split"


@pytest.mark.parametrize(
    ("name", "dimensions", "expected"),
    [
        ("0.attn.q/lora.factor.down", 2, "in"),
        ("0.attn.q/lora.factor.up", 2, "out"),
        ("0.ffn/adapter.down.value", 2, "in"),
        ("0.ffn/adapter.down_bias", 1, "out"),
        ("0.ffn/adapter.down.bias", 1, "out"),
        ("0.ffn.up/lora.factor.down", 2, "in"),
        ("0.ffn.down/core.factor.core.value", 2, ""),
    ],
)
def test_sides(name: str, dimensions: int, expected: str) -> None:
    assert side(name, dimensions) == expected
    assert Group(":out", 16.0).decay is None


# -- AdaLoRA -------------------------------------------------------------------------------------------------------------


def test_orthogonality_penalty() -> None:
    host, _ = laid("bert", "adalora", orthogonality=0.5)
    expected = []
    for _, core in cores(host.forms("a")):
        p, q, eye = core.frame.up, core.frame.down, torch.eye(4)
        expected += [(p.T @ p - eye).norm(), (q @ q.T - eye).norm()]
    penalty = host.penalty("a")
    assert penalty is not None and len(expected) == 2 * 12 and torch.allclose(penalty, 0.5 * torch.stack(expected).mean())
    penalty.backward()
    touched = {k.rsplit(".", 1)[1] for k, p in host.parameters("a").items() if p.grad is not None}
    assert touched == {"up", "down"}
    assert laid("bert", "lora")[0].penalty("a") is None
    with torch.no_grad():
        for _, core in cores(host.forms("a")):
            for value in (core.frame.up, core.frame.down):
                value.zero_().fill_diagonal_(1.0)
    assert Orthonormal().loss(list(host.forms("a").values())) == 0


def test_importance_on_a_toy() -> None:
    """The released formulas by hand: EMA of |w g|, EMA of its distance from that mean, their product per triplet."""
    w, g = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    s1, u1 = smoothed(torch.zeros(2), torch.zeros(2), w, g, 0.5, 0.25)
    assert torch.allclose(s1, torch.tensor([0.25, 0.25])) and torch.allclose(u1, torch.tensor([0.1875, 0.1875]))
    s2, u2 = smoothed(s1, u1, w, 2 * g, 0.5, 0.25)
    assert torch.allclose(s2, torch.tensor([0.625, 0.625])) and torch.allclose(u2, 0.25 * u1 + 0.75 * 0.375)
    score = triplets(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[3.0], [5.0]]))
    assert score.tolist() == [1 + 2 + 3, 2 + 0 + 5]


def test_best_triplets_with_ties() -> None:
    scores = {"a": torch.tensor([1.0, 3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    assert {k: v.tolist() for k, v in kept(scores, 3).items()} == {"a": [True, True, False], "b": [False, True]}
    assert sum(int(m.sum()) for m in kept(scores, 0).values()) == 0
    assert sum(int(m.sum()) for m in kept(scores, 99).values()) == 5


def test_budget_schedule() -> None:
    rule = RankBudget(8, warmup=0.1, final=0.2, every=10)
    budgets = [rule.at(step, 100, 120, 80) for step in range(1, 101)]
    assert all(b == (120, False) for b in budgets[:10])
    assert budgets[44] == (int(80 + 40 * (1 - 35 / 70) ** 3), False) and budgets[49][1]
    assert all(b == (80, True) for b in budgets[80:]), "in the last phase the choice is made at every step"
    assert [b for b, _ in budgets] == sorted((b for b, _ in budgets), reverse=True)
    with pytest.raises(SpecError, match="below 1"):
        RankBudget(8, 0.5, 0.5)


def test_budget_is_exact_and_reversible() -> None:
    """After training rank x matrices lambdas are left, exactly as many as the budget says; P and Q stay."""
    host, inputs = laid("bert", "adalora", rank=4, target=2, warmup=0.2, final=0.3, every=2, at="attn.{q,v}")
    (rule,) = host.method("a").policy.steps
    parameters = list(host.parameters("a").values())
    optimiser = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1)
    memory: dict[str, Tensor] = {}
    left = []
    for step in range(1, 21):
        with host.using("a"):
            kit.answer(host.model(**inputs)).pow(2).mean().backward()
        optimiser.step()
        rule.after_step(step, 20, host.forms("a"), memory)
        optimiser.zero_grad()
        left.append(sum(int(core.core.value.count_nonzero()) for _, core in cores(host.forms("a"))))
    assert left[:4] == [16] * 4 and left[-6:] == [8] * 6, left
    assert all(core.frame.up.all(0).all() for _, core in cores(host.forms("a"))), "only lambda is zeroed"
    assert set(memory) == {f"{n}.{leaf}" for n, _ in cores(host.forms("a")) for leaf in ("core", "up", "down")}
    flat = host.extract("a", flatten=True)
    assert all(t.shape[1] == 4 for k, t in flat.tensors.items() if k.endswith("up"))
