"""Few-shot classification over mask tokens (PERFECT, Mahabadi et al. 2022, arXiv 2204.01172).

The input is a text or pair with M mask tokens at its end (or start), without a pattern and without words for the labels.
Trained are label embeddings, a hinge loss for each mask; the answer is the nearest prototype, the best of the masks.
Prototypes are the mean states of the training rows; they are set before every evaluation in training and at its end
(`settle`), and stored with the module.  The head itself is `intarsia.patches.MultiMaskLabels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.patches.labels import MultiMaskLabels, MultiMaskLabelsForm, decide, hinges
from intarsia.tasks.classify import Classify, ClassifyOptions
from intarsia.tasks.common import check_width, logits_of, one_tensor
from intarsia.tasks.text import Frame, special
from intarsia.train.batches import evaluation_batches
from intarsia.train.evaluation import answered
from intarsia.train.task import Batch, Features, Prediction


class PrototypeClassify(Classify):
    """`classify` with `masks` of at least 1.

    Raises:
        UsageError: the tokenizer has no mask token, or settings of a linear head are given.
    """

    def __init__(self, tokenizer: Any, options: ClassifyOptions, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, options, labels)
        token = special(tokenizer, "mask")
        if token is None:
            raise UsageError(f"masks={options.masks}: the tokenizer {type(tokenizer).__name__} has no mask token; use an encoder trained with one, or masks=0")
        if options.problem != "single" or options.label_smoothing:
            raise UsageError("masks: label embeddings answer with one label and learn by a hinge loss; leave problem and label_smoothing as they are")
        self.token = token
        self.frame = Frame.of(tokenizer)
        self.head = MultiMaskLabels(tuple(labels), options.masks, token)

    @property
    def room(self) -> int:
        return self.max_length - self.options.masks

    def complete(self, ids: dict[str, list[int]]) -> dict[str, list[int]]:
        """The input with its mask tokens; mask tokens that a text contains become unknown ones."""
        count, pieces = self.options.masks, ids["input_ids"]
        plain = special(self.tokenizer, "unk", "pad")
        text = [plain if piece == self.token and plain is not None else piece for piece in pieces]
        at = len(self.frame.before) if self.options.mask_place == "start" else len(pieces) - len(self.frame.after)
        at = min(max(at, 0), len(pieces))
        filled = {}
        for key, values in ids.items():
            more = {"input_ids": self.token, "attention_mask": 1}.get(key, values[max(at - 1, 0)])
            values = text if key == "input_ids" else values
            filled[key] = [*values[:at], *[more] * count, *values[at:]]
        return filled

    # -- losses and answers ------------------------------------------------------------------------------------------

    def term_losses(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The hinge losses of the rows, each the mean over its masks."""
        scores, labels = one_tensor(logits_of(outputs)), self.labels_of(batch)
        assert self.labels is not None
        losses = hinges(check_width(scores, self.labels), labels, self.options.margin)
        return losses, torch.arange(len(labels), device=labels.device)

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Label name, and the similarities to the labels as shares of their sum."""
        scores = self.row_scores(outputs, batch)
        found = []
        for i, (row, logits) in enumerate(zip(batch["row"], logits_of(outputs))):
            names = self.names_of(batch, i)
            best = decide(check_width(logits, names)[None])[0]
            # before there are prototypes the scores are products, of any sign
            shares = best / best.sum() if bool((best > 0).all()) else torch.softmax(best, -1)
            found.append(Prediction(row, names.names[int(best.argmax())], dict(zip(names, shares.tolist())), scores[i]))
        return found

    def settle(self, host: Any, name: str, expression: Any, features: Sequence[Features], batch_size: int) -> None:
        """Set the prototypes of a module from labelled features.

        Raises:
            ModuleError: the module has no label embeddings.
            SpecError: a label has no feature.
        """
        forms = [delta.form for _, deltas in host.deltas(name) for delta in deltas if isinstance(delta.form, MultiMaskLabelsForm)]
        if len(forms) != 1:
            raise ModuleError(f"module {name!r} has {len(forms)} heads with label embeddings; this task needs one")
        states: list[Tensor] = []
        labels: list[Tensor] = []
        hook = forms[0].register_forward_pre_hook(lambda form, args: states.append(form.features(args[1]).detach().float().cpu()))
        try:
            answered(
                host, expression, self, evaluation_batches(self, features, batch_size),
                lambda number, batch, outputs: labels.append(self.labels_of(batch).cpu()), head=name,
            )  # fmt: skip
        finally:
            hook.remove()
        forms[0].fit_prototypes(torch.cat(states), torch.cat(labels))
