"""Laws of the algebra on whole models, in float64: random expressions over modules of several methods.

Nil, the monoid of sequences, and what mixtures promise (one-hot, equals, order, nesting).  The slow references use no
composition: rows run one at a time, changes of weights added by hand to a copy of the base, and outputs of single modules
recombined where the site is the last of the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.compose import Expr, Mix, Ref, Seq, average
from intarsia.host import Host
from intarsia.methods import build
from tests import zoo
from tests.host.kit import disturb, small

FAMILIES = ("bert", "gpt2")
KINDS = ("lora", "pfeiffer", "ia3", "bitfit", "houlsby")
LINEAR = ("lora", "bitfit", "lora2")

weights = st.floats(-1.5, 1.5).map(lambda w: round(w, 3))
few = settings(max_examples=12, deadline=None, derandomize=True)


def over(names: tuple[str, ...], leaves: int = 5) -> st.SearchStrategy[Expr]:
    """Expressions of at most so many modules."""
    return st.recursive(
        st.sampled_from([*map(Ref, names), Seq(())]),
        lambda x: st.one_of(
            st.tuples(x, x).map(Seq),
            st.tuples(x, weights).map(lambda p: Mix((p[0],), (p[1],))),
            st.tuples(x, x, weights, weights).map(lambda p: Mix(p[:2], p[2:])),
        ),
        max_leaves=leaves,
    )


exprs = over(KINDS)
family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def woven(family: str) -> tuple[Host, Mapping[str, Tensor]]:
    """A tiny model in float64 with a module of each kind away from its start, and two that touch its last layer only."""
    model, inputs = zoo.make(family)
    host = Host(model.double())
    methods = {name: small(name, family) for name in KINDS}
    methods |= {"lora2": build("lora", rank=2), "top": build("lora", rank=2, at="head"), "top2": build("lora", rank=3, at="head")}
    for seed, (name, method) in enumerate(methods.items()):
        host.add(name, method)
        for parameter in host.parameters(name).values():
            parameter.data = parameter.data.double()
        disturb(host, name, seed)
    return host, inputs


def run(family: str, e: Expr | list[Expr], rows: slice = slice(None)) -> Tensor:
    host, inputs = woven(family)
    with host.using(e) as model, torch.no_grad():
        return model(**{k: v[rows] for k, v in inputs.items()}).logits


def equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * max(1.0, float(other.abs().max())))


@family
def test_every_module_does_something(family: str) -> None:
    """Otherwise the laws below would say nothing."""
    host, _ = woven(family)
    for name in host.names:
        assert not torch.allclose(run(family, Ref(name)), run(family, Seq(())), atol=1e-3), name
    assert not torch.allclose(run(family, Ref("lora") >> Ref("pfeiffer") >> Ref("ia3")), run(family, Ref("ia3") >> Ref("pfeiffer") >> Ref("lora")), atol=1e-3)


@family
@few
@given(e=exprs)
def test_nil(family: str, e: Expr) -> None:
    want = run(family, e)
    equal(run(family, Seq((Seq(()), e))), want)
    equal(run(family, Seq((e, Seq(())))), want)
    equal(run(family, Mix((e,), (0.0,))), run(family, Seq(())))


@family
@few
@given(a=over(KINDS, 2), b=over(KINDS, 2), c=over(KINDS, 2))
def test_sequences_are_a_monoid(family: str, a: Expr, b: Expr, c: Expr) -> None:
    want = run(family, Seq((a, b, c)))
    equal(run(family, Seq((Seq((a, b)), c))), want)
    equal(run(family, Seq((a, Seq((b, c))))), want)
    equal(run(family, a >> b >> c), want)


@family
@few
@given(a=over(KINDS, 3), b=over(KINDS, 3), v=weights, w=weights)
def test_mixtures(family: str, a: Expr, b: Expr, v: float, w: float) -> None:
    alone = run(family, a)
    equal(run(family, Mix((a, b), (1.0, 0.0))), alone)
    equal(run(family, average(a, a, a)), alone)
    equal(run(family, Mix((a, a), (v, 1.0 - v))), alone)
    equal(run(family, Mix((b, a), (w, v))), run(family, Mix((a, b), (v, w))))
    flat = Mix((a, b, a), (v * w, v * v, w))
    equal(run(family, Mix((Mix((a, b), (w, v)), a), (v, w))), run(family, flat))


@family
@few
@given(es=st.lists(exprs, min_size=2, max_size=2))
@example(es=[Ref("pfeiffer"), Ref("bitfit")])  # one recomputes the norm that the other's bias shift changes
@example(es=[Seq((Ref("bitfit"), Ref("pfeiffer"))), Ref("bitfit")])
def test_rows_are_what_they_are_alone(family: str, es: list[Expr]) -> None:
    _, inputs = woven(family)
    size = len(inputs["input_ids"])
    each = [es[i % 2] for i in range(size)]
    want = torch.cat([run(family, e, slice(i, i + 1)) for i, e in enumerate(each)])
    equal(run(family, each), want)


def coefficients(e: Expr, factor: float = 1.0) -> dict[str, float]:
    """How much of each module is in an expression whose modules only add: sequences add, mixtures weigh."""
    if isinstance(e, Ref):
        return {e.name: factor}
    total: dict[str, float] = {}
    shares = e.weights if isinstance(e, Mix) else (1.0,) * len(e.children())
    for part, share in zip(e.children(), shares, strict=True):
        for name, value in coefficients(part, factor * share).items():
            total[name] = total.get(name, 0.0) + value
    return total


@functools.cache
def changes(family: str, name: str) -> dict[str, Tensor]:
    """What one module adds to the parameters of the base."""
    host, _ = woven(family)
    folded = host.fold(name).state_dict()
    return {key: folded[key] - value.detach() for key, value in plain(family).named_parameters()}


@functools.cache
def plain(family: str) -> torch.nn.Module:
    """The base without a host."""
    return zoo.make(family)[0].double()


@family
@few
@given(e=over(LINEAR))
def test_modules_that_only_add_are_sums_of_weights(family: str, e: Expr) -> None:
    model = copy.deepcopy(plain(family))
    with torch.no_grad():
        for name, much in coefficients(e).items():
            for key, change in changes(family, name).items():
                model.state_dict()[key].add_(change, alpha=much)
        want = model(**woven(family)[1]).logits
    # folded weights are made in float32
    torch.testing.assert_close(run(family, e), want, rtol=1e-3, atol=1e-4 * max(1.0, float(want.abs().max())))


@family
@few
@given(v=weights, w=weights)
def test_at_the_last_site_a_mixture_is_the_mixture_of_outputs(family: str, v: float, w: float) -> None:
    one, two = Ref("top"), Ref("top2")
    base = run(family, Seq(()))
    equal(run(family, Mix((one, two), (v, w))), base + v * (run(family, one) - base) + w * (run(family, two) - base))
    equal(run(family, Mix((one, two), (v, 1 - v))), v * run(family, one) + (1 - v) * run(family, two))


def test_the_reference_counts() -> None:
    a, b = Ref("a"), Ref("b")
    assert coefficients(Seq((a, Mix((Seq((a, b)), b), (0.5, -2.0))))) == {"a": 1.5, "b": -1.5}
