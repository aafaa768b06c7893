"""The evaluation inside a training: dev set, one expression, features made once, work shared by all processes.

Each process takes every n-th batch and all get all predictions; the batches are the same as with one process, so the metric
is too.  What users call on tables is in `intarsia.tasks.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from intarsia.host import Host
from intarsia.train.batches import evaluation_batches, moved
from intarsia.train.frozen import evaluating
from intarsia.train.task import Batch, Features, Prediction, Rows, Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        predictions: one per row of the table.
        scores: metrics by name.
        loss: mean over all loss terms, None if there are none.
    """

    predictions: Sequence[Prediction]
    scores: Mapping[str, Any]
    loss: float | None


def evaluate(
    host: Host,
    expression: Any,
    task: Task,
    table: Rows,
    features: Sequence[Features],
    *,
    head: str | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Predictions, metrics and mean loss on a table with labels.

    Args:
        features: of the table.
        head: the module whose head answers.
    """
    device = host.model.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    found: list[tuple[int, list[Prediction]]] = []
    total, terms = 0.0, 0
    with torch.no_grad(), evaluating(host.model), host.using(expression, head=head) as model:
        for number, batch in enumerate(evaluation_batches(task, features, batch_size)):
            if number % world != rank:
                continue
            batch = moved(batch, device)
            outputs = _outputs(task, model, batch)
            found.append((number, task.predict(outputs, batch)))
            loss, count = task.loss(outputs, batch)
            total, terms = total + float(loss), terms + int(count)
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (found, total, terms))
        found = sorted((pair for part in gathered for pair in part[0]), key=lambda pair: pair[0])
        total, terms = sum(part[1] for part in gathered), sum(part[2] for part in gathered)
    predictions = task.finish([prediction for _, part in found for prediction in part], table)
    return Evaluation(predictions, task.score(predictions, table), total / terms if terms else None)


def _outputs(task: Task, model: Any, batch: Batch) -> Any:
    """What the model says; a task that generates has its own way to ask (`outputs`)."""
    ask = getattr(task, "outputs", None)
    return model(**{key: batch[key] for key in task.keys if key in batch}) if ask is None else ask(model, batch)


def distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
