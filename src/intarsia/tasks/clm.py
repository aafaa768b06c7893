"""Causal language modelling: plain text, or completions of prompts.

A text is read behind a start token, so that its first piece is predicted too (the convention of lm-evaluation-harness:
`bos`, else `eos`).  Texts longer than the window are cut into windows that share one piece, which is context in the second:
every piece is a loss term exactly once, packed or not.  Of a prompt and its completion only the completion is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import DataError, UsageError
from intarsia.tasks import columns
from intarsia.tasks.common import IGNORE, BaseTask, Options, counted, logits_of, one_tensor, pad, summed, token_losses
from intarsia.tasks.metrics import METRICS, Score, score
from intarsia.tasks.registry import TASKS, Kind
from intarsia.tasks.text import Frame, pieces, special, windows
from intarsia.train.task import Batch, Features, ModelHead, Prediction, Rows


@register("task.clm")
@dataclass(frozen=True, slots=True)
class CausalOptions(Options):
    """Settings of causal language modelling.

    Attributes:
        text: column of plain text; not used where `prompt` and `completion` are set.
        prompt, completion: columns of prompts and of what follows them; both or neither.
        separator: put between prompt and completion (it belongs to the completion).
        pack: fill blocks of `max_length` with several plain texts, one after the other; they see each other.
        start: read every text behind a start token, if the tokenizer has one.
        end: learn to end with the tokenizer's end token.
        generate: answer prompts with generated text (scored by chrF and BLEU) instead of likelihoods only.
        max_new_tokens, beams: of the generation.
        label_smoothing: share of the target spread evenly over the vocabulary, in training.
        metric: the one that selects checkpoints; empty for `perplexity`, or `chrf` with `generate`.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    separator: str = " "
    pack: bool = False
    start: bool = True
    end: bool = True
    generate: bool = False
    max_new_tokens: int = 128
    beams: int = 1
    label_smoothing: float = 0.0
    metric: str = ""


