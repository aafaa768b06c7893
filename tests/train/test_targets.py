"""The head computes labelled positions only: same loss, same gradients, a smaller largest tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.host import Host
from intarsia.methods import build
from intarsia.tasks.common import IGNORE, token_losses
from intarsia.train.targets import targets_only
from tests import zoo


class Toy:
    """A task whose targets are in the batch."""

    head = None

    def __init__(self, targets: Tensor) -> None:
        self.positions = targets

    def wanted(self, batch: Any) -> Tensor:
        return self.positions


def gradients(model: Any, batch: dict[str, Tensor], host: Host, run: Callable[[], Any], targets: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[int, ...]]:
    for p in host.parameters("m").values():
        p.grad = None
    with host.using("m"), run():
        logits = model(**batch).logits
    losses, _ = token_losses(logits, targets)
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in host.parameters("m").items()}, tuple(logits.shape)


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "gemma2", "t5", "bart", "modernbert"])
def test_same_loss_and_gradients(family: str, method: str) -> None:
    model, batch = zoo.make(family)
    host = Host(model)
    host.add("m", build(method))
    torch.manual_seed(0)
    for p in host.parameters("m").values():
        p.data.add_(torch.randn_like(p) * 0.1)
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    targets = torch.where(torch.rand(ids.shape) < 0.4, ids, IGNORE)
    targets[0, 0] = int(ids[0, 0])

    whole = gradients(model, batch, host, contextlib.nullcontext, targets)
    part = gradients(model, batch, host, lambda: targets_only(model, Toy(targets), batch), targets)  # type: ignore[arg-type]
    assert whole[2][:2] == tuple(ids.shape) and part[2][0] == int((targets != IGNORE).sum()) and len(part[2]) == 2
    torch.testing.assert_close(part[0], whole[0], atol=1e-5, rtol=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(part[1][name], gradient, atol=1e-5, rtol=1e-4)
    with host.using("m"), torch.no_grad():
        assert model(**batch).logits.shape[:2] == ids.shape  # outside the block all is as before
    host.close()


def test_a_task_with_a_head_of_its_own_is_left_alone() -> None:
    model, batch = zoo.make("bert")
    toy = Toy(batch["input_ids"])
    toy.head = object()  # type: ignore[assignment]
    with targets_only(model, toy, batch), torch.no_grad():  # type: ignore[arg-type]
        assert model(**batch).logits.dim() == 3
