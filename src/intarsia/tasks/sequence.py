"""What classification and regression share: one text or a pair per row, one set of outputs per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from intarsia.patches.heads import Pooling
from intarsia.tasks import columns
from intarsia.tasks.common import BaseTask, Options, counted
from intarsia.tasks.text import encode
from intarsia.train.task import Batch, Features, Rows


@dataclass(frozen=True, slots=True)
class SequenceOptions(Options):
    """Settings of tasks with one answer per text.

    Attributes:
        text: column of the text.
        pair: column of the second text, None for single texts.
        prefix: put before every text, e.g. `"query: "` for E5 models.
        pooling: what the head reads: the masked `mean`, the `first` or the `last` token.
        dropout: of the head.
        standardise: centre and scale the head's features (see `intarsia.patches.heads`).
        metric: the one that selects checkpoints; empty for the task's default.
    """

    text: str = "text"
    pair: str | None = None
    prefix: str = ""
    pooling: Pooling = "mean"
    dropout: float = 0.1
    standardise: bool = True
    metric: str = ""


S = TypeVar("S", bound=SequenceOptions)


class SequenceTask(BaseTask[S]):
    """One text or pair per row."""

    def targets(self, table: Rows) -> Sequence[Any] | None:
        """Encoded answers of all rows, None if the table has no such column."""
        raise NotImplementedError

    @property
    def room(self) -> int:
        """Pieces for texts and special tokens."""
        return self.max_length

    def complete(self, ids: dict[str, list[int]]) -> dict[str, list[int]]:
        """An encoded text as the model reads it."""
        return ids

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """One feature per row: `row`, the model's inputs, `label` if the table has answers.

        Raises:
            DataError: no rows, a column is missing, or an answer is not legal.
        """
        options = self.options
        texts = [options.prefix + text for text in columns.texts(table, options.text, options.normalise)]
        pairs = None if options.pair is None else list(columns.texts(table, options.pair, options.normalise))
        targets = self.targets(table) if labelled else None
        encoded, counts = encode(self.tokenizer, texts, pairs, self.room)
        found: list[Features] = []
        for row, ids in enumerate(map(self.complete, encoded)):
            found.append({"row": row, **ids} if targets is None else {"row": row, **ids, "label": targets[row]})
        self._counts = counted(found, **counts)
        return found

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        if all("label" in f for f in features):
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch
