"""Centre and scale of the features that a new head reads, measured once on training data before the first step.

A new head is one whose centre is zero and whose scale is one; a head that has been trained keeps what it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.host import Host
from intarsia.patches.heads import Standardised
from intarsia.train.batches import evaluation_batches, moved
from intarsia.train.frozen import evaluating
from intarsia.train.order import steps
from intarsia.train.task import Features, Task, context_of


def new_heads(host: Host, name: str) -> list[Standardised]:
    """The heads of a module that standardise their features and have not measured them yet."""
    forms = [delta.form for _, deltas in host.deltas(name) for delta in deltas]
    heads = [form for form in forms if isinstance(form, Standardised) and form.spec.standardise]
    return [head for head in heads if not head.mean.any() and bool((head.scale == 1).all())]


def calibrate(
    host: Host,
    name: str,
    task: Task,
    features: Sequence[Features],
    *,
    expression: Any,
    rows: int = 512,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Let the new heads of a module measure their features.

    Args:
        expression: what runs while training.
        rows: examples to look at, drawn with `seed`.

    Returns:
        Number of heads that were calibrated.
    """
    heads = new_heads(host, name)
    if not heads:
        return 0
    chosen = steps([0] * len(features), min(rows, len(features)), seed, -1, grouped=False)[0]
    seen: dict[int, list[Tensor]] = {id(head): [] for head in heads}

    def collect(head: Any, args: tuple[Any, Any]) -> None:
        found = head.features(args[1].input, args[1].mask)
        if head.spec.pooling == "token":
            mask = args[1].mask
            found = found.flatten(0, 1) if mask is None else found[mask.bool()]
        seen[id(head)].append(found.detach().float().cpu())

    hooks = [head.register_forward_pre_hook(collect) for head in heads]
    device = host.model.device
    try:
        with torch.no_grad(), evaluating(host.model):
            for batch in evaluation_batches(task, [features[i] for i in chosen], batch_size):
                with host.using(expression, head=name, **context_of(task, batch)) as model:
                    model(**{key: moved(batch[key], device) for key in task.keys if key in batch})
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for head in heads:
            values = torch.cat(seen[id(head)])
            head.calibrate(values.to(head.mean.device, head.mean.dtype))
    return len(heads)
