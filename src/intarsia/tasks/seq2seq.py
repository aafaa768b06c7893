"""Sequence to sequence: translation and any other pair of a source and a target text.

Decoder inputs are made by the model's own shift (`prepare_decoder_input_ids_from_labels`, or the function of its modelling
file that its forward uses), so the task must be bound to the model: `intarsia.tasks.bind(task, model)`.

Languages may differ from row to row.  A tokenizer with language codes (NLLB, M2M100, mBART) puts the source's into the
input and the target's into the labels; generation starts from the same decoder inputs as training: whatever stands before the
first piece of the target.  So no `forced_bos_token_id` is needed, and a batch may mix target languages.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import DataError, UsageError, listing, nearest
from intarsia.tasks import columns
from intarsia.tasks.common import IGNORE, BaseTask, Options, counted, logits_of, one_tensor, pad, token_losses
from intarsia.tasks.metrics import METRICS, Score, score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import Frame, encode
from intarsia.train.task import Batch, Features, ModelHead, Prediction, Rows

Shift = Callable[[Tensor], Tensor]
Pair = tuple[str, str]


@register("task.seq2seq")
@dataclass(frozen=True, slots=True)
class Seq2SeqOptions(Options):
    """Settings of sequence-to-sequence tasks.

    Attributes:
        source, target: columns of the texts.
        prefix: put before every source, e.g. `"translate English to Swahili: "`.
        source_language, target_language: language codes as the tokenizer writes them (`swh_Latn`, `sw`, `sw_KE`).
        source_language_column, target_language_column: columns of such codes, for tables that mix languages.
        max_target_length: pieces of the target, special tokens included; None for `max_length`.
        generate: write a text for every row (scored by chrF and BLEU); otherwise likelihoods only.
        max_new_tokens, beams: of the generation; None for `max_target_length`.
        label_smoothing: share of the target spread evenly over the vocabulary, in training.
        metric: the one that selects checkpoints; empty for `chrf`, or `perplexity` without generation.
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    source_language: str | None = None
    target_language: str | None = None
    source_language_column: str | None = None
    target_language_column: str | None = None
    max_target_length: int | None = None
    generate: bool = True
    max_new_tokens: int | None = None
    beams: int = 1
    label_smoothing: float = 0.0
    metric: str = ""


