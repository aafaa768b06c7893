"""Every trained tensor learns (T8), penalties have the gradients that finite differences give, fresh modules and stored bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from intarsia.errors import SiteError
from intarsia.host import Host
from intarsia.methods import METHODS, build
from intarsia.methods.program import Distance
from tests import zoo
from tests.host import kit

#: softmax shifts all scores of a query alike, so the keys' bias has no gradient; a T5 decoder's prompt is one token, its last
WITHOUT = ("attn.k.bias", "attn.k/shift", "decoder.0/edit.units.first", "decoder.1/edit.units.first")


QUICK = ("lora", "dora", "vera", "adalora", "svft", "ia3", "parallel", "unipelt", "loreft", "lst", "boft", "fish", "s2ft", "lottery", "perfect")


@pytest.mark.parametrize(
    ("family", "names"),
    [("bert", QUICK), *(pytest.param(family, tuple(METHODS), marks=pytest.mark.slow) for family in ("bert", "gpt2", "llama", "t5"))],
    ids=lambda v: v if isinstance(v, str) else len(v),
)
def test_t8_every_trained_tensor_has_a_gradient_by_the_second_step(family: str, names: tuple[str, ...]) -> None:
    """At the first step the other factor is zero for some; at the second every tensor learns, from the loss or the method's penalty."""
    for name in names:
        model, inputs = zoo.make(family)
        host = Host(model)
        try:
            host.add("m", kit.small(name, family))
        except SiteError:
            continue
        parameters = host.parameters("m")
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
        learnt: set[str] = set()
        torch.manual_seed(0)
        target = torch.randn_like(kit.reference(family)) if name not in kit.TOKENS and name != "head" else None
        for _ in range(2):
            optimiser.zero_grad()
            for form in host.forms("m").values():
                form.train()
            with host.using("m"):
                answer = kit.answer(model(**inputs)).float()
            goal = torch.linspace(-1, 1, answer.numel()).view(answer.shape) if target is None else target
            loss, penalty = (answer - goal).pow(2).mean(), host.penalty("m")
            (loss if penalty is None else loss + penalty).backward()
            learnt |= {key for key, p in parameters.items() if p.grad is not None and bool(p.grad.abs().max() > 0)}
            optimiser.step()
        idle = [key for key in parameters if key not in learnt and not any(word in key for word in WITHOUT)]
        assert not idle, f"{name}: {idle[:5]}"


PENALTIES: list[tuple[str, dict[str, Any]]] = [("adalora", {}), ("diff_pruning", {"l0": 1.0}), ("diff_pruning", {"l0": 1.0, "official": True}), ("lt_sft", {"l1": 0.1})]


@pytest.mark.parametrize(("name", "settings"), PENALTIES, ids=str)
def test_penalties_have_the_gradients_of_finite_differences(name: str, settings: dict[str, Any]) -> None:
    """In double precision, for every tensor that a penalty reads; the others it leaves alone."""
    model, _ = zoo.make("bert")
    host = Host(model).add("m", build(name, **{**kit.SMALL.get(name, {}), **settings}))
    kit.disturb(host, "m", size=0.5)
    parts: list[nn.Module] = [form.double() for key, form in host.forms("m").items() if key.startswith("1.attn")]
    (penalty,) = host.method("m").policy.penalties
    parameters = [p for part in parts for p in part.parameters()]
    loss = penalty.loss(parts)
    assert loss is not None and loss.dtype == torch.float64
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    draw = torch.Generator().manual_seed(0)
    read = 0
    for parameter, gradient in zip(parameters, found):
        flat = parameter.data.view(-1)
        for index in torch.randperm(len(flat), generator=draw)[:2].tolist():
            kept, step = float(flat[index]), 1e-5
            values = []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                again = penalty.loss(parts)
                assert again is not None
                values.append(float(again.detach()))
            flat[index] = kept
            expected = (values[0] - values[1]) / (2 * step)
            mine = 0.0 if gradient is None else float(gradient.view(-1)[index])
            assert mine == pytest.approx(expected, rel=1e-3, abs=1e-9)
            read += abs(expected) > 1e-9
    assert read > 4


def test_the_distance_is_the_mean_of_absolute_changes() -> None:
    model, _ = zoo.make("bert")
    host = Host(model).add("m", build("lt_sft", density=0.1))
    kit.disturb(host, "m")
    values = torch.cat([p.flatten() for p in host.parameters("m").values()])
    loss = Distance(0.3).loss(list(host.forms("m").values()))
    assert loss is not None and float(loss.detach()) == pytest.approx(0.3 * float(values.abs().mean().detach()), rel=1e-5)


SEEDED = ("vera", "lora_fa", "svft", "fourierft", "intrinsic", "said", "lora_xs", "miss")


@pytest.mark.parametrize("name", SEEDED)
def test_what_a_seed_gives_is_not_stored(name: str) -> None:
    """T6, T11: the file holds what is trained and no more (its aligned patterns apart), and another seed gives another module."""
    model, _ = zoo.make("bert")
    host = Host(model).add("m", kit.small(name, "bert"))
    trained = sum(p.numel() for p in host.parameters("m").values())
    stored = sum(t.numel() for t in host.extract("m").tensors.values())
    assert stored == trained