class Causal(BaseTask[CausalOptions]):
    """Predict each piece from those before it."""

    name = "clm"
    model_head: ModelHead = "causal-lm"

    def __init__(self, tokenizer: Any, options: CausalOptions, labels: Sequence[str] | None = None) -> None:
        super().__init__(tokenizer, options, None)
        if (options.prompt is None) != (options.completion is None):
            raise UsageError(
                "prompt and completion are columns that come together; set both, or neither for plain text"
            )
        self.prompted = options.prompt is not None
        if self.prompted and options.pack:
            raise UsageError("pack=True is for plain text; completions must not see the prompts of other rows")
        if options.generate and not self.prompted:
            raise UsageError("generate=True needs prompts: set the columns prompt and completion")
        self.answers = (options.completion or options.text,)
        self.reads_answers = not options.generate
        self.writes = options.generate
        self.keys = ("input_ids", "attention_mask")
        frame = Frame.of(tokenizer)
        first = special(tokenizer, "bos", "eos")
        self.before = frame.before or ((first,) if options.start and first is not None else ())
        last = special(tokenizer, "eos")
        self.after = () if not options.end else frame.after or (() if last is None else (last,))
        if self.max_length < len(self.before) + len(self.after) + 2:
            raise UsageError(f"max_length={self.max_length} leaves no room for text")
        text = ("chrf", "bleu") if options.generate else ()
        self.choose_metric(options.metric, (*text, "perplexity", "bits_per_character"))
        self.higher_is_better = METRICS[self.metric].higher_is_better

    def features(self, table: Rows, *, labelled: bool = True) -> Sequence[Features]:
        """Windows or blocks: `row`, `input_ids`, `labels` (aligned with the ids, as in transformers), `owner` (the row of
        each position) if packed, `given` (number of leading tokens that are not predicted); with `generate` also `prompt`.

        Raises:
            DataError: no rows, or a column is missing.
        """
        return self._completions(table, labelled) if self.prompted else self._texts(table)

    def _texts(self, table: Rows) -> Sequence[Features]:
        o = self.options
        texts = columns.texts(table, o.text, o.normalise)
        streams: list[tuple[list[int], ...]] = []
        for row, ids in enumerate(pieces(self.tokenizer, texts)):
            body = [*ids, *self.after]
            full = [*self.before, *body] or [special(self.tokenizer, "eos", "unk", "pad") or 0]
            labels = [*[IGNORE] * len(self.before), *body]
            labels = [IGNORE, *labels[1 : len(full)]]  # nothing predicts the first position, packed or not
            streams.append((full, labels, [row] * len(full)))
        split = 0
        if o.pack:
            streams = [tuple([i for stream in streams for i in stream[part]] for part in range(3))]
        found: list[Features] = []
        for full, labels, owner in streams:
            cuts = windows(len(full), self.max_length, 1)
            split += len(cuts) > 1
            for start, end in cuts:
                learnt = [IGNORE, *labels[start + 1 : end]]
                given = next((i for i, label in enumerate(learnt) if label != IGNORE), end - start)
                cut = {"row": owner[start], "input_ids": full[start:end], "labels": learnt, "given": given}
                found.append({**cut, "attention_mask": [1] * (end - start), "owner": owner[start:end]})
        self._counts = counted(found, split_rows=0 if o.pack else split)
        self._counts["rows"] = len(texts)
        return found

    def _completions(self, table: Rows, labelled: bool) -> Sequence[Features]:
        o = self.options
        assert o.prompt is not None and o.completion is not None
        prompts = pieces(self.tokenizer, columns.texts(table, o.prompt, o.normalise))
        answers: list[list[int]] | None = None
        if labelled and columns.has(table, o.completion):
            answers = pieces(
                self.tokenizer, [o.separator + text for text in columns.texts(table, o.completion, o.normalise)]
            )
        found: list[Features] = []
        cut_prompts = cut_completions = 0
        for row, prompt in enumerate(prompts):
            answer = [] if answers is None else [*answers[row], *self.after]
            room = self.max_length - len(self.before)
            cut_completions += len(answer) > room
            answer = answer[:room]
            # the end of a prompt matters most
            kept = prompt[max(0, len(prompt) - (room - len(answer))) :]
            cut_prompts += len(kept) < len(prompt)
            head = [*self.before, *kept] or [special(self.tokenizer, "eos", "unk", "pad") or 0]
            feature: dict[str, Any] = {
                "row": row,
                "input_ids": [*head, *answer],
                "attention_mask": [1] * (len(head) + len(answer)),
                "given": len(head),
            }
            if answers is not None:
                feature["labels"] = [*[IGNORE] * len(head), *answer]
            found.append(
                {**feature, "prompt": [*self.before, *prompt][-self.max_length :] or head} if o.generate else feature
            )
        self._counts = counted(found, truncated_prompts=cut_prompts, truncated_completions=cut_completions)
        return found

    def collate(self, features: Sequence[Features]) -> Batch:
        batch = super().collate(features)
        batch["given"] = [f["given"] for f in features]
        if all("labels" in f for f in features):
            batch["labels"] = self.padded(features, "labels", IGNORE)
        if "owner" in features[0]:
            batch["owner"] = self.padded(features, "owner", -1)
        if "prompt" in features[0]:
            batch["prompt"] = pad([f["prompt"] for f in features], self.fill["input_ids"], "left")
            batch["prompt_mask"] = pad([[1] * len(f["prompt"]) for f in features], 0, "left")
        return batch

    def terms(self, batch: Batch) -> int:
        return int((self.labels_of(batch)[:, 1:] != IGNORE).sum())

    def wanted(self, batch: Batch) -> Tensor:
        """What each position is to predict, [B, T]: the piece behind it; `IGNORE` where there is none to learn."""
        return F.pad(self.labels_of(batch)[:, 1:], (0, 1), value=IGNORE)

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return token_losses(one_tensor(logits_of(outputs)), self.wanted(batch), smoothing)

    def context(self, batch: Batch) -> dict[str, Any]:
        """`prompt`: how many tokens of each row are given and not predicted; nothing else may be looked at in advance."""
        return {"prompt": batch["given"]}

    def generate(self, model: Any, batch: Batch) -> list[str]:
        """What the model writes after each prompt."""
        prompt = batch["prompt"]
        pad_id = self.fill["input_ids"]
        written = model.generate(
            input_ids=prompt, attention_mask=batch["prompt_mask"], do_sample=False, num_beams=self.options.beams,
            max_new_tokens=self.options.max_new_tokens, pad_token_id=pad_id,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(written[:, prompt.shape[1] :], skip_special_tokens=True)
        return [text.removeprefix(self.options.separator) for text in texts]

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """The generated text, or the log-likelihood; of a packed block one prediction for each row in it."""
        texts = outputs.get("texts") if hasattr(outputs, "get") else None
        if "labels" not in batch:
            return [Prediction(row, None if texts is None else texts[i]) for i, row in enumerate(batch["row"])]
        if "owner" not in batch:
            found = self.row_scores(outputs, batch)
            return [
                Prediction(r, -s["loss"] if texts is None else texts[i], None, s)
                for i, (r, s) in enumerate(zip(batch["row"], found))
            ]
        return self._by_owner(outputs, batch)

    def _by_owner(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Statistics of each row that has a piece in the batch, whichever block it stands in."""
        losses, _ = self.term_losses(outputs, batch)
        owner = batch["owner"]
        rows = owner[owner >= 0].unique()
        index = torch.searchsorted(rows, owner[:, 1:][self.labels_of(batch)[:, 1:] != IGNORE])
        sums = (
            torch.zeros(len(rows), dtype=torch.float64, device=losses.device)
            .index_add_(0, index, losses.double())
            .tolist()
        )
        counts = torch.bincount(index, minlength=len(rows)).tolist()
        return [
            Prediction(int(r), -s, None, {"loss": s, "terms": float(n)}) for r, s, n in zip(rows.tolist(), sums, counts)
        ]

    def combine(self, row: int, parts: Sequence[Prediction], table: Rows) -> Prediction:
        scores = summed(parts)
        if not scores:
            return parts[0]
        characters = len(columns.texts([table[row]], self.answers[0], self.options.normalise)[0])
        value = parts[0].value if self.options.generate else -scores["loss"]
        return Prediction(row, value, None, {**scores, "characters": float(characters)})

    def references(self, table: Rows) -> tuple[str, ...]:
        """The texts or completions of all rows."""
        return columns.texts(table, self.answers[0], self.options.normalise)

    def score(self, predictions: Sequence[Prediction], table: Rows) -> dict[str, Score]:
        """`perplexity` per piece and `bits_per_character` (the end token's cost included); `chrf`, `bleu` with `generate`."""
        references = self.references(table)
        found = {}
        if self.options.generate:
            found = {name: score(name, [p.value for p in predictions], references) for name in ("chrf", "bleu")}
        losses = [p.scores["loss"] for p in predictions]
        for name, unit in (("perplexity", "terms"), ("bits_per_character", "characters")):
            units = [p.scores[unit] for p in predictions]
            if not sum(units):
                raise DataError(f"{name}: these texts have nothing to predict")
            found[name] = score(name, losses, units)
        return found


TASKS.add(
    "clm",
    Kind("clm", "predict text, or what follows a prompt", CausalOptions, ("prompt", "completion", "text"), (), Causal),
)