class Seq2Seq(BaseTask[Seq2SeqOptions]):
    """A target text for each source text."""

    name = "seq2seq"
    model_head: ModelHead = "seq2seq-lm"

    def __init__(self, tokenizer: Any, options: Seq2SeqOptions, labels: Sequence[str] | None = None) -> None:
        options = _with_languages(tokenizer, options)
        super().__init__(tokenizer, options, None)
        self.answers = (options.target,)
        self.reads_answers = not options.generate
        self.writes = options.generate
        self.keys = ("input_ids", "attention_mask", "decoder_input_ids")
        self.shift: Shift | None = None
        self._frames: dict[str, Frame] = {}
        text = ("chrf", "bleu") if options.generate else ()
        self.choose_metric(options.metric, (*text, "perplexity"))
        self.higher_is_better = METRICS[self.metric].higher_is_better

    @property
    def target_length(self) -> int:
        """Pieces of a target, special tokens included."""
        return self.options.max_target_length or self.max_length

    def bind(self, model: Any) -> None:
        """Take the shift of the model that will run this task."""
        self.shift = own_shift(model)

    # -- languages ---------------------------------------------------------------------------------------------------

    def languages(self, table: Rows) -> list[Pair]:
        """Source and target language code of every row, empty where the tokenizer has none.

        Raises:
            DataError: a code in the table is unknown to the tokenizer.
        """
        o = self.options
        sides = []
        for fixed, column in (
            (o.source_language, o.source_language_column),
            (o.target_language, o.target_language_column),
        ):
            codes = [fixed or ""] * len(table) if column is None else list(columns.texts(table, column))
            if column is not None:
                first = {code: row for row, code in reversed(list(enumerate(codes)))}
                for code, row in first.items():
                    language_id(self.tokenizer, code, f"{columns.where(table)(row)}: ")
            sides.append(codes)
        return list(zip(*sides))

    def frame(self, language: str) -> Frame:
        """What stands around the pieces of a target in a language."""
        if language not in self._frames:
            with speaking(self.tokenizer, "", language):
                self._frames[language] = Frame.of(self.tokenizer, target=True)
        return self._frames[language]

    # -- features and batches ----------------------------------------------------------------------------------------

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """One feature per row: `row`, `input_ids`, `attention_mask`, `language` (of the target), `labels` if there are targets.

        Raises:
            DataError: no rows, a column is missing, or a language code is unknown.
        """
        o = self.options
        sources = [o.prefix + text for text in columns.texts(table, o.source, o.normalise)]
        targets = columns.texts(table, o.target, o.normalise) if labelled and columns.has(table, o.target) else None
        pairs = self.languages(table)
        found: list[dict[str, Any]] = [{} for _ in sources]
        counts: Counter[str] = Counter(truncated_targets=0)
        for pair in dict.fromkeys(pairs):
            rows = [row for row, other in enumerate(pairs) if other == pair]
            with speaking(self.tokenizer, *pair):
                encoded, more = encode(self.tokenizer, [sources[row] for row in rows], None, self.max_length)
                counts.update(more)
                for row, ids in zip(rows, encoded):
                    found[row] = {
                        "row": row,
                        "input_ids": ids["input_ids"],
                        "attention_mask": ids["attention_mask"],
                        "language": pair[1],
                    }
                if targets is None:
                    continue
                for row, labels in zip(rows, self._targets([targets[row] for row in rows])):
                    counts["truncated_targets"] += len(labels) > self.target_length
                    frame = self.frame(pair[1])
                    body = labels[len(frame.before) : len(labels) - len(frame.after)]
                    found[row]["labels"] = frame.wrap(body[: frame.room(self.target_length)])
        self._counts = counted(found, **counts)
        return found

    def _targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Labels of targets in the language that the tokenizer is set to."""
        return [list(ids) for ids in self.tokenizer(text_target=list(texts), verbose=False)["input_ids"]]

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        batch["language"] = [f["language"] for f in features]
        if all("labels" in f for f in features):
            batch["labels"] = self.padded(features, "labels", IGNORE, "right")
            batch["decoder_input_ids"] = self._shifted(batch["labels"])
        return batch

    def _shifted(self, labels: Tensor) -> Tensor:
        if self.shift is None:
            raise UsageError(
                "a seq2seq task needs the decoder's shift of its model: call intarsia.tasks.bind(task, model) first"
            )
        return self.shift(labels)

    def start(self, language: str) -> list[int]:
        """Decoder inputs before the first piece of a target: where generation begins."""
        frame = self.frame(language)
        return self._shifted(torch.tensor([frame.wrap([])]))[0, : len(frame.before) + 1].tolist()

    # -- losses and answers ------------------------------------------------------------------------------------------

    def wanted(self, batch: Batch) -> Tensor:
        """What each position is to predict, [B, T]; `IGNORE` where there is nothing to learn."""
        return self.labels_of(batch)

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return token_losses(one_tensor(logits_of(outputs)), self.wanted(batch), smoothing)

    def outputs(self, model: Any, batch: Batch) -> Any:
        """Teacher-forced outputs where there are targets."""
        return super().outputs(model, batch) if "labels" in batch else {}

    def generate(self, model: Any, batch: Batch) -> list[str]:
        """What the model writes for each source, in the target language of its row."""
        starts = pad([self.start(language) for language in batch["language"]], 0).to(batch["input_ids"].device)
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=starts,
            decoder_start_token_id=starts[:, 0].tolist(), do_sample=False, num_beams=self.options.beams,
            max_new_tokens=self.options.max_new_tokens or self.target_length,
        )  # fmt: skip
        texts: list[str] = self.tokenizer.batch_decode(written[:, starts.shape[1] :], skip_special_tokens=True)
        return texts

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """The generated text, or the log-likelihood of the target."""
        texts = outputs.get("texts") if hasattr(outputs, "get") else None
        found = []
        for i, (row, s) in enumerate(zip(batch["row"], self.row_scores(outputs, batch))):
            value: Any = -s["loss"] if s else None
            found.append(Prediction(row, value if texts is None else texts[i], None, s))
        return found

    def references(self, table: Rows) -> tuple[str, ...]:
        """The targets of all rows."""
        return columns.texts(table, self.options.target, self.options.normalise)

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`chrf` and `bleu` (sacreBLEU) with generation, and `perplexity` per piece of the target."""
        references = self.references(table)
        found = {}
        if self.options.generate:
            found = {name: score(name, [p.value for p in predictions], references) for name in ("chrf", "bleu")}
        found["perplexity"] = score(
            "perplexity", [p.scores["loss"] for p in predictions], [p.scores["terms"] for p in predictions]
        )
        return found


