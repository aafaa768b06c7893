"""Dependency parsing: a head and a relation for every word (Dozat & Manning 2017, arXiv 1611.01734).

A word is represented by its first piece.  In training each word's head is a choice among all words and the root, and its
relation is learnt at the right head; an answer is the best tree with one root (Chu-Liu/Edmonds), with the best relation of
each of its arcs.  Where `root` is a relation it marks the root's child and nothing else.

A sentence is read as a whole.  One that is too long in pieces is read with fewer pieces per word (counted as
`shortened_rows`); one with more words than the model has positions is refused.  Punctuation counts in `uas` and `las`, and so
do relations that were not in the training data (`unseen_relations`): such a word is wrong in `las`, and has no relation loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import DataError, ModuleError, listing
from intarsia.patches import Biaffine
from intarsia.tasks import columns
from intarsia.tasks.common import IGNORE, BaseTask, Options, counted, logits_of, one_tensor
from intarsia.tasks.metrics import Score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import Frame, special, word_pieces
from intarsia.tasks.trees import best_tree, cycle
from intarsia.train.task import Batch, Features, Prediction, Rows

Arc = tuple[int, str]
ROOT = "root"
PUNCTUATION = "punct"


@register("task.parse")
@dataclass(frozen=True, slots=True)
class ParseOptions(Options):
    """Settings of dependency parsing.

    Attributes:
        tokens: column of the words.
        heads: column of their heads: numbers, 0 for the root, one per word.
        relations: column of their relations, one per word.
        prefix: put before every sentence, e.g. `"query: "` for E5 models.
        arc_width, relation_width, dropout, standardise: of the head, see `intarsia.patches.Biaffine`.
        metric: the one that selects checkpoints: `las` (the default), `uas` or `las_no_punct`.
    """

    tokens: str = "tokens"
    heads: str = "heads"
    relations: str = "relations"
    prefix: str = ""
    arc_width: int = 256
    relation_width: int = 64
    dropout: float = 0.33
    standardise: bool = True
    metric: str = ""


class Parse(BaseTask[ParseOptions]):
    """A head and a relation for every word."""

    name = "parse"

    def __init__(self, tokenizer: Any, options: ParseOptions, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, options, labels)
        o = self.options
        self.answers = (o.heads, o.relations)
        self.frame = Frame.of(tokenizer, o.prefix)
        self.width = self.frame.room(self.max_length)
        self.head = Biaffine(tuple(labels), o.arc_width, o.relation_width, o.dropout, o.standardise)
        self.choose_metric(o.metric, ("las", "uas", "las_no_punct"))

    # -- what a table says -------------------------------------------------------------------------------------------

    def references(self, table: Rows) -> tuple[tuple[Arc, ...], ...]:
        """Head and relation of every word of all rows.

        Raises:
            DataError: not one head and one relation per word, a head that is no word of the sentence, or a cycle.
        """
        o, where = self.options, columns.where(table)
        words = columns.tokens(table, o.tokens, o.normalise)
        heads, relations = columns.tokens(table, o.heads), columns.tokens(table, o.relations, o.normalise)
        found = []
        for row, (w, h, r) in enumerate(zip(words, heads, relations)):
            if not len(w) == len(h) == len(r):
                raise DataError(f"{where(row)}: {len(w)} words, {len(h)} heads and {len(r)} relations; one of each per word was expected")
            found.append(tuple(zip(tree(h, where(row)), r)))
        return tuple(found)

    def label_cells(self, table: Rows) -> list[tuple[str, ...]]:
        """Nothing: relations that a parser cannot give are wrong answers, no errors."""
        return [() for _ in range(len(table))]

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """One feature per sentence: `row`, the model's inputs, `words` (position of every word), `labels` (head and
        relation of every word, one after the other) if the table has them.

        Raises:
            DataError: see `references`; or a sentence without words or with more words than the model has positions.
        """
        o, where = self.options, columns.where(table)
        words = columns.tokens(table, o.tokens, o.normalise)
        known = labelled and all(columns.has(table, name) for name in self.answers)
        arcs = self.references(table) if known else None
        assert self.labels is not None
        number = {name: i for i, name in enumerate(self.labels.names)}
        found: list[Features] = []
        counts: Counter[str] = Counter(shortened_rows=0, unknown=0)
        unk = special(self.tokenizer, "unk")
        for row, parts in enumerate(word_pieces(self.tokenizer, words, bool(o.prefix))):
            kept = self._fitting(parts, where(row))
            counts["shortened_rows"] += kept != parts
            ids = self.frame.wrap(i for part in kept for i in part)
            counts["unknown"] += 0 if unk is None else ids.count(unk)
            starts = np.cumsum([len(self.frame.before), *map(len, kept[:-1])]).tolist()
            feature = {"row": row, "input_ids": ids, "attention_mask": [1] * len(ids), "words": starts}
            if "token_type_ids" in self.keys:
                feature["token_type_ids"] = [0] * len(ids)
            if arcs is not None:
                feature["labels"] = [n for head, relation in arcs[row] for n in (head, number.get(relation, IGNORE))]
            found.append(feature)
        self._counts = counted(found, words=sum(map(len, words)), **counts, **self._skipped(table, arcs))
        return found

    def _fitting(self, parts: list[list[int]], where: str) -> list[list[int]]:
        """Pieces of every word, as many of each as fit."""
        if not parts:
            raise DataError(f"{where}: a sentence without words cannot be parsed")
        most = max(map(len, parts))
        while sum(min(len(part), most) for part in parts) > self.width:
            most -= 1
            if not most:
                raise DataError(
                    f"{where}: a sentence of {len(parts)} words, the model reads {self.width} pieces with max_length={self.max_length}; "
                    "split the sentence, or raise max_length if the base has more positions"
                )
        return [part[:most] for part in parts]

    def _skipped(self, table: Rows, arcs: Sequence[Sequence[Arc]] | None) -> dict[str, int]:
        """Lines of the file that are no words, and what about the trees is worth knowing."""
        found = {}
        if columns.has(table, "skipped"):
            ids = [i for row in columns.cells(table, "skipped") if not isinstance(row, str) for i in row]
            found["multiword_tokens"] = sum("-" in i for i in ids)
            found["empty_nodes"] = len(ids) - found["multiword_tokens"]
        if arcs is not None:
            assert self.labels is not None
            known = set(self.labels.names)
            found["punctuation"] = sum(is_punctuation(relation) for row in arcs for _, relation in row)
            found["unseen_relations"] = sum(relation not in known for row in arcs for _, relation in row)
            found["rows_with_several_roots"] = sum(sum(head == 0 for head, _ in row) > 1 for row in arcs)
        return found

    # -- batches and losses ------------------------------------------------------------------------------------------

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        width = batch["input_ids"].shape[1]
        ahead = [width - len(f["input_ids"]) if self.options.padding == "left" else 0 for f in features]
        batch["words"] = [[word + before for word in f["words"]] for f, before in zip(features, ahead)]
        if all("labels" in f for f in features):
            flat = self.padded(features, "labels", IGNORE, "right")
            batch["labels"] = flat.view(len(flat), -1, 2)
        return batch

    def context(self, batch: Batch) -> Mapping[str, Any]:
        return {"words": batch["words"]}

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Losses of all heads, then of all relations."""
        scores, labels = self._checked(one_tensor(logits_of(outputs)), self.labels), self.labels_of(batch)
        row, word = (labels[..., 0] != IGNORE).nonzero(as_tuple=True)
        heads, relations = labels[row, word].unbind(-1)
        counts = torch.tensor([len(w) for w in batch["words"]], device=scores.device)
        beyond = torch.arange(scores.shape[2], device=scores.device) > counts[row, None]
        arcs = scores[row, word, :, 0].masked_fill(beyond, -torch.inf)
        seen = relations != IGNORE
        chosen = scores[row, word, heads, 1:]
        losses = [F.cross_entropy(arcs, heads, reduction="none"), F.cross_entropy(chosen[seen], relations[seen], reduction="none")]
        return torch.cat(losses), torch.cat([row, row[seen]])

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """`[(head, relation), ...]`, one for each word."""
        statistics = self.row_scores(outputs, batch)
        found = []
        for i, (row, scores) in enumerate(zip(batch["row"], logits_of(outputs))):
            names, count = self.names_of(batch, i), len(batch["words"][i])
            scores = self._checked(scores, names)[:count, : count + 1]
            heads = best_tree(torch.log_softmax(scores[..., 0].double(), -1).cpu().numpy())
            relations = scores[torch.arange(count), torch.tensor(heads), 1:].cpu()
            if ROOT in names.names and len(names) > 1:
                is_root = torch.tensor([name == ROOT for name in names.names])
                top = (torch.tensor(heads) == 0)[:, None]
                relations = relations.masked_fill(top != is_root, -torch.inf)
            value = [(head, names.names[k]) for head, k in zip(heads, relations.argmax(-1).tolist())]
            found.append(Prediction(row, value, None, statistics[i]))
        return found

    def _checked(self, scores: Tensor, names: Any) -> Tensor:
        if scores.shape[-1] != 1 + len(names):
            raise ModuleError(
                f"{scores.shape[-1]} scores came for arcs and {len(names)} relations ({listing(names, 6)}); "
                "the expression that ran was trained on another set of relations, or is no parser"
            )
        return scores.float()

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`las` and `uas` over all words, punctuation too; `las_no_punct` over the others."""
        return self.score_all([p.value for p in predictions], self.references(table))


def tree(heads: Sequence[str], where: str) -> list[int]:
    """Heads as numbers.

    Raises:
        DataError: one is no number of a word or 0, or words lead to each other in a circle.
    """
    for word, head in enumerate(heads, 1):
        if not (head.isascii() and head.isdecimal()) or len(head) > 9 or int(head) > len(heads):
            raise DataError(f"{where}: the head of word {word} is {head!r}; 0 or the number of one of the {len(heads)} words was expected")
    numbers = [int(head) for head in heads]
    ring = cycle(numbers)
    if ring:
        raise DataError(f"{where}: the heads of words {listing(map(str, ring), 8)} form a cycle; a tree was expected")
    return numbers


def is_punctuation(relation: str) -> bool:
    """Whether a relation is `punct` or a subtype of it."""
    return relation.partition(":")[0] == PUNCTUATION


def _labels(options: ParseOptions, table: Rows) -> Sequence[str]:
    return columns.inventory(table, columns.tokens(table, options.relations, options.normalise), options.relations).names


def _make(tokenizer: Any, options: Any, labels: Sequence[str] | None) -> Parse:
    if labels is None:
        raise DataError("parsing needs the names of the relations")
    return Parse(tokenizer, options, labels)


TASKS.add(
    "parse",
    Kind(
        "parse",
        "a head and a relation for every word",
        ParseOptions,
        ("tokens", "heads", "relations"),
        ("tokens",),
        _make,
        _labels,
        headless=True,
    ),
)
