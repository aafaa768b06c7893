"""What all tasks share: padded batches, losses per term, label names per row, joining the windows of a row.

`BaseTask` implements `intarsia.train.task.Task`; a task adds its columns, its features, and how logits are read.
Losses are computed in fp32 whatever the model runs in, and only where there are labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import encode as encode_spec
from intarsia.data import LabelMap
from intarsia.data.source import check_form
from intarsia.errors import CompositionError, DataError, ModuleError, UsageError, listing, nearest
from intarsia.methods.method import HeadSpec
from intarsia.tasks import columns
from intarsia.tasks.metrics import Score, score
from intarsia.tasks.text import limit, special
from intarsia.train.task import Batch, Features, ModelHead, Prediction, Rows

IGNORE = -100
"""Label of a position without a loss term, as in transformers."""


@dataclass(frozen=True, slots=True)
class Options:
    """Settings that every task has.

    Attributes:
        max_length: pieces per input; None for what tokenizer and model allow, at most 512.
        normalise: Unicode form of texts, labels and references.
        padding: side of the padding. Absolute positions count from the left, so `left` is for models with relative ones.
        context: columns that modules hear of, per row: `task=corpus, lang=language`, for routers and modules that ask for them.
    """

    max_length: int | None = None
    normalise: str = "NFC"
    padding: Literal["right", "left"] = "right"
    context: str = ""


O = TypeVar("O", bound=Options)  # noqa: E741


class BaseTask(Generic[O]):
    """Common part of all tasks.

    Args:
        tokenizer: the base's tokenizer.
        options: the task's settings; a missing `max_length` is filled in.
        labels: label names in the order of the outputs, for tasks that have labels.

    Attributes:
        epoch: training epoch for whatever is drawn anew in each (masks); None for evaluation, where it is fixed.
    """

    name: str
    head: HeadSpec | None = None
    model_head: ModelHead = "none"
    metric: str
    higher_is_better: bool = True
    #: whether `generate(model, batch)` gives a text for each row
    writes: bool = False
    #: columns of the table that hold what is to be predicted
    answers: tuple[str, ...] = ()
    #: whether the answers are likelihoods of texts in the table, so that prediction reads them too
    reads_answers: bool = False

    def __init__(self, tokenizer: Any, options: O, labels: Sequence[str] | None = None) -> None:
        check_form(options.normalise)
        self.tokenizer = tokenizer
        self.options: O = replace(options, max_length=options.max_length or limit(tokenizer))
        self.labels = None if labels is None else LabelMap(tuple(labels))
        self.epoch: int | None = None
        self._counts: Counter[str] = Counter()
        types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
        self.keys: tuple[str, ...] = ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))
        self.fill = {
            "input_ids": special(tokenizer, "pad", "eos", "unk") or 0,
            "attention_mask": 0,
            "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0)),
        }

    @property
    def max_length(self) -> int:
        """Pieces per input."""
        assert self.options.max_length is not None
        return self.options.max_length

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the task with `intarsia.tasks.from_module`; defaults are left out."""
        return {"name": self.name, **{k: v for k, v in encode_spec(self.options).items() if k != "type"}}

    @property
    def counts(self) -> Mapping[str, int]:
        """What happened to the rows of the last `features`."""
        return dict(self._counts)

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", labels: {listing(self.labels, 6)}"
        return f"{type(self).__name__}({self.options}{labels})"

    def references(self, table: Rows) -> Sequence[Any]:
        """The right answers of all rows, in the form of a prediction's value."""
        raise NotImplementedError

    def label_cells(self, table: Rows) -> list[tuple[str, ...]]:
        """The label names in the right answers of every row."""
        return [(cell,) if isinstance(cell, str) else tuple(cell) for cell in self.references(table)]

    # -- to be written by a task -------------------------------------------------------------------------------------

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """Tokenised rows; `labelled=False` leaves the answers out even where the table has them."""
        raise NotImplementedError

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """fp32 losses of all terms [n], and for each the index of its feature in the batch [n]."""
        raise NotImplementedError

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Answers of the batch's features."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """Metrics with intervals."""
        raise NotImplementedError

    # -- batches and losses ------------------------------------------------------------------------------------------

    def collate(self, features: Sequence[Features]) -> Batch:
        """Tensors [B, T] of the model's inputs, `row` (list of table rows), and `labels` if all features have them."""
        batch: Batch = {key: self.padded(features, key, self.fill[key]) for key in self.keys if key in features[0]}
        batch["row"] = [int(f["row"]) for f in features]
        return batch

    def padded(self, features: Sequence[Features], key: str, fill: int, side: str | None = None) -> Tensor:
        """One entry of all features as int64 [B, T]."""
        return pad([f[key] for f in features], fill, side or self.options.padding)

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of all terms, and their number."""
        losses, _ = self.term_losses(outputs, batch, float(getattr(self.options, "label_smoothing", 0.0)))
        return losses.sum(), torch.tensor(len(losses), device=losses.device)

    def terms(self, batch: Batch) -> int:
        """Number of loss terms of a batch."""
        return int((self.labels_of(batch) != IGNORE).sum())

    def labels_of(self, batch: Batch) -> Tensor:
        """The labels of a batch.

        Raises:
            DataError: the table had no column with the answers.
        """
        if "labels" not in batch:
            raise DataError(
                f"task {self.name}: no labels to learn from; the table needs {listing(map(repr, self.answers))}"
            )
        labels: Tensor = batch["labels"]
        return labels

    def row_scores(self, outputs: Any, batch: Batch) -> list[dict[str, float]]:
        """Per feature the summed `loss` (nats) and the number of `terms`; empty without labels."""
        if "labels" not in batch:
            return [{} for _ in batch["row"]]
        losses, owner = self.term_losses(outputs, batch)
        size = len(batch["row"])
        sums = torch.zeros(size, dtype=torch.float64, device=losses.device).index_add_(0, owner, losses.double())
        counts = torch.bincount(owner, minlength=size)
        return [{"loss": s, "terms": float(n)} for s, n in zip(sums.tolist(), counts.tolist())]

    def names_of(self, batch: Batch, feature: int) -> LabelMap:
        """Label names that the logits of a feature stand for: `batch["names"]` where its row has a head of its own."""
        names = batch["names"][feature] if "names" in batch else None
        assert names is not None or self.labels is not None
        return names or self.labels  # type: ignore[return-value]

    def outputs(self, model: Any, batch: Batch) -> Any:
        """What the model says to a batch; what a task generates comes on top (`writes`, `generate`)."""
        return model(**{key: batch[key] for key in self.keys})

    def context(self, batch: Batch) -> Mapping[str, Any]:
        """What forms must know of a batch, one value per row (`host.using(..., **context)`)."""
        return {}

    # -- from windows to rows ----------------------------------------------------------------------------------------

    def combine(self, row: int, parts: Sequence[Prediction], table: Rows) -> Prediction:
        """One prediction of all windows of a row."""
        return parts[0]

    def finish(self, predictions: Sequence[Prediction], table: Rows) -> list[Prediction]:
        """One prediction per row, in row order.

        Raises:
            DataError: a row has none.
        """
        parts: dict[int, list[Prediction]] = {}
        for prediction in predictions:
            parts.setdefault(prediction.row, []).append(prediction)
        missing = [row for row in range(len(table)) if row not in parts]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(table)} rows got no prediction, the first at {columns.where(table)(missing[0])}"
            )
        return [self.combine(row, parts[row], table) for row in range(len(table))]

    # -- metrics -----------------------------------------------------------------------------------------------------

    def choose_metric(self, asked: str, known: Sequence[str]) -> None:
        """Set the metric that selects checkpoints: the asked one, or the first."""
        if asked and asked not in known:
            raise UsageError(f"task {self.name} has no metric {asked!r}{nearest(asked, known)} known: {listing(known)}")
        self.metrics = tuple(known)
        self.metric = asked or known[0]

    def score_all(self, answers: Sequence[Any], references: Sequence[Any]) -> dict[str, Score]:
        """All metrics of the task on answers and references, one of each per row."""
        return {name: score(name, answers, references) for name in self.metrics}


def pad(rows: Sequence[Sequence[int]], fill: int, side: str = "right") -> Tensor:
    """Rows of unequal length as one int64 tensor [B, T]."""
    width = max(map(len, rows))
    out = torch.full((len(rows), width), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        if side == "right":
            out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        else:
            out[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
    return out


def logits_of(outputs: Any) -> Any:
    """`logits` of a model's outputs: a tensor, or a tuple with one per row where rows have different heads.

    Raises:
        CompositionError: there are none.
    """
    found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if found is None:
        raise CompositionError(
            "neither the expression nor the base has a head, so there are no logits; "
            "use a module that was trained on this task, e.g. host.using('language >> task')"
        )
    return found


def one_tensor(logits: Any) -> Tensor:
    """Logits of a batch as one tensor; a loss over heads with different labels does not exist."""
    if not isinstance(logits, Tensor):
        raise CompositionError(
            "the rows of this batch answer with different label sets; a loss needs one set for all rows"
        )
    return logits


def check_width(logits: Tensor, names: LabelMap) -> Tensor:
    """fp32 logits of one row; raises ModuleError if their number is not that of the label names."""
    if logits.shape[-1] != len(names):
        raise ModuleError(
            f"{logits.shape[-1]} outputs came for {len(names)} labels ({listing(names, 6)}); "
            "the expression that ran was trained on another label set"
        )
    return logits.float()


def token_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropies of the labelled positions only [n], and the batch index of each [n].

    Args:
        logits: [B, T, V], any floating type; or [N, V], those of the labelled positions alone.
        labels: [B, T], `IGNORE` where there is none.
    """
    chosen = labels != IGNORE
    picked = logits if logits.dim() == 2 else logits[chosen]
    losses = F.cross_entropy(picked.float(), labels[chosen], reduction="none", label_smoothing=smoothing)
    return losses, chosen.nonzero()[:, 0]


def summed(parts: Sequence[Prediction]) -> dict[str, float]:
    """Statistics of the windows of a row, added up."""
    keys = dict.fromkeys(key for part in parts for key in part.scores)
    return {key: sum(part.scores.get(key, 0.0) for part in parts) for key in keys}


def counted(features: Sequence[Features], **more: int) -> Counter[str]:
    """The counts of a `features` call: `rows`, `features` and what a task adds."""
    return Counter({"rows": len({f["row"] for f in features}), "features": len(features), **more})


@contextmanager
def fixed_draws(task: BaseTask[Any]) -> Iterator[None]:
    """Inside, the task draws as in evaluation, the same each time; afterwards as before."""
    before, task.epoch = task.epoch, None
    try:
        yield
    finally:
        task.epoch = before
