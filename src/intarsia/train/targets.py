"""`targets_only`: the base's language-model head computes the positions that the loss reads, and no others.

With a vocabulary of 50,000 to 250,000 the head costs as much as many blocks, and its logits are the largest tensor of a step.
A hidden position without a label gets no gradient; leaving it out changes neither loss nor gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from intarsia.train.task import Batch, Task

IGNORE = -100


@contextlib.contextmanager
def targets_only(model: nn.Module, task: Task, batch: Batch) -> Iterator[None]:
    """In this block the head of `model` gives logits [N, V] of the labelled positions, in their order, instead of [B, T, V].

    Nothing happens where the task brings its own head, names no targets (`wanted`), or the model has no head that is
    one product; a layer that is given another shape than the targets' runs as always.
    """
    ask = getattr(task, "wanted", None)
    layer = None if ask is None or task.head is not None else _product(model)
    if ask is None or layer is None:
        yield
        return
    chosen: Tensor = ask(batch) != IGNORE

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].shape[:-1] != chosen.shape:
            return None
        return (args[0][chosen], *args[1:])

    handle = layer.register_forward_pre_hook(pick, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _product(model: nn.Module) -> nn.Module | None:
    """The model's output embeddings, if they are a plain product."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if type(found) is nn.Linear else None
