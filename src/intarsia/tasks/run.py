"""Running a task: `predict` and `evaluate` on a host, with one expression for all rows or one per row.

Long rows come first and rows of like length together, answers come back in row order.  Inside, the model is in evaluation
mode and no gradients are recorded; afterwards every module is in the mode it was in.  Each row is decoded with the label
names of the module that answered it, never with those the task happens to have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intarsia.compose import Expr
from intarsia.data import LabelMap
from intarsia.errors import DataError, UsageError
from intarsia.tasks import columns
from intarsia.tasks.common import BaseTask, fixed_draws
from intarsia.tasks.metrics import Score
from intarsia.tasks.registry import bind
from intarsia.train.batches import evaluation_batches
from intarsia.train.evaluation import answered
from intarsia.train.task import Batch, Features, Prediction, Rows, with_context

if TYPE_CHECKING:
    from intarsia.host import Host

Expression = Expr | str
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        metrics: name -> value with interval.
        predictions: one per row, in row order.
        loss: mean loss per term, None where the rows' own label sets make a common loss meaningless.
        seconds: wall time of the forward passes and decoding.
        counts: rows, features, truncated rows ... (see `Task.counts`).
    """

    metrics: Mapping[str, Score]
    predictions: Sequence[Prediction]
    loss: float | None
    seconds: float
    counts: Mapping[str, int]


def evaluate(
    host: Host,
    expression: Expression | None,
    task: BaseTask[Any],
    table: Rows,
    *,
    batch_size: int = 32,
    per_row: Sequence[Expression | None] | None = None,
    head: str | None = None,
    context: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict all rows of a table and compare with its answers.  Arguments and errors as `predict`.

    Raises:
        DataError: the table has no answers, or has labels that the answering module does not know.
    """
    for column in task.answers:
        columns.cells(table, column)
    start = time.perf_counter()
    predictions = _run(host, expression, task, table, batch_size, per_row, head, context, progress, labelled=True)
    seconds = time.perf_counter() - start
    terms = sum(p.scores.get("terms", 0.0) for p in predictions)
    loss = sum(p.scores.get("loss", 0.0) for p in predictions) / terms if terms else None
    return Evaluation(task.score(predictions, table), predictions, loss, seconds, task.counts)


def predict(
    host: Host,
    expression: Expression | None,
    task: BaseTask[Any],
    table: Rows,
    *,
    batch_size: int = 32,
    per_row: Sequence[Expression | None] | None = None,
    head: str | None = None,
    context: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """One prediction per row, in row order.

    Args:
        expression: what runs; None for the bare base.
        per_row: one expression per row of the table instead; `expression` must then be None.
        head: module whose head answers, where an expression has several.
        context: passed on to `host.using`.
        progress: called with (features done, features in all) after every batch.

    Raises:
        CompositionError: an expression is not legal, or nothing in it answers this task.
        DataError: no rows, or a column is missing.
    """
    return _run(
        host, expression, task, table, batch_size, per_row, head, context, progress, labelled=task.reads_answers
    )


def _run(
    host: Host,
    expression: Expression | None,
    task: BaseTask[Any],
    table: Rows,
    batch_size: int,
    per_row: Sequence[Expression | None] | None,
    head: str | None,
    context: Mapping[str, Any] | None,
    progress: Progress | None,
    *,
    labelled: bool,
) -> list[Prediction]:
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if not len(table):
        raise DataError("there are no rows to predict")
    if per_row is not None and expression is not None:
        raise UsageError("give one expression, or per_row with one for each row, not both")
    if per_row is not None and len(per_row) != len(table):
        raise UsageError(f"per_row has {len(per_row)} expressions for {len(table)} rows")
    names = _answering(host, expression, task, table, per_row, head)
    if any(found is not None for found in names) and labelled:
        _known(task, table, names)
        labelled = False
    bind(task, host.model)
    with fixed_draws(task):
        features = with_context(task, task.features(table, labelled=labelled), table)
    found: list[Prediction] = []
    done = 0

    def note(number: int, batch: Batch, outputs: Any) -> None:
        nonlocal done
        found.extend(task.predict(outputs, batch))
        done = min(done + batch_size, len(features))
        if progress is not None:
            progress(done, len(features))

    made = batches(task, features, batch_size, names)
    answered(host, expression, task, made, note, head=head, per_row=per_row, context=context)
    return task.finish(found, table)


def batches(
    task: BaseTask[Any], features: Sequence[Features], size: int, names: Sequence[LabelMap | None]
) -> Iterator[Batch]:
    """Batches of an evaluation, with the label names of each row where they are not the task's."""
    for batch in evaluation_batches(task, features, size):
        if any(name is not None for name in names):
            batch["names"] = [names[row] for row in batch["row"]]
        yield batch


# -- who answers -----------------------------------------------------------------------------------------------------


def _answering(
    host: Host,
    expression: Expression | None,
    task: BaseTask[Any],
    table: Rows,
    per_row: Sequence[Expression | None] | None,
    head: str | None,
) -> list[LabelMap | None]:
    """Per row the label names of the module that answers it, where they are not the task's; all expressions are checked."""
    if per_row is None:
        return [_names(host, expression, task, head)] * len(table)
    known = {e: _names(host, e, task, head) for e in dict.fromkeys(per_row)}
    return [known[e] for e in per_row]


def _names(host: Host, expression: Expression | None, task: BaseTask[Any], head: str | None) -> LabelMap | None:
    call = host.call(expression, head=head)
    if task.labels is None:
        return None
    owners = [ref.name for ref in call.exprs[0].refs() if host.labels(ref.name) is not None]
    answering = call.head or (owners[-1] if owners else None)
    labels = None if answering is None else host.labels(answering)
    return None if labels is None or labels == task.labels.names else LabelMap(labels)


def _known(task: BaseTask[Any], table: Rows, names: Sequence[LabelMap | None]) -> None:
    """Refuse answers in the table that the module of their row cannot give.

    Raises:
        DataError: naming the difference.
    """
    labels, where = task.label_cells(table), columns.where(table)
    assert task.labels is not None
    for inventory in dict.fromkeys(name or task.labels for name in names):
        rows = [row for row, name in enumerate(names) if (name or task.labels) == inventory]
        inventory.encode_tags([labels[row] for row in rows], lambda i, rows=rows: where(rows[i]))  # type: ignore[misc]
