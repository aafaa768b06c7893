"""`Head`: new outputs on the model's final hidden states (port `logits`): classification, tagging, language modelling.

Features of pretrained encoders share a large common component (for multilingual-e5-small the mean vector is most of the
norm), and a fresh linear head on them hardly learns.  A head therefore centres and scales its features with two fixed
vectors, measured once on training data (`calibrate`); they are part of the module and fold exactly into the linear map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Seen, dropped, same_dtype
from intarsia.patches.init import normal
from intarsia.patches.place import Place

Pooling = Literal["mean", "first", "last", "token"]


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """[B, T, d] -> [B, d]; `token` leaves the states as they are.

    `mean` and `last` need the mask to leave padding out; without one all positions count.
    """
    if how == "token":
        return states
    if how == "first":
        if mask is None:
            return states[:, 0]
        return states[torch.arange(len(states), device=states.device), mask.long().argmax(1)]
    if mask is None:
        return states.mean(1) if how == "mean" else states[:, -1]
    if how == "mean":
        weights = mask.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.long() * positions).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


class Standardised(Form):
    """A form that reads centred and scaled features.

    Args:
        spec: says whether (`standardise`) and of what (`pooling`).
        like: [..., d], for width, dtype and device.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, spec: Any, like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        if spec.standardise:
            d = like.shape[-1]
            self.register_buffer("mean", torch.zeros(d, dtype=like.dtype, device=like.device))
            self.register_buffer("scale", torch.ones(d, dtype=like.dtype, device=like.device))

    def features(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """What is centred and scaled, [B, d] or [B, T, d]."""
        return pool(states, mask, self.spec.pooling)

    def calibrate(self, features: Tensor) -> None:
        """Set centre and scale from features [N, d] of training rows."""
        if self.spec.standardise:
            self.mean.copy_(features.mean(0))
            deviation = features.std(0, unbiased=False)
            self.scale.copy_(1.0 / deviation.clamp(min=float(deviation.mean()) * 1e-2 + 1e-12))

    def standardised(self, x: Tensor) -> Tensor:
        """Features, centred and scaled."""
        return (x - self.mean) * self.scale if self.spec.standardise else x


class HeadForm(Standardised):
    """logits: [B, n] or, with `token` pooling, [B, T, n]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, spec: Head) -> None:
        super().__init__(spec, weight)
        self.weight = weight
        self.bias = bias

    def features(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """What the linear map reads before centring."""
        return same_dtype(super().features(states, mask), self.weight)

    def forward(self, h: Any, seen: Seen) -> Tensor:
        x = self.standardised(self.features(seen.input, seen.mask))
        return F.linear(dropped(x, self.spec.dropout, self.training), self.weight, self.bias)

    def export(self) -> tuple[Head, dict[str, Tensor]] | None:
        """The same head with centre and scale folded into the linear map."""
        if not self.spec.standardise:
            return None
        with torch.no_grad():
            weight = self.weight * self.scale
            return replace(self.spec, standardise=False), {"weight": weight, "bias": self.bias - weight @ self.mean}


@register("head")
@dataclass(frozen=True, slots=True)
class Head:
    """A linear head.

    Attributes:
        labels: names of the outputs in order; one name for regression.
        pooling: what is classified: the masked `mean`, the `first` or `last` token, or every `token`.
        problem: how the logits are read: `single` label, `multi` label, `regression`.
        standardise: centre and scale the features (see the module's docstring).
    """

    labels: tuple[str, ...]
    pooling: Pooling = "mean"
    problem: Literal["single", "multi", "regression"] = "single"
    dropout: float = 0.1
    standardise: bool = True

    def __post_init__(self) -> None:
        if not self.labels:
            raise SpecError("a head needs at least one label name (regression: one name for the value)")
        if len(set(self.labels)) != len(self.labels):
            raise SpecError(f"label names of a head must differ, found {self.labels}")

    def build(self, place: Place) -> HeadForm:
        n, d = len(self.labels), place.reads
        return HeadForm(place.parameter(n, d, fill=normal(0.02)), place.parameter(n), self)


class LanguageModelHeadForm(Form):
    """logits over the vocabulary, [B, T, V]: LN(act(dense(x))) @ embedding^T + bias."""

    dense: nn.Parameter
    dense_bias: nn.Parameter
    norm: nn.Parameter
    norm_bias: nn.Parameter
    bias: nn.Parameter

    def __init__(self, parameters: dict[str, nn.Parameter], spec: LanguageModelHead) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value)
        self.spec = spec

    def forward(self, h: Any, seen: Seen) -> Tensor:
        x = same_dtype(seen.input, self.dense)
        x = ACTIVATIONS[self.spec.activation](F.linear(x, self.dense, self.dense_bias))
        x = F.layer_norm(x, x.shape[-1:], self.norm, self.norm_bias, 1e-12)
        return F.linear(seen.unembedding(x), same_dtype(seen.embedding, x), self.bias)


@register("lm_head")
@dataclass(frozen=True, slots=True)
class LanguageModelHead:
    """A masked-LM head for a base that has none (Devlin et al. 2019), tied to the base's frozen word embeddings."""

    activation: str = "gelu"

    def build(self, place: Place) -> LanguageModelHeadForm:
        rows = place.embedding()
        if rows is None:
            raise SpecError("a language-model head is tied to the word embeddings, and this base has none")
        v, e = rows.shape
        d = place.reads
        near_identity = place.parameter(e, d, fill=normal(0.02))
        if e == d and place.device.type != "meta":
            with torch.no_grad():
                near_identity.add_(torch.eye(d, device=near_identity.device))
        return LanguageModelHeadForm(
            {
                "dense": near_identity,
                "dense_bias": place.parameter(e),
                "norm": place.parameter(e, fill=1.0),
                "norm_bias": place.parameter(e),
                "bias": place.parameter(v),
            },
            self,
        )
