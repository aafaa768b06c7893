"""`align`: a language's sentences are given the vectors that the base gives to their translations (Reimers & Gurevych 2020, arXiv 2004.09813).

    regression     mean over d of (s - t)^2
    contrastive    cross-entropy of cos(s, t_j) / temperature over the sentences j of a batch, t_i being the right one

t is the vector that the bare base gives to the other language's sentence (the teacher, frozen), s that of base and module for this
language's sentence, and (`both`) for the other's, which keeps that one where it was.  Made for bases without a language-model head;
the base is loaded without one.  The contrastive loss knows the sentences of one batch only, so it depends on the batch size, and on
how a step is cut up (`accumulation`).

Measured: top-1 retrieval of the translation among the sentences of the table, by cosine, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import UsageError
from intarsia.patches.heads import Pooling, pool
from intarsia.tasks import columns
from intarsia.tasks.common import BaseTask, Options, counted, pad
from intarsia.tasks.metrics import Score, mean
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import encode
from intarsia.train.task import Batch, Features, Prediction, Rows

BATCH = 32


@register("task.align")
@dataclass(frozen=True, slots=True)
class AlignOptions(Options):
    """Settings of alignment.

    Attributes:
        source: column of the sentences in the language that the base knows.
        target: column of their translations in the new language.
        prefix: put before every sentence.
        pooling: how token vectors become a sentence vector.
        how: `regression` or `contrastive`.
        both: the sentences of the known language are learnt too.
        temperature: of the contrastive loss.
        metric: the one that selects checkpoints; empty for `retrieval`.
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    pooling: Pooling = "mean"
    how: Literal["regression", "contrastive"] = "regression"
    both: bool = True
    temperature: float = 0.05
    metric: str = ""


class Align(BaseTask[AlignOptions]):
    """Give sentences the vectors of their translations.  The base runs through `bind` before there are features."""

    name = "align"

    def __init__(self, tokenizer: Any, options: AlignOptions, labels: Sequence[str] | None = None) -> None:
        super().__init__(tokenizer, options, None)
        self.answers = (options.source, options.target)
        if options.temperature <= 0:
            raise UsageError(f"temperature={options.temperature} must be positive")
        self.choose_metric(options.metric, ("retrieval", "retrieval_back", "cosine"))
        self.teacher_tokenizer = tokenizer
        self.model: Any = None
        self.taught: dict[str, Tensor] = {}

    def bind(self, model: Any) -> None:
        """Take the base that gives the teacher's vectors: the model with no module running."""
        self.model = model

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """Two features per row (one without `both`): ids, and the known language's sentence, whose vector is the teacher's."""
        o = self.options
        targets, sources = (columns.texts(table, name, o.normalise) for name in (o.target, o.source))
        found, counts = encode(self.tokenizer, [o.prefix + text for text in targets], None, self.max_length)
        features: list[Features] = [{**ids, "row": i, "known": sources[i], "kind": 0} for i, ids in enumerate(found)]
        if o.both:
            mine, _ = encode(self.tokenizer, [o.prefix + text for text in sources], None, self.max_length)
            features += [{**ids, "row": i, "known": sources[i], "kind": 1} for i, ids in enumerate(mine)]
        self._counts = counted(features, **{k: int(v) for k, v in counts.items()})
        return features

    def teach(self, texts: Sequence[str]) -> Tensor:
        """Vectors of the bare base, [N, d], on the CPU; each text is computed once.  No module may be running.

        Raises:
            UsageError: no model was bound, or it has a language-model head in the way of its states.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self.taught]
        for start in range(0, len(new), BATCH):
            self._teach(new[start : start + BATCH])
        return torch.stack([self.taught[text] for text in texts])

    @torch.inference_mode(False)  # the vectors are used in training, wherever they were first asked for
    @torch.no_grad()
    def _teach(self, texts: Sequence[str]) -> None:
        if self.model is None:
            raise UsageError("align needs the base for its teacher: call bind(model) first")
        ids, _ = encode(self.teacher_tokenizer, [self.options.prefix + text for text in texts], None, self.max_length)
        was = self.model.training
        self.model.eval()
        try:
            batch = {key: pad([row[key] for row in ids], self.fill[key]).to(self.model.device) for key in self.keys if key in ids[0]}
            pooled = pool(states_of(self.model(**batch)), batch["attention_mask"], self.options.pooling)
        finally:
            self.model.train(was)
        self.taught.update(zip(texts, pooled.float().cpu().clone()))

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        batch["teacher"] = self.teach([f["known"] for f in features])
        batch["kind"] = [int(f["kind"]) for f in features]
        return batch

    def terms(self, batch: Batch) -> int:
        """One term per sentence."""
        return len(batch["row"])

    def vectors(self, outputs: Any, batch: Batch) -> Tensor:
        """Sentence vectors of a batch, fp32 [B, d]."""
        return pool(states_of(outputs), batch["attention_mask"], self.options.pooling).float()

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        mine, teacher = self.vectors(outputs, batch), batch["teacher"].float()
        owner = torch.arange(len(mine), device=mine.device)
        if self.options.how == "regression":
            return (mine - teacher).square().mean(-1), owner
        alike = F.normalize(mine, dim=-1) @ F.normalize(teacher, dim=-1).T / self.options.temperature
        rows = torch.tensor(batch["row"], device=mine.device)
        same = (rows[:, None] == rows[None, :]) & ~torch.eye(len(rows), dtype=torch.bool, device=mine.device)
        return F.cross_entropy(alike.masked_fill(same, -1e9), owner, reduction="none"), owner  # a sentence's twin is no negative

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Per sentence its vector and the teacher's."""
        mine = self.vectors(outputs, batch)
        losses, _ = self.term_losses(outputs, batch)
        return [
            Prediction(row, (vector, teacher), None, {"loss": float(loss), "terms": 1.0, "kind": float(kind)})
            for row, kind, vector, teacher, loss in zip(
                batch["row"], batch["kind"], mine.tolist(), batch["teacher"].tolist(), losses.tolist()
            )
        ]

    def combine(self, row: int, parts: Sequence[Prediction], table: Rows) -> Prediction:
        """The sentence of the new language stands for its row."""
        return next(part for part in parts if not part.scores.get("kind"))

    def references(self, table: Rows) -> tuple[str, ...]:
        return columns.texts(table, self.options.source, self.options.normalise)

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`retrieval` (new language -> known), `retrieval_back`, and the mean `cosine`."""
        mine, teacher = (_unit(np.stack([p.value[i] for p in predictions])) for i in (0, 1))
        alike = mine @ teacher.T
        own = np.diag(alike)
        right = {
            "retrieval": (alike.argmax(1) == np.arange(len(own))).astype(float),
            "retrieval_back": (alike.argmax(0) == np.arange(len(own))).astype(float),
            "cosine": own,
        }
        return {name: mean(name, values) for name, values in right.items()}


def states_of(outputs: Any) -> Tensor:
    """The last hidden states of a model without a head.

    Raises:
        UsageError: there are none.
    """
    found = outputs.get("last_hidden_state") if hasattr(outputs, "get") else None
    if not isinstance(found, Tensor):
        raise UsageError("align reads the states of a base without a language-model head; load it with head='none'")
    return found


def _unit(x: Any) -> Any:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


TASKS.add("align", Kind("align", "sentence vectors of translations", AlignOptions, ("source", "target"), ("source", "target"), Align, headless=True))
