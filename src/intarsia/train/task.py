"""`Task`: what training, evaluation and prediction need to know of a task.  Implementations live in `intarsia.tasks`.

A task turns table rows into features, features into batches, model outputs into a loss and into predictions, and
predictions into metrics.  It never touches a model or decides what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from intarsia.errors import UsageError, listing, nearest
from intarsia.methods.method import HeadSpec

Batch = dict[str, Any]
Features = Mapping[str, Any]
ModelHead = Literal["none", "causal-lm", "masked-lm", "seq2seq-lm"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row of a table.

    Attributes:
        row: index of the row in its table.
        value: label name, number, list of label names (one per word), or text.
        probabilities: label name -> probability, where that is meaningful.
        scores: sufficient statistics of this row for its metrics (e.g. log-likelihood and token count).
    """

    row: int
    value: Any
    probabilities: Mapping[str, float] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class Rows(Protocol):
    """A table of strings, as `intarsia.data.read` gives it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Task(Protocol):
    """One kind of task, bound to its tokenizer, columns and labels.

    A task may have more, which is used where it is there:

    * `epoch: int | None`: set before `collate` to the training epoch, None in evaluation, for what is drawn anew (masks).
    * `bind(model) -> None`: called once before `features` with the model that will run the task (a decoder's own shift).
    * `context(batch) -> Mapping`: what the forms of a module must know of a batch, for `host.using(..., **context)`, one
      value per row: lengths of prompts (`prompt`), positions of words (`words`) or masks.
    * `outputs(model, batch)`: another way to ask the model than `model(**{key: batch[key] for key in keys})`.
    * `writes: bool` and `generate(model, batch) -> list of texts`: the task generates; in evaluation the texts are put into
      the outputs as `texts`.  They run without the task's context: all that a model reads first is then its prompt.
    * `wanted(batch) -> Tensor`: what each position predicts, [B, T], -100 where nothing; the loss then also takes logits
      [N, V] of the labelled positions alone, see `intarsia.train.targets`.
    * `settle(host, name, expression, features, batch_size) -> None`: called with the training features before every
      evaluation in training and at its end, to set what no gradient finds (prototypes).

    Attributes:
        name: `classify`, `regress`, `tag`, `parse`, `mlm`, `clm`, `seq2seq`.
        head: outputs that the module brings along; None where the base's own language-model head answers.
        model_head: which kind of base model the task runs on.
        metric: name of the metric that selects checkpoints; `higher_is_better` says which way.
        keys: the batch entries that go into the model (`input_ids`, `attention_mask` ...); the rest stays with the task.
    """

    name: str
    head: HeadSpec | None
    model_head: ModelHead
    metric: str
    higher_is_better: bool
    keys: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the task from a stored module (columns, lengths, text prefix, scheme ...)."""

    def features(self, table: Rows) -> Sequence[Features]:
        """Tokenised examples of all rows; a row may give several (windows), each carries `row`.

        Nothing is dropped silently: truncation is counted in `self.counts`.
        """

    @property
    def counts(self) -> Mapping[str, int]:
        """Truncated rows, windows, unknown pieces ... of the last `features`."""

    def collate(self, features: Sequence[Features]) -> Batch:
        """A padded batch of tensors: the model's `keys`, `labels`, and `row` (list of table rows)."""

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the losses of all terms, number of terms).

        The trainer divides by the number of terms of the whole optimiser step (all micro-batches, all processes), so the
        update does not depend on how the step is cut up.
        """

    def terms(self, batch: Batch) -> int:
        """Number of loss terms in a batch, without a forward."""

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Answers of the batch's features; windows of one row are joined by `finish`."""

    def finish(self, predictions: Sequence[Prediction], table: Rows) -> list[Prediction]:
        """One prediction per row of the table, in row order; raises DataError if a row has none."""

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Any]:
        """Metrics with bootstrap intervals: name -> Score(value, low, high, n) of `intarsia.tasks.metrics`."""


CONTEXT = "context"
"""Entry of features and batches: what the table says of a row to the modules, by key of the call's context."""


def context_of(task: Task, batch: Batch) -> dict[str, Any]:
    """What a task says of a batch to the forms of a module (its hook `context`), and what columns of the table say."""
    tell = getattr(task, "context", None)
    return {**batch.get(CONTEXT, {}), **({} if tell is None else dict(tell(batch)))}


def context_columns(asked: str) -> dict[str, str]:
    """The columns that a task's option `context` names, by key of the call's context: `task=corpus, lang=language`.

    Raises:
        UsageError: it is no list of key=column.
    """
    found: dict[str, str] = {}
    for pair in asked.split(",") if asked else ():
        key, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier() or key in found:
            raise UsageError(f"the task's context={asked!r} is a list of KEY=COLUMN with different keys, e.g. task=corpus,lang=language")
        found[key] = column
    return found


def with_context(task: Task, features: Sequence[Features], table: Rows) -> Sequence[Features]:
    """Features with what columns of the table say of their rows (the task's option `context`, e.g. `task=corpus, lang=language`).

    Raises:
        UsageError: the option is not a list of key=column, or the table lacks a column.
    """
    asked = getattr(getattr(task, "options", None), "context", "")
    if not asked:
        return features
    columns: dict[str, Sequence[str]] = {}
    for key, column in context_columns(asked).items():
        names = list(table[0]) if len(table) else []
        if column not in names:
            raise UsageError(f"the task's context={asked!r}: the table has no column {column!r}{nearest(column, names)}; it has {listing(names)}")
        columns[key] = [str(table[row][column]) for row in range(len(table))]
    return [{**feature, CONTEXT: {key: cells[feature["row"]] for key, cells in columns.items()}} for feature in features]


def batch_context(features: Sequence[Features]) -> dict[str, Any]:
    """The same of a batch: a value per feature, by key; nothing where features say nothing."""
    if not features or CONTEXT not in features[0]:
        return {}
    return {CONTEXT: {key: [feature[CONTEXT][key] for feature in features] for key in features[0][CONTEXT]}}
