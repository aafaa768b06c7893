"""Gradient checkpointing: equal gradients, also when the expression changes between forward and backward."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.host import kit

FAMILIES = ("bert", "llama-tied", "t5", "gpt2", "bart", "m2m_100")
METHODS = ("lora", "pfeiffer", "prefix", "prompt", "ln", "full", "ia3")


def gradients(family: str, method: str, how: str) -> torch.Tensor:
    model, inputs, host = kit.woven(family, method)
    kit.without_dropout(model)
    options = {} if family == "bert" else {"use_cache": False}
    if how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    with host.using("a"):
        loss = kit.answer(model(**inputs, **options)).pow(2).mean()
    if how == "switched":
        with host.using("b"):
            loss.backward()
    elif how == "thread":
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in host.parameters("a").values()])  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_equal(family: str, method: str) -> None:
    plain = gradients(family, method, "plain")
    for how in ("checkpointed", "switched", "thread", "reentrant"):
        assert torch.allclose(gradients(family, method, how), plain, atol=1e-6, rtol=1e-4), how


def test_resting_expression_changed_before_backward() -> None:
    model, inputs, host = kit.woven("bert", "lora")
    kit.without_dropout(model)
    model.gradient_checkpointing_enable()
    host.rest("a")
    loss = kit.answer(model(**inputs)).pow(2).mean()
    host.rest("b")
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in host.parameters("a").values()])  # type: ignore[union-attr]
    assert torch.allclose(got, gradients("bert", "lora", "plain"), atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in host.parameters("b").values())


def test_two_hosts_under_checkpointing() -> None:
    """Both hosts pin their own call; closing one leaves the other's in place."""
    from intarsia.host import Host

    model, inputs, host = kit.woven("bert", "lora")
    kit.without_dropout(model)
    second = Host(model)
    second.add("c", kit.small("ia3"))
    kit.disturb(second, "c")
    with host.using("a"), second.using("c"):
        loss = kit.answer(model(**inputs)).pow(2).mean()
    loss.backward()
    plain = {n: p.grad.clone() for n, p in second.parameters("c").items()}  # type: ignore[union-attr]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with host.using("a"), second.using("c"):
        loss = kit.answer(model(**inputs)).pow(2).mean()
    loss.backward()
    assert all(torch.allclose(p.grad, plain[n], atol=1e-6) for n, p in second.parameters("c").items())  # type: ignore[arg-type]
    host.close()
    with second.using("c"):
        kit.answer(model(**inputs)).pow(2).mean().backward()
    second.close()
    from intarsia.host.replay import Pinned

    assert not any(isinstance(getattr(m, "_gradient_checkpointing_func", None), Pinned) for m in model.modules())
