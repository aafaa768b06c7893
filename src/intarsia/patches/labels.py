"""`MultiMaskLabels`: labels as embeddings over several mask tokens (PERFECT, Mahabadi et al. 2022, arXiv 2204.01172).

The input ends in M mask tokens; h_i is the final hidden state at the i-th.  Each label y has a trained vector per mask:

    training    s[y, i] = h_i . L[y, i], a hinge loss per mask (`hinge`)
    afterwards  s[y, i] = exp(-|h_i - c[y, i]|^2) with unit vectors, c the mean of h_i over the training rows of y

The label embeddings are a way to train the features; what answers is the nearest prototype, best over the masks.  As in the
released code vectors are normalised (the paper's formula has no norm) and the model's own head is not used.  Putting the
mask tokens into the text and collecting features of training rows are matters of the task (`intarsia.tasks.prototypes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError
from intarsia.patches.delta import Form, Seen, same_dtype
from intarsia.patches.init import normal
from intarsia.patches.place import Place

KEY = "mask_positions"
"""Key of the call's context: positions of the mask tokens, [B, M], where the token ids do not show them."""


def hinges(scores: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Multi-class hinge losses [B] of scores [B, M, n] and labels [B]: the mean over masks of
    (1 / n) * sum over k != y of max(0, margin - s_y + s_k)."""
    count = scores.shape[1]
    each = F.multi_margin_loss(scores.flatten(0, 1), labels.repeat_interleave(count), margin=margin, reduction="none")
    return each.view(-1, count).mean(1)


def hinge(scores: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """The mean of `hinges` over rows."""
    return hinges(scores, labels, margin).mean()


def decide(scores: Tensor) -> Tensor:
    """Scores of labels, [B, n], from scores per mask [B, M, n]: the best mask counts."""
    return scores.amax(1)


class MultiMaskLabelsForm(Form):
    """scores [B, M, n]; labels: [n, M, d]; prototypes: [n, M, d] (unit vectors), zero until `fit_prototypes`."""

    reads_call = True

    def __init__(self, labels: nn.Parameter, spec: MultiMaskLabels) -> None:
        super().__init__()
        self.labels = labels
        self.spec = spec
        self.register_buffer("prototypes", torch.zeros_like(labels, requires_grad=False))
        self.prototypes: Tensor

    @property
    def fitted(self) -> bool:
        """Whether prototypes answer."""
        return bool(self.prototypes.any())

    def features(self, seen: Seen) -> Tensor:
        """States at the mask tokens, [B, M, d]."""
        states = seen.input
        where = self.positions(seen)
        return same_dtype(states[torch.arange(len(states), device=states.device)[:, None], where], self.labels)

    def positions(self, seen: Seen) -> Tensor:
        """Positions of the mask tokens, [B, M]."""
        count, token, ids = self.spec.masks, self.spec.mask_token, seen.ids
        if token is None or ids is None:
            return torch.tensor(seen.per_row(KEY), device=seen.input.device).view(-1, count)
        found = ids == token
        if not bool((found.sum(1) == count).all()):
            raise CompositionError(
                f"every row needs {count} mask tokens (id {token}) for its label, found {sorted(set(found.sum(1).tolist()))}"
            )
        return found.nonzero()[:, 1].view(-1, count)

    def forward(self, h: Any, seen: Seen) -> Tensor:
        features = self.features(seen)
        if self.training or not self.fitted:
            return torch.einsum("bmd,nmd->bmn", features, self.labels)
        apart = F.normalize(features, dim=-1)[:, None] - self.prototypes
        return torch.exp(-apart.square().sum(-1)).transpose(1, 2)

    @torch.no_grad()
    def fit_prototypes(self, features: Tensor, labels: Tensor) -> None:
        """Set the prototypes from the states at the masks [N, M, d] of training rows with labels [N].

        Raises:
            SpecError: a label has no row.
        """
        count = len(self.spec.labels)
        sizes = torch.bincount(labels.long().cpu(), minlength=count)
        empty = [name for name, size in zip(self.spec.labels, sizes.tolist()) if not size]
        if empty:
            raise SpecError(f"no training row has the label {empty[0]!r}, so it has no prototype")
        for number in range(count):
            self.prototypes[number] = F.normalize(features[labels == number].mean(0), dim=-1).to(self.prototypes)


@register("multi_mask_labels")
@dataclass(frozen=True, slots=True)
class MultiMaskLabels:
    """Label embeddings over `masks` mask tokens.

    Attributes:
        labels: names of the labels in order.
        mask_token: id of the mask token; None if the call gives the positions (`mask_positions=`).
        std: of the start (the paper's best; verbalisers are worse).
    """

    labels: tuple[str, ...]
    masks: int = 2
    mask_token: int | None = None
    std: float = 1e-4

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise SpecError(f"label embeddings need at least two labels, all different, found {self.labels}")
        if self.masks < 1:
            raise SpecError(f"there must be at least one mask token, found {self.masks}")

    def build(self, place: Place) -> MultiMaskLabelsForm:
        shape = (len(self.labels), self.masks, place.reads)
        return MultiMaskLabelsForm(place.parameter(*shape, fill=normal(self.std)), self)


__all__ = ["KEY", "MultiMaskLabels", "MultiMaskLabelsForm", "decide", "hinge", "hinges"]
