"""Regression: a number for each text or pair of texts, by squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia._codec import register
from intarsia.patches import Head
from intarsia.tasks import columns
from intarsia.tasks.common import logits_of, one_tensor
from intarsia.tasks.metrics import Score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.sequence import SequenceOptions, SequenceTask
from intarsia.train.task import Batch, Prediction, Rows


@register("task.regress")
@dataclass(frozen=True, slots=True)
class RegressOptions(SequenceOptions):
    """Settings of regression.

    Attributes:
        value: column of the number.
    """

    value: str = "value"


class Regress(SequenceTask[RegressOptions]):
    """A number for each text."""

    name = "regress"

    def __init__(self, tokenizer: Any, options: RegressOptions, labels: Sequence[str] | None = None) -> None:
        super().__init__(tokenizer, options, None)
        self.answers = (options.value,)
        self.head = Head(
            ("value",),
            pooling=options.pooling,
            problem="regression",
            dropout=options.dropout,
            standardise=options.standardise,
        )
        self.choose_metric(options.metric, ("pearson", "spearman"))

    def references(self, table: Rows) -> tuple[float, ...]:
        """The numbers of all rows."""
        return columns.numbers(table, self.options.value)

    def targets(self, table: Rows) -> Sequence[float] | None:
        return self.references(table) if columns.has(table, self.options.value) else None

    def terms(self, batch: Batch) -> int:
        return len(self.labels_of(batch))

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        labels = self.labels_of(batch)
        values = one_tensor(logits_of(outputs)).float()[:, 0]
        return (values - labels).square(), torch.arange(len(labels), device=labels.device)

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """A number per row."""
        scores = self.row_scores(outputs, batch)
        values = [float(row[0]) for row in logits_of(outputs)]
        return [Prediction(row, value, None, s) for row, value, s in zip(batch["row"], values, scores)]

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`pearson` and `spearman` correlation."""
        return self.score_all([p.value for p in predictions], self.references(table))


TASKS.add(
    "regress",
    Kind(
        "regress",
        "a number for each text or pair of texts",
        RegressOptions,
        ("text", "pair", "value"),
        ("text",),
        Regress,
        headless=True,
    ),
)
