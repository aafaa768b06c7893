"""Tiny tasks over number texts (`"5 6 7"` are token ids), small enough to train in milliseconds, and hosts for them.

They implement the task protocol by themselves, so that this room is tested without the room right of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.data import Table
from intarsia.host import Host
from intarsia.methods import build
from intarsia.patches import Head
from intarsia.train.task import Batch, Features, Prediction
from tests import zoo

LABELS = ("even", "odd", "third")
NO_DROPOUT: Mapping[str, Mapping[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "m2m_100": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}


@dataclass(frozen=True)
class Score:
    value: float
    low: float | None
    high: float | None
    size: int


class Tiny:
    """Common part: padding, and losses as sum and number of terms."""

    name = "tiny"
    head: Any = None
    model_head: Any = "none"
    metric = "accuracy"
    higher_is_better = True
    keys: tuple[str, ...] = ("input_ids", "attention_mask")

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.collated: list[tuple[int | None, tuple[int, ...]]] = []

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    @property
    def counts(self) -> Mapping[str, int]:
        return {"rows": 1}

    def features(self, table: Any) -> Sequence[Features]:
        return [{"row": i, "input_ids": [int(x) for x in row["text"].split()], **self.target(row)} for i, row in enumerate(table)]

    def target(self, row: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def collate(self, features: Sequence[Features]) -> Batch:
        self.collated.append((self.epoch, tuple(f["row"] for f in features)))
        ids = padded([f["input_ids"] for f in features], 0)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "row": [f["row"] for f in features], **self.targets(features)}

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        raise NotImplementedError

    def terms(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = outputs["logits"], batch["labels"]
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        best = outputs["logits"].argmax(-1)
        return [Prediction(row, self.value(best[i])) for i, row in enumerate(batch["row"])]

    def value(self, best: Tensor) -> Any:
        return LABELS[int(best)]

    def finish(self, predictions: Sequence[Prediction], table: Any) -> list[Prediction]:
        return sorted(predictions, key=lambda p: p.row)

    def score(self, predictions: Sequence[Prediction], table: Any) -> dict[str, Any]:
        hits = [p.value == row["label"] for p, row in zip(predictions, table)]
        return {"accuracy": Score(sum(hits) / len(hits), None, None, len(hits))}


class Classify(Tiny):
    name = "classify"

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(LABELS, dropout=0.0)

    def target(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": LABELS.index(row["label"])}

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([f["labels"] for f in features])}


class Tag(Tiny):
    """Every other token has a label."""

    name = "tag"

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(LABELS, pooling="token", dropout=0.0)

    def target(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids = [int(x) for x in row["text"].split()]
        return {"labels": [x % 3 if i % 2 == 0 else -100 for i, x in enumerate(ids)]}

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {"labels": padded([f["labels"] for f in features], -100)}

    def value(self, best: Tensor) -> Any:
        return [LABELS[int(b)] for b in best]

    def score(self, predictions: Sequence[Prediction], table: Any) -> dict[str, Any]:
        return {"accuracy": Score(0.5, None, None, len(predictions))}


class Masked(Tiny):
    """What is hidden depends on epoch and row, as a task should have it."""

    name = "mlm"
    model_head = "masked-lm"
    metric = "nothing"

    def target(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def collate(self, features: Sequence[Features]) -> Batch:
        drawn = []
        for f in features:
            draw = torch.Generator().manual_seed(1000 * (0 if self.epoch is None else self.epoch + 1) + f["row"])
            hidden = torch.rand(len(f["input_ids"]), generator=draw) < 0.3
            hidden[0] = True
            ids = torch.tensor(f["input_ids"])
            drawn.append({**f, "input_ids": ids.masked_fill(hidden, 3).tolist(), "labels": ids.masked_fill(~hidden, -100).tolist()})
        return super().collate(drawn)

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {"labels": padded([f["labels"] for f in features], -100)}

    def value(self, best: Tensor) -> Any:
        return 0.0

    def score(self, predictions: Sequence[Prediction], table: Any) -> dict[str, Any]:
        return {"nothing": Score(math.nan, None, None, len(predictions))}


class Translate(Tiny):
    """The target is the source backwards."""

    name = "seq2seq"
    model_head = "seq2seq-lm"
    metric = "nothing"
    keys = ("input_ids", "attention_mask", "decoder_input_ids")

    def target(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": [int(x) for x in reversed(row["text"].split())]}

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        labels = padded([f["labels"] for f in features], -100)
        shifted = torch.cat([torch.full((len(labels), 1), 2), labels[:, :-1].clamp(min=0)], dim=1)
        return {"labels": labels, "decoder_input_ids": shifted}

    def value(self, best: Tensor) -> Any:
        return 0.0

    def score(self, predictions: Sequence[Prediction], table: Any) -> dict[str, Any]:
        return {"nothing": Score(1.0, None, None, len(predictions))}


KINDS: Mapping[str, tuple[type[Tiny], str, bool]] = {
    "classify": (Classify, "bert", True),
    "tag": (Tag, "bert", True),
    "mlm": (Masked, "bert", False),
    "seq2seq": (Translate, "m2m_100", False),
}
"""Task, family, and whether the base has no head of its own."""


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def table(rows: int = 40, seed: int = 0, learnable: bool = True) -> Table:
    """Texts of 2 to 9 ids; the label follows from the ids (by which third of the vocabulary the first is in), or is random."""
    draw = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(rows):
        length = int(torch.randint(2, 10, (1,), generator=draw))
        kind = int(torch.randint(0, 3, (1,), generator=draw))
        ids = torch.randint(5 + 30 * kind, 35 + 30 * kind, (length,), generator=draw).tolist()
        texts.append(" ".join(map(str, ids)))
        labels.append(LABELS[kind if learnable else int(torch.randint(0, 3, (1,), generator=draw))])
    return Table.of({"text": texts, "label": labels})


def host(kind: str = "classify", method: str = "lora", base_dropout: bool = False, **settings: Any) -> tuple[Host, Tiny]:
    """A host with a new module `m` for a task of this kind."""
    task_class, family, headless = KINDS[kind]
    task = task_class()
    off = {} if base_dropout else dict(NO_DROPOUT[family])
    model, _ = zoo.make(family, headless=headless, **off)
    made = build(method, **settings)
    carrier = Host(model)
    carrier.add("m", made if task.head is None else made.with_head(task.head))
    return carrier, task
