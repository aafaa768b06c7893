"""Classification of texts and pairs of texts: one label per row (softmax), or any number of them (sigmoids)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import DataError, UsageError
from intarsia.patches import Head
from intarsia.tasks import columns
from intarsia.tasks.common import check_width, logits_of, one_tensor
from intarsia.tasks.metrics import Score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.sequence import SequenceOptions, SequenceTask
from intarsia.train.task import Batch, Prediction, Rows


@register("task.classify")
@dataclass(frozen=True, slots=True)
class ClassifyOptions(SequenceOptions):
    """Settings of classification.

    Attributes:
        label: column of the label; with `multi` a list of labels, or text cut at `separator`.
        problem: `single` label or `multi` label.
        threshold: probability from which a label is given (`multi`).
        label_smoothing: share of the target spread evenly over all labels.
        masks: mask tokens put into every input for label embeddings and prototypes instead of a linear head (PERFECT, see
            `intarsia.tasks.prototypes`); 0 for none.
        mask_place: where they stand: at the `end` of the input (of the second text of a pair) or at its `start`.
        margin: of the hinge loss over label embeddings.
    """

    label: str = "label"
    problem: Literal["single", "multi"] = "single"
    separator: str = ","
    threshold: float = 0.5
    label_smoothing: float = 0.0
    masks: int = 0
    mask_place: Literal["end", "start"] = "end"
    margin: float = 1.0


class Classify(SequenceTask[ClassifyOptions]):
    """A label, or a set of labels, for each text."""

    name = "classify"

    def __init__(self, tokenizer: Any, options: ClassifyOptions, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, options, labels)
        self.answers = (options.label,)
        self.multi = options.problem == "multi"
        self.head = Head(
            tuple(labels),
            pooling=options.pooling,
            problem=options.problem,
            dropout=options.dropout,
            standardise=options.standardise,
        )
        single, multi = ("accuracy", "macro_f1", "mcc"), ("micro_f1", "macro_f1", "accuracy")
        self.choose_metric(options.metric, multi if self.multi else single)

    def references(self, table: Rows) -> tuple[Any, ...]:
        """The labels of all rows by name: strings, or tuples of strings (`multi`)."""
        o = self.options
        if self.multi:
            return columns.label_sets(table, o.label, o.separator, o.normalise)
        return columns.texts(table, o.label, o.normalise)

    def targets(self, table: Rows) -> Sequence[Any] | None:
        if not columns.has(table, self.options.label):
            return None
        assert self.labels is not None
        where, references = columns.where(table), self.references(table)
        if not self.multi:
            return self.labels.encode(references, where)
        chosen = self.labels.encode_tags(references, where)
        return [[float(i in ids) for i in range(len(self.labels))] for ids in map(frozenset, chosen)]

    def terms(self, batch: Batch) -> int:
        return int(self.labels_of(batch).numel())

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits, labels = one_tensor(logits_of(outputs)).float(), self.labels_of(batch)
        assert self.labels is not None
        check_width(logits, self.labels)
        owner = torch.arange(len(labels), device=labels.device)
        if not self.multi:
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing), owner
        soft = labels * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        return losses.flatten(), owner.repeat_interleave(logits.shape[1])

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Label name (or list of names) and all probabilities per row."""
        scores = self.row_scores(outputs, batch)
        found = []
        for i, (row, logits) in enumerate(zip(batch["row"], logits_of(outputs))):
            names = self.names_of(batch, i)
            logits = check_width(logits, names)
            probabilities = (torch.sigmoid(logits) if self.multi else torch.softmax(logits, -1)).tolist()
            value: Any = [n for n, p in zip(names, probabilities) if p >= self.options.threshold]
            if not self.multi:
                value = names.names[int(logits.argmax())]
            found.append(Prediction(row, value, dict(zip(names, probabilities)), scores[i]))
        return found

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`accuracy`, `macro_f1` and `mcc`; for `multi` `micro_f1`, `macro_f1` and `accuracy` (of the whole set)."""
        return self.score_all([p.value for p in predictions], self.references(table))


def _labels(options: ClassifyOptions, table: Rows) -> Sequence[str]:
    if options.problem == "multi":
        column: Sequence[Any] = columns.label_sets(table, options.label, options.separator, options.normalise)
        return columns.inventory(table, column, options.label, least=1).names
    return columns.inventory(table, columns.texts(table, options.label, options.normalise), options.label).names


def _make(tokenizer: Any, options: Any, labels: Sequence[str] | None) -> Classify:
    if labels is None:
        raise DataError("classification needs label names")
    if options.masks < 0:
        raise UsageError(f"masks={options.masks} must be at least 1, or 0 for a linear head")
    if options.masks:
        from intarsia.tasks.prototypes import PrototypeClassify

        return PrototypeClassify(tokenizer, options, labels)
    return Classify(tokenizer, options, labels)


TASKS.add(
    "classify",
    Kind(
        "classify",
        "a label for each text or pair of texts",
        ClassifyOptions,
        ("text", "pair", "label"),
        ("text",),
        _make,
        _labels,
        headless=True,
    ),
)
