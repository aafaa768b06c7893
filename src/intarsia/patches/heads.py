"""`Head`: new outputs on the model's final hidden states (port `logits`): classification, tagging, language modelling.

Features of pretrained encoders share a large common component (for multilingual-e5-small the mean vector is most of the
norm), and a fresh linear head on them hardly learns.  A head therefore centres and scales its features with two fixed
vectors, measured once on training data (`calibrate`); they are part of the module and fold exactly into the linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from intarsia.patches.vocabulary import Words, words_of

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


class Hidden(nn.Module):
    """A layer before the last: weight [d, d], bias [d]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias


class HeadForm(Standardised):
    """logits: [B, n] or, with `token` pooling, [B, T, n]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, spec: Head, hidden: Sequence[Hidden] = ()) -> None:
        super().__init__(spec, weight)
        self.weight = weight
        self.bias = bias
        self.hidden = nn.ModuleList(hidden)

    def features(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """What the linear map reads before centring."""
        return same_dtype(super().features(states, mask), self.weight)

    def forward(self, h: Any, seen: Seen) -> Tensor:
        x = self.standardised(self.features(seen.input, seen.mask))
        for layer in self.hidden:
            x = ACTIVATIONS[self.spec.activation](F.linear(dropped(x, self.spec.dropout, self.training), layer.weight, layer.bias))  # type: ignore[arg-type]
        return F.linear(dropped(x, self.spec.dropout, self.training), self.weight, self.bias)

    def export(self) -> tuple[Head, dict[str, Tensor]] | None:
        """The same head with centre and scale folded into the first linear map."""
        if not self.spec.standardise:
            return None
        first = "hidden.0." if self.hidden else ""
        tensors = dict(self.named_parameters())
        with torch.no_grad():
            weight = tensors[f"{first}weight"] * self.scale
            folded = {f"{first}weight": weight, f"{first}bias": tensors[f"{first}bias"] - weight @ self.mean}
        return replace(self.spec, standardise=False), {**tensors, **folded}


@register("head")
@dataclass(frozen=True, slots=True)
class Head:
    """A linear head, or one of several layers.

    Attributes:
        labels: names of the outputs in order; one name for regression.
        pooling: what is classified: the masked `mean`, the `first` or `last` token, or every `token`.
        problem: how the logits are read: `single` label, `multi` label, `regression`.
        standardise: centre and scale the features (see the module's docstring).
        layers: linear maps; all but the last keep the width and are followed by the activation.
        activation: between layers.
    """

    labels: tuple[str, ...]
    pooling: Pooling = "mean"
    problem: Literal["single", "multi", "regression"] = "single"
    dropout: float = 0.1
    standardise: bool = True
    layers: int = 1
    activation: str = "tanh"

    def __post_init__(self) -> None:
        if not self.labels:
            raise SpecError("a head needs at least one label name (regression: one name for the value)")
        if len(set(self.labels)) != len(self.labels):
            raise SpecError(f"label names of a head must differ, found {self.labels}")
        if self.layers < 1:
            raise SpecError(f"a head has at least one layer, found {self.layers}")
        ACTIVATIONS[self.activation]

    def build(self, place: Place) -> HeadForm:
        n, d = len(self.labels), place.reads
        last = place.parameter(n, d, fill=normal(0.02)), place.parameter(n)
        hidden = [Hidden(place.parameter(d, d, fill=normal(0.02)), place.parameter(d)) for _ in range(self.layers - 1)]
        return HeadForm(*last, self, hidden)


class LanguageModelHeadForm(Form):
    """logits over the vocabulary, [B, T, V]: LN(act(dense(x))) @ embedding^T + bias, as far as the specification has these parts."""

    def __init__(self, parameters: dict[str, nn.Parameter], spec: LanguageModelHead, words: Words | None = None) -> None:
        super().__init__()
        self.__dict__["words"] = words  # shared with the embeddings
        for name in ("dense", "dense_bias", "norm", "norm_bias", "bias", "decoder"):
            self.register_parameter(name, parameters.get(name))
        self.spec = spec

    dense: nn.Parameter | None
    dense_bias: nn.Parameter
    norm: nn.Parameter | None
    norm_bias: nn.Parameter
    bias: nn.Parameter | None
    decoder: nn.Parameter | None
    words: Words | None

    def forward(self, h: Any, seen: Seen) -> Tensor:
        x = seen.input
        if self.spec.scale != 1.0:
            x = x * self.spec.scale
        if self.dense is not None:
            x = ACTIVATIONS[self.spec.activation](F.linear(same_dtype(x, self.dense), self.dense, self.dense_bias))
        if self.norm is not None:
            x = F.layer_norm(x, x.shape[-1:], self.norm, self.norm_bias, self.spec.epsilon)
        if self.decoder is not None:
            rows: Tensor = self.decoder
        else:
            rows = seen.embedding if self.words is None else self.words.rows(seen.embedding)
        x = seen.unembedding(x)
        return F.linear(x, same_dtype(rows, x), self.bias)


@register("lm_head")
@dataclass(frozen=True, slots=True)
class LanguageModelHead:
    """A language-model head for a base that has none (Devlin et al. 2019), tied to the base's frozen word embeddings, or to the
    vocabulary of its own module.

    Attributes:
        dense: a linear map and the activation in front.
        norm: a layer norm behind it.
        bias: one number per word.
        tied: to the word embeddings; else a matrix of its own, which starts from them.
        epsilon: of the norm.
        scale: of what the head reads (T5: width ** -0.5).
    """

    activation: str = "gelu"
    dense: bool = True
    norm: bool = True
    bias: bool = True
    tied: bool = True
    epsilon: float = 1e-12
    scale: float = 1.0

    def build(self, place: Place) -> LanguageModelHeadForm:
        rows = place.embedding()
        if rows is None:
            raise SpecError("a language-model head is tied to the word embeddings, and this base has none")
        words = words_of(place)
        v, e = rows.shape if words is None else (words.size, rows.shape[1])
        if words is not None and not self.tied:
            raise SpecError("a language-model head beside a vocabulary of the same module is tied to it")
        d = place.reads
        if not self.dense and e != d:
            raise SpecError(f"a language-model head without a dense layer reads {d} features and meets word embeddings of {e}")
        found: dict[str, nn.Parameter] = {}
        if self.dense:
            found["dense"] = place.parameter(e, d, fill=normal(0.02))
            if e == d and place.device.type != "meta":
                with torch.no_grad():
                    found["dense"].add_(torch.eye(d, device=found["dense"].device))
            found["dense_bias"] = place.parameter(e)
        if self.norm:
            found |= {"norm": place.parameter(e, fill=1.0), "norm_bias": place.parameter(e)}
        if self.bias:
            found["bias"] = place.parameter(v)
        if not self.tied:
            found["decoder"] = nn.Parameter(rows.detach().to(place.device, place.dtype).clone()) if place.device.type != "meta" else place.parameter(v, e)
        return LanguageModelHeadForm(found, self, words)
