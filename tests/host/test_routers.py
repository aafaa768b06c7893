"""Laws of routers: one-hot is the member, equals average to themselves, rows are what they are alone, files are exact,
gradients reach what is trained, noise is for training, and weights equal a slow reference."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.compose import fuse
from intarsia.errors import CompositionError, SpecError
from intarsia.host import Host
from intarsia.host.call import Note
from intarsia.host.prototypes import routers, top_vector
from intarsia.methods import ROUTERS, build
from intarsia.methods.routing import L1, Balance, Entropy, IndianBuffet
from intarsia.modules import load, save
from intarsia.patches import Gate, Router, Table
from intarsia.patches.router import squashed
from tests import zoo
from tests.host.kit import answer, disturb, small

MEMBERS = ("a", "b", "c")
SETTINGS: dict[str, dict[str, Any]] = {"polytropon": {"tasks": ("x", "y")}, "basis": {"size": 3}}
CONTEXT: dict[str, dict[str, Any]] = {"polytropon": {"task": ["y", "x"]}, "basis": {"typology": [(1.0, 0.5, -1.0), (0.0, 2.0, 1.0)]}}
KINDS = tuple(ROUTERS)
PER_TOKEN = ("fusion", "experts", "gate", "phatgoose", "arrow")
few = settings(max_examples=10, deadline=None, derandomize=True)


def peopled(family: str = "bert", kind: str = "lora", dtype: torch.dtype = torch.float32) -> tuple[Host, dict[str, Tensor]]:
    """Members of one method away from their start."""
    model, inputs = zoo.make(family)
    host = Host(model.to(dtype))
    for seed, name in enumerate(MEMBERS):
        host.add(name, small(kind, family), seed=seed)
        disturb(host, name, seed)
    return host, inputs


@functools.cache
def woven(family: str = "bert", kind: str = "lora", routing: tuple[str, ...] = KINDS) -> tuple[Host, dict[str, Tensor]]:
    """Members of one method away from their start, and a router of every kind away from its start."""
    host, inputs = peopled(family, kind, torch.float64)
    for name in routing:
        host.router(name, name, MEMBERS, **SETTINGS.get(name, {}))
        disturb(host, name, 9, 0.5)
        for _, form in routers(host, name):
            for buffer in form.scorer.buffers():
                if buffer.is_floating_point() and name != "fixed":
                    buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(3)) + 0.1)
    for module in host.model.modules():
        module.double()
    return host, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def run(host: Host, inputs: dict[str, Tensor], expression: Any, **context: Any) -> Tensor:
    with host.using(expression, **context) as model, torch.no_grad():
        return answer(model(**inputs))


def equal(one: Tensor, other: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("space", ["out", "phi"])
@pytest.mark.parametrize(("family", "kind"), [("bert", "lora"), ("bert", "pfeiffer"), ("gpt2", "ia3"), ("bert", "bitfit"), pytest.param("t5", "dora", marks=pytest.mark.slow), pytest.param("llama", "oft", marks=pytest.mark.slow)])
def test_one_hot_is_the_member(family: str, kind: str, space: str) -> None:
    """For every port that a router weighs, parameters among them; by number and by key."""
    host, inputs = peopled(family, kind)
    host.router("one", "fixed", MEMBERS, weights=(0.0, 1.0, 0.0))
    host.router("key", "fixed", MEMBERS, keys=("swh", "yor", "kab"), context="language")
    want = run(host, inputs, "b")
    assert not torch.allclose(want, run(host, inputs, "a"))
    equal(run(host, inputs, f"fuse(a, b, c; router=one, space={space})"), want, 1e-5)
    keyed = f"fuse(a, b, c; router=key, space={space})"
    equal(run(host, inputs, keyed, language="yor"), want, 1e-5)
    rows = torch.cat([run(host, {k: v[i : i + 1] for k, v in inputs.items()}, m) for i, m in enumerate("cb")])
    equal(run(host, inputs, keyed, language=["kab", "yor"]), rows, 1e-4)
    with pytest.raises(CompositionError, match="knows no language='ewe'"):
        run(host, inputs, keyed, language="ewe")
    with pytest.raises(CompositionError, match="needs 'language' from the call"):
        run(host, inputs, keyed)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_they_are_alone(kind: str) -> None:
    """By context, and as one of several expressions."""
    host, inputs = woven()
    context = CONTEXT.get(kind, {})
    mix = str(fuse(*MEMBERS, router=kind))
    alone = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    own = [{k: v[i] for k, v in context.items()} for i in range(2)]
    want = torch.cat([run(host, row, mix, **c) for row, c in zip(alone, own)])
    equal(run(host, inputs, mix, **context), want)
    assert not torch.allclose(want, run(host, inputs, "base"), atol=1e-4)
    equal(run(host, inputs, ["a >> b", mix], **context), torch.cat([run(host, alone[0], "a >> b"), want[1:]]))


@pytest.mark.parametrize("kind", ["soup", "fixed", "polytropon", "basis", "gaussians"])
def test_rows_of_mixed_tensors_are_what_they_are_alone(kind: str) -> None:
    host, inputs = woven("bert", "pfeiffer")
    mix, context = str(fuse(*MEMBERS, router=kind, space="phi")), CONTEXT.get(kind, {})
    want = torch.cat([run(host, {k: v[i : i + 1] for k, v in inputs.items()}, mix, **{k: v[i] for k, v in context.items()}) for i in range(2)])
    equal(run(host, inputs, mix, **context), want)
    assert not torch.allclose(want, run(host, inputs, str(fuse(*MEMBERS, router=kind)), **context), atol=1e-5), "tensors are not changes where a module is not linear"


def test_rows_of_a_table_over_parameters() -> None:
    """A parameter is one for a whole forward: rows with other weights run as rows with other expressions do."""
    host, inputs = woven("bert", "bitfit", ("polytropon", "basis", "soup"))
    for kind in ("polytropon", "basis"):
        mix, context = str(fuse(*MEMBERS, router=kind)), CONTEXT[kind]
        want = torch.cat([run(host, {k: v[i : i + 1] for k, v in inputs.items()}, mix, **{k: v[i] for k, v in context.items()}) for i in range(2)])
        equal(run(host, inputs, mix, **context), want)
        assert not torch.allclose(want[1:], run(host, {k: v[1:] for k, v in inputs.items()}, mix, **{k: v[0] for k, v in context.items()}), atol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gate", "basis")])
def test_equal_members_are_the_member(kind: str) -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for name in MEMBERS:
        host.add(name, small("pfeiffer" if kind != "arrow" else "lora"), seed=3)
        disturb(host, name, 3)
    more = {"value": False} if kind == "fusion" else {"squash": "softmax"} if kind == "soup" else SETTINGS.get(kind, {})
    host.router("r", kind, MEMBERS, **more)
    if kind != "fixed":
        disturb(host, "r", 1)
    context = CONTEXT.get(kind, {})
    want = run(host, inputs, "a")
    equal(run(host, inputs, "fuse(a, b, c; router=r)", **context), want, 1e-5)
    if kind not in PER_TOKEN:
        equal(run(host, inputs, "fuse(a, b, c; router=r, space=phi)", **context), want, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_exact(kind: str, tmp_path: Path) -> None:
    host, inputs = woven()
    model, _ = zoo.make("bert")
    other = Host(model.double())
    for name in (*MEMBERS, kind):
        module = host.extract(name)
        save(module, tmp_path / f"{name}.safetensors")
        stored = load(tmp_path / f"{name}.safetensors")
        assert stored.digest == module.digest and stored.method == module.method
        other.insert(stored, force_base=True)
    for part in model.modules():
        part.double()
    mix, context = str(fuse(*MEMBERS, router=kind)), CONTEXT.get(kind, {})
    assert torch.equal(run(other, inputs, mix, **context), run(host, inputs, mix, **context))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("fixed", "arrow", "gaussians", "centroids")])
def test_gradients_reach_what_is_trained_and_nothing_else(kind: str) -> None:
    host, inputs = peopled()
    host.router("r", kind, MEMBERS, **SETTINGS.get(kind, {}))
    disturb(host, "r", 2)
    context = CONTEXT.get(kind, {})
    for trained in (("r",), ("r", "b"), ("b",)):
        host.trainable(*trained)
        for parameter in host.model.parameters():
            parameter.grad = None
        with host.using("fuse(a, b, c; router=r)", **context) as m:
            answer(m(**inputs)).square().sum().backward()
        own = {id(p) for name in trained for p in host.parameters(name).values()}
        for key, parameter in host.model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in own), key
        if kind not in ("gate", "phatgoose"):
            nonzero = [float(p.grad.abs().sum()) > 0 for name in trained for k, p in host.parameters(name).items() if not k.endswith("key_bias") and p.grad is not None]
            assert all(nonzero)


# -- weights -----------------------------------------------------------------------------------------------------------

scores = st.lists(st.lists(st.floats(-4, 4), min_size=4, max_size=4), min_size=1, max_size=3).map(torch.tensor)


def spec(**settings: Any) -> Router:
    return Router(("a", "b", "c", "d"), Table(), **settings)


@few
@given(scores, st.integers(1, 4))
def test_squashing(x: Tensor, top: int) -> None:
    soft = squashed(x, spec(), top, False)
    torch.testing.assert_close(soft.sum(-1), torch.ones(len(x)))
    assert ((soft > 0).sum(-1) <= top).all()
    kept = x.topk(top, -1).indices
    torch.testing.assert_close(soft.gather(-1, kept), x.gather(-1, kept).softmax(-1))
    z = x.sigmoid()
    torch.testing.assert_close(squashed(x, spec(squash="bernoulli"), None, False), z / z.sum(-1, keepdim=True))
    assert torch.equal(squashed(x, spec(squash="free"), None, True), x), "weights need not sum to one and mean what they say"
    assert torch.equal(squashed(x, spec(squash="clamp"), None, False), x.clamp(0, 1))


def test_noise_is_for_training() -> None:
    x = torch.zeros(20_000, 4) + torch.tensor([1.0, 0.0, 0.0, -1.0])
    for sampler, squash in (("gumbel", "softmax"), ("relaxed", "bernoulli")):
        torch.manual_seed(0)
        noisy = spec(sampler=sampler, squash=squash)
        assert torch.equal(squashed(x, noisy, None, False), squashed(x, spec(squash=squash), None, False))
        drawn = squashed(x, noisy, None, True)
        assert float(drawn.std(0).mean()) > 0.05
    torch.manual_seed(0)
    hard = squashed(x.requires_grad_(), spec(sampler="gumbel", hard=True), None, True)
    assert set(hard.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0} and (hard.sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(hard.mean(0), x[0].softmax(-1), atol=0.02, rtol=0)  # Gumbel-max draws from the softmax
    (gradient,) = torch.autograd.grad(hard[:, 0].sum(), x)
    assert float(gradient.abs().sum()) > 0, "straight-through"
    relaxed = torch.zeros(50_000, 1) + 0.7
    chance = (squashed(relaxed, Router(("a",), Table(), squash="sigmoid", sampler="relaxed"), None, True) > 0.5).float().mean()
    assert abs(float(chance) - 1 / (1 + 2.718281828**-0.7)) < 0.01, "logistic noise makes a Bernoulli of sigmoid(score)"


def test_penalties() -> None:
    even, one = torch.full((6, 4), 0.25), torch.eye(4)[torch.zeros(6, dtype=torch.long)]
    note = lambda w: [Note(None, None, w, (0, 1, 2, 3))]  # type: ignore[arg-type]  # noqa: E731
    assert float(Balance(1.0).routed(note(torch.eye(4)))) == pytest.approx(1.0)
    assert float(Balance(1.0).routed(note(one))) == pytest.approx(4.0)
    assert float(Entropy(1.0).routed(note(even))) == pytest.approx(1.3862944) and float(Entropy(1.0).routed(note(one))) == pytest.approx(0.0, abs=1e-6)
    assert float(L1(2.0).routed(note(torch.tensor([1.0, -1.0, 0.0, 0.0])))) == pytest.approx(1.0)
    assert L1().routed([]) is None


def test_indian_buffet() -> None:
    """Differences of the log prior on binary tables equal those of the closed form with factorials, alpha/S -> 0."""
    import math

    def closed(counts: list[int], keys: int) -> float:  # eq. 4 without what is the same for all tables with these columns
        return sum(math.log(math.factorial(keys - m)) + math.log(math.factorial(m - 1)) - math.log(math.factorial(keys)) for m in counts)

    prior = IndianBuffet(alpha=1e-6)
    first, second = torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 0, 1], [1, 0, 0]]), torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]])
    difference = float(prior.log_prior(first) - prior.log_prior(second))
    assert difference == pytest.approx(closed([4, 1, 2], 4) - closed([2, 1, 4], 4), abs=1e-4)
    third = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 1], [1, 0, 0]])
    assert float(prior.log_prior(first) - prior.log_prior(third)) == pytest.approx(closed([4, 1, 2], 4) - closed([4, 2, 2], 4), abs=1e-4)
    host, _ = woven()
    host.router("ibp", "polytropon", MEMBERS, tasks=("x", "y"), prior=1.0)
    term = host.penalty("ibp")
    assert term is not None and term.requires_grad
    host.remove("ibp")


def test_penalties_on_weights_reach_the_router() -> None:
    host, inputs = woven()
    host.router("g", "experts", MEMBERS, balance=1.0, entropy=0.5)
    disturb(host, "g", 4)
    host.model.double()
    with host.using("fuse(a, b, c; router=g)") as model:
        model(**inputs)
    term = host.penalty("g")
    assert term is not None
    gradients = torch.autograd.grad(term, list(host.parameters("g").values()))
    assert all(float(g.abs().sum()) > 0 for g in gradients)
    with torch.no_grad(), host.using("fuse(a, b, c; router=g)") as model:
        model(**inputs)
    host.remove("g")


def test_arrow_is_the_top_singular_vector() -> None:
    host, _ = woven()
    for name in MEMBERS:
        for site, (delta,) in host.deltas(name):
            found, whole = top_vector(host, name, site), delta.form.as_linear().weight
            want = torch.linalg.svd(whole).Vh[0].float()
            assert float((found @ want).abs()) == pytest.approx(1.0, abs=1e-5)


def test_top_in_the_expression_and_absent_members() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    host.add("a", build("lora", rank=2)).add("b", build("lora", rank=2), seed=1).add("c", small("pfeiffer"), seed=2)
    for seed, name in enumerate(MEMBERS):
        disturb(host, name, seed)
    host.router("r", "soup", MEMBERS, squash="softmax", start=0.0)
    equal(run(host, inputs, "fuse(a, b, c; router=r)"), run(host, inputs, "0.5*a + 0.5*b + c"), 1e-5)  # c alone at the FFN, a and b alone at q and v
    with torch.no_grad():
        for table in {id(p): p for p in host.parameters("r").values()}.values():
            table.copy_(torch.tensor([0.0, 1.0, -1.0]))
    equal(run(host, inputs, "fuse(a, b, c; router=r, top=1)"), run(host, inputs, "b + c"), 1e-5)


def test_refusals() -> None:
    host, _ = woven()
    for expression, sentence in (
        ("fuse(a, b, c; router=experts, space=phi)", "weighs each token"),
        ("phi(0.5*a + 0.5*(b >> c))", "no single module"),
    ):
        with pytest.raises(CompositionError, match=sentence):
            host.call(expression)
    bits, _ = woven("bert", "bitfit", ("soup",))
    with pytest.raises(SpecError, match="these scores look at activations"):
        bits.router("g", "experts", MEMBERS)
    for bad in ({"parts": ()}, {"parts": ("a", "a")}, {"parts": ("a", "b"), "top": 3}, {"parts": ("a",), "temperature": 0.0}):
        with pytest.raises(SpecError):
            Router(scorer=Gate(), **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["out", "phi"])
def test_constant_weights_fold(space: str) -> None:
    host, inputs = peopled()
    host.router("r", "soup", MEMBERS, squash="softmax").router("p", "polytropon", MEMBERS, tasks=("x", "y"))
    disturb(host, "r", 3)
    mix = f"fuse(a, b, c; router=r, space={space})"
    assert host.why_not_foldable(mix) is None
    with torch.no_grad():
        equal(answer(host.fold(mix)(**inputs)), run(host, inputs, mix), 1e-4)
    assert "weighed for each input" in str(host.why_not_foldable("fuse(a, b, c; router=p)"))
