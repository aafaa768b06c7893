"""Invertible adapters (MAD-X): the inverse is exact, stands in front of the output embedding, and last in is first out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import CompositionError, SpecError
from intarsia.host import Host
from intarsia.methods import Method, Patch, build
from intarsia.patches import Add, Coupling, Head, LanguageModelHead
from intarsia.patches.coupling import CouplingForm
from intarsia.patches.place import Place
from intarsia.sites.address import Site
from tests import zoo
from tests.host.kit import disturb, run

INVERTIBLE = Method("invertible", (Patch("invertible", "stem", Coupling(), port="in"),))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(0, 9), st.sampled_from(["relu", "tanh", "gelu"]), st.sampled_from([1.0, 2.0, 3.7]))
def test_the_inverse_takes_back_what_the_forward_did(width: int, seed: int, activation: str, reduction: float) -> None:
    place = Place(Site("stem", "", "in", width), width, width, torch.Generator().manual_seed(seed))
    form = Coupling(reduction, activation, init="unit").build(place)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    form.couple.double()
    y = x + form(x, None)  # type: ignore[arg-type]
    torch.testing.assert_close(y + form.undo(y), x, atol=1e-10, rtol=1e-10)
    assert not torch.equal(y, x)


def coupling(host: Host, name: str) -> CouplingForm:
    form = next(form for form in host.forms(name).values() if isinstance(form, CouplingForm))
    return form


def seen_by_head(host: Host, expression: str | None, inputs: dict[str, Tensor], **context: Any) -> tuple[Tensor, Tensor]:
    """What goes into the output embedding, and what came there before anything undid it."""
    head = host.model.get_submodule(host.sites["head"].path)
    found: list[Tensor] = []
    first = head.register_forward_pre_hook(lambda m, args: found.append(args[0]), prepend=True)
    last = head.register_forward_hook(lambda m, args, out: found.append(args[0]))
    try:
        with host.using(expression, **context):
            run(host.model, inputs)
    finally:
        first.remove()
        last.remove()
    return found[1], found[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_families(family: str) -> None:
    """What meets the output embedding is undone, last in first out; rows with modules of their own are as alone."""
    model, inputs = zoo.make(family)
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, INVERTIBLE, seed=seed)
        disturb(host, name, seed)
    after, before = seen_by_head(host, "a >> b", inputs)
    b, a = coupling(host, "b"), coupling(host, "a")
    between = before + b.undo(before)
    torch.testing.assert_close(after, between + a.undo(between))
    assert torch.equal(*seen_by_head(host, "a >> b", inputs, forward_only=True))
    with host.using(["a", "a >> b"]):
        rows = run(model, inputs)
    for row, expression in enumerate(["a", "a >> b"]):
        with host.using(expression):
            torch.testing.assert_close(rows[row], run(model, inputs)[row], atol=1e-5, rtol=1e-5)


def test_a_head_of_ours_is_undone_too() -> None:
    """A base without an LM head gives with ours what the base with its own gives."""
    model, inputs = zoo.make("bert")
    bare, _ = zoo.make("bert", headless=True)
    bare.load_state_dict({k.removeprefix("bert."): v for k, v in model.state_dict().items() if k.startswith("bert.")}, strict=False)  # no pooler
    host, other = Host(model), Host(bare)
    other.add("lm", build("head").with_head(LanguageModelHead()))
    theirs = model.cls.predictions
    named = {"dense": theirs.transform.dense.weight, "dense_bias": theirs.transform.dense.bias, "norm": theirs.transform.LayerNorm.weight,
             "norm_bias": theirs.transform.LayerNorm.bias, "bias": theirs.bias}  # fmt: skip
    with torch.no_grad():
        for leaf, value in named.items():
            other.parameters("lm")[f"logits/head.{leaf}"].copy_(value)
    for h in (host, other):
        h.add("a", INVERTIBLE).add("b", INVERTIBLE, seed=1)
        disturb(h, "a")
        disturb(h, "b", 1)
    for expression in ("a", "a >> b"):
        with host.using(expression), other.using(f"{expression} >> lm"):
            torch.testing.assert_close(run(bare, inputs), run(model, inputs), atol=2e-5, rtol=1e-5)
    with pytest.raises(CompositionError, match="forward_only"):
        other.call("0.5*a + 0.5*b >> lm")


def test_mixtures_are_refused_where_an_inverse_is_needed() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", INVERTIBLE).add("b", build("madx", reduction=4)).add("task", build("pfeiffer", reduction=4))
    host.add("topic", build("pfeiffer", reduction=4).with_head(Head(("x", "y"))))
    for refused in ("0.5*a + 0.5*b", "a - b", "0.5*a", "(a + b) >> task", "(a >> b) + b"):
        with pytest.raises(CompositionError, match="forward_only=True"):
            host.call(refused)
    for legal in ("a >> b", "a + task", "a + 0.5*task", "(0.5*task + a) >> b", "(0.5*a + 0.5*b) >> topic"):
        host.call(legal)
    with host.using("0.5*a + 0.5*b", forward_only=True):
        run(model, inputs)
    disturb(host, "a")
    disturb(host, "task", 2)
    after, before = seen_by_head(host, "a + 0.5*task", inputs)
    torch.testing.assert_close(after, before + coupling(host, "a").undo(before))


def test_where_it_cannot_stand() -> None:
    model, _ = zoo.make("bert")
    for patch in (Patch("x", "embed", Coupling()), Patch("x", "0.ffn", Coupling()), Patch("x", "stem", Coupling(), Add(0.5), port="in")):
        with pytest.raises(SpecError, match="invertible"):
            Host(model).add("m", Method("m", (patch,)))
    albert, _ = zoo.make("albert")
    with pytest.raises(SpecError, match="the output embedding of this model reads"):
        Host(albert).add("m", Method("m", (Patch("x", "stem", Coupling()),)))
