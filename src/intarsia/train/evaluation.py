"""`answered`, the one loop of every evaluation and prediction, and `evaluate`, the evaluation inside a training.

Inside a training each process takes every n-th batch and all get all predictions; the batches are the same as with one
process, so the metric is too.  What users call on tables is in `intarsia.tasks.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from intarsia.host import Host
from intarsia.train.batches import evaluation_batches, moved
from intarsia.train.frozen import evaluating
from intarsia.train.task import Batch, Features, Prediction, Rows, Task, context_of


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
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    found: list[tuple[int, list[Prediction]]] = []
    total, terms = 0.0, 0
    mine = [b for b in enumerate(evaluation_batches(task, features, batch_size)) if b[0] % world == rank]

    def note(number: int, batch: Batch, outputs: Any) -> None:
        nonlocal total, terms
        found.append((mine[number][0], task.predict(outputs, batch)))
        loss, count = task.loss(outputs, batch)
        total, terms = total + float(loss), terms + int(count)

    answered(host, expression, task, (batch for _, batch in mine), note, head=head)
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (found, total, terms))
        found = sorted((pair for part in gathered for pair in part[0]), key=lambda pair: pair[0])
        total, terms = sum(part[1] for part in gathered), sum(part[2] for part in gathered)
    predictions = task.finish([prediction for _, part in found for prediction in part], table)
    return Evaluation(predictions, task.score(predictions, table), total / terms if terms else None)


def answered(
    host: Host,
    expression: Any,
    task: Task,
    batches: Iterable[Batch],
    each: Callable[[int, Batch, Any], None],
    *,
    head: str | None = None,
    per_row: Sequence[Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> None:
    """Let a host answer batches, in evaluation mode and without gradients.

    Args:
        expression: what runs; None for the bare base.
        each: called with the number of the batch, the batch on the model's device, and the model's outputs.
        per_row: one expression for each row of the table instead.
        context: added to what the task says of a batch.
    """
    device = next(host.model.parameters()).device
    with torch.inference_mode(), evaluating(host.model):
        for number, batch in enumerate(batches):
            active = expression if per_row is None else [per_row[row] or "base" for row in batch["row"]]
            here: Batch = moved(batch, device)
            each(number, here, outputs(host, active, task, here, head=head, context=context))


def outputs(
    host: Host, expression: Any, task: Task, batch: Batch, *, head: str | None = None, context: Mapping[str, Any] | None = None
) -> Any:
    """What a model says to a batch; a task that `writes` adds `texts`, for which all that the model reads first is the prompt."""
    given = dict(context or {})
    ask = getattr(task, "outputs", None)
    with host.using(expression, head=head, **{**context_of(task, batch), **given}) as model:
        found = model(**{key: batch[key] for key in task.keys if key in batch}) if ask is None else ask(model, batch)
    if getattr(task, "writes", False):
        with host.using(expression, head=head, **given) as model:
            found["texts"] = task.generate(model, batch)  # type: ignore[attr-defined]
    return found


def distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
