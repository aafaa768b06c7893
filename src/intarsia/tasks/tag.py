"""Token classification: a tag for every word.

A word's tag stands on its first piece.  Sentences longer than the window are read in overlapping windows, and each word is
learnt and answered exactly once, in the window that gives it most context; so there are as many loss terms as words, and
never fewer tags than words.  Words that give no piece (control characters only) are read as the unknown token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from intarsia._codec import register
from intarsia.data.spans import split_tag, to_iob2
from intarsia.errors import DataError, UsageError
from intarsia.patches import Head
from intarsia.tasks import columns
from intarsia.tasks.common import (
    IGNORE,
    BaseTask,
    Options,
    check_width,
    counted,
    logits_of,
    one_tensor,
    summed,
    token_losses,
)
from intarsia.tasks.metrics import Score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import Frame, best_window, special, windows, word_pieces
from intarsia.train.task import Batch, Features, Prediction, Rows

NO_WORD = -1
"""Word index of positions that answer for no word."""


@register("task.tag")
@dataclass(frozen=True, slots=True)
class TagOptions(Options):
    """Settings of token classification.

    Attributes:
        tokens: column of the words.
        tags: column of the tags, one per word.
        prefix: put before every window, e.g. `"query: "` for E5 models.
        overlap: pieces that neighbouring windows of a long sentence share; None for half a window.
        scheme: whether tags are entity spans (`B-PER`, `I-PER`, `O`; IOB1, IOB2 and BIOES are read alike) or not; `auto`
            looks at the label names.
        repair: write predicted spans as correct IOB2.
        metric: the one that selects checkpoints; empty for `span_f1`, or `token_accuracy` where there are no spans.
    """

    tokens: str = "tokens"
    tags: str = "tags"
    prefix: str = ""
    overlap: int | None = None
    scheme: Literal["auto", "spans", "none"] = "auto"
    repair: bool = False
    dropout: float = 0.1
    standardise: bool = True
    label_smoothing: float = 0.0
    metric: str = ""


class Tag(BaseTask[TagOptions]):
    """A tag for every word."""

    name = "tag"

    def __init__(self, tokenizer: Any, options: TagOptions, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, options, labels)
        self.answers = (options.tags,)
        self.frame = Frame.of(tokenizer, options.prefix)
        self.width = self.frame.room(self.max_length)
        self.overlap = self.width // 2 if options.overlap is None else options.overlap
        windows(0, self.width, self.overlap)  # refuse an overlap that leaves no step
        self.spans = is_span_scheme(labels) if options.scheme == "auto" else options.scheme == "spans"
        if options.repair and not self.spans:
            raise UsageError("repair=True needs tags of entity spans (B-, I-, O); these labels are none")
        self.head = Head(tuple(labels), pooling="token", dropout=options.dropout, standardise=options.standardise)
        self.choose_metric(options.metric, ("span_f1", "token_accuracy") if self.spans else ("token_accuracy",))

    def references(self, table: Rows) -> tuple[tuple[str, ...], ...]:
        """The tags of all rows; raises DataError where their number is not that of the words."""
        words = columns.tokens(table, self.options.tokens, self.options.normalise)
        tags = columns.tokens(table, self.options.tags, self.options.normalise)
        for row, (w, t) in enumerate(zip(words, tags)):
            if len(w) != len(t):
                raise DataError(f"{columns.where(table)(row)}: {len(w)} words but {len(t)} tags")
        return tags

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """One feature per window: `row`, the model's inputs, `word` (index of the word each position answers for) and, if
        the table has tags, `labels`.

        Raises:
            DataError: no rows, a column is missing, a tag is not in the inventory, or words and tags differ in number.
        """
        words = columns.tokens(table, self.options.tokens, self.options.normalise)
        tags: Sequence[Sequence[int]] | None = None
        if labelled and columns.has(table, self.options.tags):
            assert self.labels is not None
            tags = self.labels.encode_tags(self.references(table), columns.where(table))
        found: list[Features] = []
        split = unknown = 0
        unk = special(self.tokenizer, "unk")
        for row, parts in enumerate(word_pieces(self.tokenizer, words, bool(self.options.prefix))):
            ids = [i for part in parts for i in part]
            unknown += 0 if unk is None else ids.count(unk)
            mine = self._windows(row, ids, [len(part) for part in parts], None if tags is None else tags[row])
            split += len(mine) > 1
            found += mine
        self._counts = counted(found, split_rows=split, words=sum(map(len, words)), unknown=unknown)
        return found

    def _windows(
        self, row: int, ids: Sequence[int], lengths: Sequence[int], tags: Sequence[int] | None
    ) -> list[Features]:
        """Windows of one sentence; each word is answered in one of them."""
        cuts = windows(len(ids), self.width, self.overlap, flush=True)
        word_of = [[NO_WORD] * (end - start) for start, end in cuts]
        at = 0
        for word, length in enumerate(lengths):
            chosen = best_window(cuts, at, len(ids))
            word_of[chosen][at - cuts[chosen][0]] = word
            at += length
        return [self._feature(row, ids[start:end], answers, tags) for (start, end), answers in zip(cuts, word_of)]

    def _feature(self, row: int, ids: Sequence[int], answers: Sequence[int], tags: Sequence[int] | None) -> Features:
        full = self.frame.wrap(ids) or [special(self.tokenizer, "bos", "eos", "unk", "pad") or 0]
        before = [NO_WORD] * len(self.frame.before)
        word = [*before, *answers, *[NO_WORD] * (len(full) - len(before) - len(answers))]
        feature = {"row": row, "input_ids": full, "attention_mask": [1] * len(full), "word": word}
        if "token_type_ids" in self.keys:
            feature["token_type_ids"] = [0] * len(full)
        if tags is not None:
            feature["labels"] = [IGNORE if w == NO_WORD else tags[w] for w in word]
        return feature

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        batch["word"] = self.padded(features, "word", NO_WORD)
        if all("labels" in f for f in features):
            batch["labels"] = self.padded(features, "labels", IGNORE)
        return batch

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = one_tensor(logits_of(outputs))
        assert self.labels is not None
        return token_losses(check_width(logits, self.labels), self.labels_of(batch), smoothing)

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Per window `[(word, tag), ...]`; `finish` makes one list of tags per sentence."""
        scores = self.row_scores(outputs, batch)
        found = []
        for i, (row, logits) in enumerate(zip(batch["row"], logits_of(outputs))):
            names = self.names_of(batch, i)
            word = batch["word"][i].tolist()
            best = check_width(logits, names).argmax(-1).tolist()
            value = [(w, names.names[b]) for w, b in zip(word, best) if w != NO_WORD]
            found.append(Prediction(row, value, None, scores[i]))
        return found

    def combine(self, row: int, parts: Sequence[Prediction], table: Rows) -> Prediction:
        answered = dict(pair for part in parts for pair in part.value)
        count = len(table[row][self.options.tokens])
        missing = [word for word in range(count) if word not in answered]
        if missing:
            raise DataError(
                f"{columns.where(table)(row)}: {len(missing)} of {count} words got no tag, the first is word {missing[0] + 1}"
            )
        tags = [answered[word] for word in range(count)]
        return Prediction(row, list(to_iob2(tags)) if self.options.repair else tags, None, summed(parts))

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`span_f1` (spans as conlleval reads them) where the tags are spans, and `token_accuracy`."""
        return self.score_all([p.value for p in predictions], self.references(table))


def is_span_scheme(labels: Sequence[str]) -> bool:
    """Whether label names are those of entity spans: `O` or a prefix `B-`, `I-`, `E-`, `S-`, at least one with a prefix."""
    try:
        return {split_tag(label)[0] for label in labels} != {"O"}
    except DataError:
        return False


def _labels(options: TagOptions, table: Rows) -> Sequence[str]:
    return columns.inventory(table, columns.tokens(table, options.tags, options.normalise), options.tags).names


def _make(tokenizer: Any, options: Any, labels: Sequence[str] | None) -> Tag:
    if labels is None:
        raise DataError("tagging needs the names of the tags")
    return Tag(tokenizer, options, labels)


TASKS.add("tag", Kind("tag", "a tag for every word", TagOptions, ("tokens", "tags"), ("tokens",), _make, _labels, headless=True))
