"""Predictions and metrics of a module (or an expression) on a table: the loop behind `eval`, `predict` and the dev set.

With several processes each takes every n-th batch and all get all predictions; the batches are the same as with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from intarsia.errors import DataError
from intarsia.host import Host
from intarsia.train.batches import evaluation_batches, moved
from intarsia.train.frozen import evaluating
from intarsia.train.progress import Progress, Quiet
from intarsia.train.task import Features, Prediction, Rows, Task


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        predictions: one per row of the table.
        scores: metrics by name, each with `value`, `low`, `high`, `n`; empty without labels.
        loss: mean over all loss terms; None without labels.
    """

    predictions: list[Prediction]
    scores: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None


def predict(
    host: Host,
    expression: Any,
    task: Task,
    table: Rows,
    *,
    head: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Prediction]:
    """One prediction per row of a table, in row order."""
    features = _features(task, table)
    found, _ = run(host, expression, task, features, head=head, batch_size=batch_size, progress=progress, what="predict")
    return task.finish(found, table)


def evaluate(
    host: Host,
    expression: Any,
    task: Task,
    table: Rows,
    *,
    head: str | None = None,
    batch_size: int = 64,
    features: Sequence[Features] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predictions, metrics and mean loss on a table with labels.

    Args:
        features: of the table, if they are at hand.
    """
    features = _features(task, table) if features is None else features
    found, loss = run(
        host, expression, task, features, head=head, batch_size=batch_size, progress=progress, what="evaluate", with_loss=True
    )
    predictions = task.finish(found, table)
    return Evaluation(predictions, task.score(predictions, table), loss)


def _features(task: Task, table: Rows) -> Sequence[Features]:
    features = task.features(table)
    if not features:
        raise DataError(f"no examples: the table has {len(table)} rows, the task made none of them ({dict(task.counts)})")
    return features


def run(
    host: Host,
    expression: Any,
    task: Task,
    features: Sequence[Features],
    *,
    head: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "",
    with_loss: bool = False,
) -> tuple[list[Prediction], float | None]:
    """Predictions of all features, and the mean loss if asked for.  The model's mode is given back afterwards."""
    progress = progress or Quiet()
    device = host.model.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    found: list[tuple[int, list[Prediction]]] = []
    total, terms = 0.0, 0
    batches = -(-len(features) // batch_size)
    try:
        if what:
            progress.start(what, batches)
        with torch.no_grad(), evaluating(host.model), host.using(expression, head=head) as model:
            for number, batch in enumerate(evaluation_batches(task, features, batch_size)):
                if number % world != rank:
                    continue
                batch = moved(batch, device)
                outputs = model(**{key: batch[key] for key in task.keys if key in batch})
                found.append((number, task.predict(outputs, batch)))
                if with_loss:
                    loss, count = task.loss(outputs, batch)
                    total, terms = total + float(loss), terms + int(count)
                progress.update(number + 1)
    finally:
        progress.stop()
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (found, total, terms))
        found = sorted((pair for part in gathered for pair in part[0]), key=lambda pair: pair[0])
        total, terms = sum(part[1] for part in gathered), sum(part[2] for part in gathered)
    predictions = [prediction for _, part in found for prediction in part]
    return predictions, total / terms if with_loss and terms else None


def distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
