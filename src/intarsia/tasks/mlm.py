"""Masked language modelling (Devlin et al. 2019, arXiv 1810.04805): every epoch hides other pieces of each text.

What is hidden is a function of (seed, epoch, row, window) alone: not of batch, order, process or what was drawn before, so a
run can be resumed anywhere, and evaluation hides the same pieces each time.  Texts longer than the window give several
windows; nothing is cut off.  Special tokens, the unknown token among them, are never hidden and never put in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import DataError, UsageError
from intarsia.patches import LanguageModelHead
from intarsia.tasks import columns
from intarsia.tasks.common import IGNORE, BaseTask, Options, counted, logits_of, one_tensor, summed, token_losses
from intarsia.tasks.metrics import Score, mean, score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import Frame, pieces, special, windows
from intarsia.train.task import Batch, Features, Prediction, Rows

Ints = NDArray[np.int64]


@register("task.mlm")
@dataclass(frozen=True, slots=True)
class MaskedOptions(Options):
    """Settings of masked language modelling.

    Attributes:
        text: column of the text.
        prefix: put before every window; never hidden.
        rate: share of the pieces that are to be predicted, at least one per window.
        hidden, random: of these, how many become the mask token, and how many another piece; the rest stays.
        whole_words: hide all pieces of a word together.
        lm_head: `base` for the base's own LM head, `new` for one that the module brings along.
        seed: of the masks.
        metric: the one that selects checkpoints; empty for `perplexity` (of the hidden pieces).
    """

    text: str = "text"
    prefix: str = ""
    rate: float = 0.15
    hidden: float = 0.8
    random: float = 0.1
    whole_words: bool = False
    lm_head: Literal["base", "new"] = "base"
    seed: int = 0
    metric: str = ""


class Masked(BaseTask[MaskedOptions]):
    """Predict hidden pieces."""

    name = "mlm"

    def __init__(self, tokenizer: Any, options: MaskedOptions, labels: Sequence[str] | None = None) -> None:
        super().__init__(tokenizer, options, None)
        self.answers = (options.text,)
        if not 0 < options.rate <= 1 or min(options.hidden, options.random) < 0 or options.hidden + options.random > 1:
            raise UsageError(
                f"rate={options.rate} must lie in (0, 1], and hidden={options.hidden} and random={options.random} must be shares of it"
            )
        if tokenizer.mask_token_id is None:
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} has no mask token; use task clm with a causal model"
            )
        if options.whole_words and not getattr(tokenizer, "is_fast", False):
            raise UsageError("whole_words=True needs a fast tokenizer, which knows the word of each piece")
        self.mask = int(tokenizer.mask_token_id)
        self.specials = frozenset(tokenizer.all_special_ids)
        self.ordinary = np.array([i for i in range(len(tokenizer)) if i not in self.specials], dtype=np.int64)
        self.frame = Frame.of(tokenizer, options.prefix)
        self.width = self.frame.room(self.max_length)
        self.head = LanguageModelHead() if options.lm_head == "new" else None
        self.model_head = "none" if options.lm_head == "new" else "masked-lm"
        self.choose_metric(options.metric, ("perplexity", "masked_accuracy"))
        self.higher_is_better = self.metric != "perplexity"

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """One feature per window: `row`, `window`, `input_ids` (nothing hidden yet), `group` (which pieces go together).

        Raises:
            DataError: no rows, or no such column.
        """
        texts = columns.texts(table, self.options.text, self.options.normalise)
        found: list[Features] = []
        split = unknown = 0
        unk = special(self.tokenizer, "unk")
        for row, (ids, words) in enumerate(self._pieces(texts)):
            cuts = windows(len(ids), self.width, 0)
            split += len(cuts) > 1
            unknown += 0 if unk is None else ids.count(unk)
            found += [self._feature(row, i, ids[start:end], words[start:end]) for i, (start, end) in enumerate(cuts)]
        self._counts = counted(found, split_rows=split, unknown=unknown)
        return found

    def _pieces(self, texts: Sequence[str]) -> Iterable[tuple[list[int], list[int]]]:
        """Pieces of each text, and the number of the word that each belongs to."""
        if not self.options.whole_words:
            for ids in pieces(self.tokenizer, texts):
                yield ids, list(range(len(ids)))
            return
        for text in texts:
            encoding = self.tokenizer([text], add_special_tokens=False, verbose=False)
            yield list(encoding["input_ids"][0]), [-1 if w is None else w for w in encoding.word_ids(0)]

    def _feature(self, row: int, window: int, ids: Sequence[int], words: Sequence[int]) -> Features:
        full = self.frame.wrap(ids) or [special(self.tokenizer, "bos", "eos", "pad") or 0]
        group = [-1] * len(full)
        start = len(self.frame.before)
        group[start : start + len(ids)] = [-1 if i in self.specials else w for i, w in zip(ids, words)]
        feature = {"row": row, "window": window, "input_ids": full, "attention_mask": [1] * len(full), "group": group}
        return {**feature, "token_type_ids": [0] * len(full)} if "token_type_ids" in self.keys else feature

    def masked(self, feature: Features) -> tuple[list[int], list[int]]:
        """Ids with some hidden, and labels: the id that was there, `IGNORE` elsewhere."""
        o = self.options
        epoch = 0 if self.epoch is None else self.epoch + 1
        draw = np.random.default_rng([o.seed, epoch, int(feature["row"]), int(feature["window"])])
        ids, group = np.array(feature["input_ids"]), np.array(feature["group"])
        chosen = choose(group, o.rate, draw)
        labels = np.full_like(ids, IGNORE)
        labels[chosen] = ids[chosen]
        fate = draw.random(len(chosen))
        others = self.ordinary[draw.integers(len(self.ordinary), size=len(chosen))]
        ids[chosen] = np.where(fate < o.hidden, self.mask, np.where(fate < o.hidden + o.random, others, ids[chosen]))
        return ids.tolist(), labels.tolist()

    def collate(self, features: Sequence[Features]) -> Batch:
        """Hides pieces, as `self.epoch` says, and pads."""
        drawn: list[Features] = []
        for feature in features:
            ids, labels = self.masked(feature)
            drawn.append({**feature, "input_ids": ids, "labels": labels})
        batch = super().collate(drawn)
        batch["labels"] = self.padded(drawn, "labels", IGNORE)
        return batch

    def wanted(self, batch: Batch) -> Tensor:
        """What each position is to predict, [B, T]; `IGNORE` where there is nothing to learn."""
        return self.labels_of(batch)

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return token_losses(one_tensor(logits_of(outputs)), self.wanted(batch), smoothing)

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Per window the log-likelihood of what was hidden, and how much of it was guessed (`correct`)."""
        labels = self.labels_of(batch)
        chosen = labels != IGNORE
        hits = one_tensor(logits_of(outputs))[chosen].argmax(-1) == labels[chosen]
        correct = np.bincount(chosen.nonzero()[:, 0].cpu().numpy(), hits.cpu().numpy(), minlength=len(labels))
        scores = self.row_scores(outputs, batch)
        return [
            Prediction(row, -s["loss"], None, {**s, "correct": float(c)})
            for row, s, c in zip(batch["row"], scores, correct)
        ]

    def combine(self, row: int, parts: Sequence[Prediction], table: Rows) -> Prediction:
        scores = summed(parts)
        return Prediction(row, -scores["loss"], None, scores)

    def references(self, table: Rows) -> tuple[str, ...]:
        """The texts of all rows."""
        return columns.texts(table, self.options.text, self.options.normalise)

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`perplexity` and `masked_accuracy` of the hidden pieces."""
        terms = [p.scores["terms"] for p in predictions]
        if not sum(terms):
            raise DataError("no piece of these texts can be hidden: they are empty, or unknown to the tokenizer")
        return {
            "perplexity": score("perplexity", [p.scores["loss"] for p in predictions], terms),
            "masked_accuracy": mean("masked_accuracy", [p.scores["correct"] for p in predictions], terms),
        }


def choose(group: Ints, rate: float, draw: np.random.Generator) -> Ints:
    """Positions to hide: `rate` of those whose group is not negative, groups as a whole, at least one if there is any.

    A group that would exceed the share is passed over; where all would, pieces are drawn singly.
    """
    candidates = np.flatnonzero(group >= 0)
    if not len(candidates):
        return candidates
    wanted = max(1, round(rate * len(candidates)))
    names = np.unique(group[candidates])
    if len(names) == len(candidates):
        return np.sort(draw.permutation(candidates)[:wanted])
    picked: list[int] = []
    for name in draw.permutation(names):
        members = np.flatnonzero(group == name)
        if len(picked) + len(members) <= wanted:
            picked += members.tolist()
    return np.array(sorted(picked)) if picked else np.sort(draw.permutation(candidates)[:wanted])


def _suit(model: Any) -> dict[str, Any]:
    """A base without output embeddings gets an LM head with the module."""
    return {} if model.get_output_embeddings() is not None else {"lm_head": "new"}


TASKS.add(
    "mlm", Kind("mlm", "predict hidden pieces of a text", MaskedOptions, ("text",), ("text",), Masked, suit=_suit)
)