def _with_languages(tokenizer: Any, options: Seq2SeqOptions) -> Seq2SeqOptions:
    """Options with both languages known, if the tokenizer has language codes.

    Raises:
        UsageError: a language is missing, or given to a tokenizer that has no codes.
        DataError: a code is unknown.
    """
    source = options.source_language or options.source_language_column
    target = options.target_language or options.target_language_column
    if not hasattr(tokenizer, "src_lang"):
        if source or target:
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} has no language codes; leave the languages out "
                "(T5 and Marian models take them in the text: prefix='translate English to Swahili: ')"
            )
        return options
    if not target:
        options = replace(options, target_language=getattr(tokenizer, "tgt_lang", None))
    if not source and getattr(tokenizer, "tgt_lang", None):
        # whoever set the target set the source as well; otherwise it is the tokenizer's default, English
        options = replace(options, source_language=tokenizer.src_lang)
    for side in ("source", "target"):
        code = getattr(options, f"{side}_language")
        if code is None and getattr(options, f"{side}_language_column") is None:
            raise UsageError(
                f"{type(tokenizer).__name__} needs language codes: set {side}_language, or {side}_language_column"
            )
        if code is not None:
            language_id(tokenizer, code)
    return options


def own_shift(model: Any) -> Shift:
    """How a model turns labels into decoder inputs.

    Raises:
        UsageError: it is no encoder-decoder, or does not say.
    """
    method = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if method is not None:
        return lambda labels: method(labels=labels)
    function = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if function is None:
        raise UsageError(
            f"{type(model).__name__} does not say how labels become decoder inputs; task seq2seq needs an encoder-decoder"
        )
    config = model.config
    known = {
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": getattr(config, "decoder_start_token_id", None),
    }
    wanted = {name: known[name] for name in list(inspect.signature(function).parameters)[1:]}
    return lambda labels: function(labels, **wanted)


def language_id(tokenizer: Any, code: str, place: str = "") -> int:
    """Id of a language code.

    Raises:
        DataError: the tokenizer does not have it; codes like it are named.
    """
    tokens = getattr(tokenizer, "lang_code_to_token", None)
    codes = (
        list(tokens)
        if tokens
        else list(dict.fromkeys(getattr(tokenizer, "extra_special_tokens", None) or tokenizer.all_special_tokens))
    )
    if code not in codes:
        near = [c for c in codes if c.partition("_")[0] == code.partition("_")[0]]
        hint = f"; did you mean {listing(map(repr, near), 4)}?" if near else nearest(code, codes)
        raise DataError(
            f"{place}unknown language code {code!r}{hint} the tokenizer has {len(codes)}: {listing(codes, 6)}"
        )
    return int(tokenizer.convert_tokens_to_ids(tokens[code] if tokens else code))


@contextmanager
def speaking(tokenizer: Any, source: str, target: str) -> Iterator[None]:
    """Inside, a tokenizer with language codes reads `source` and writes `target`; empty codes leave it as it is."""
    before = {name: getattr(tokenizer, name) for name in ("src_lang", "tgt_lang") if hasattr(tokenizer, name)}
    if not before:
        yield
        return
    try:
        if target:
            tokenizer.tgt_lang = target
        if source:
            tokenizer.src_lang = source
        yield
    finally:
        tokenizer.tgt_lang = before.get("tgt_lang")
        tokenizer.src_lang = before["src_lang"]


TASKS.add(
    "seq2seq",
    Kind("seq2seq", "a target text for each source text", Seq2SeqOptions, ("source", "target"), ("source",), Seq2Seq),
)
