"""`Router`: the weights of the members of a mixture, and how their changes are laid together.

    scores = scorer(h, changes, what the call says)   [N], [R, N] or [R, T, N]
    w      = squash(sampler(scores))                  over the members that have something at this site
    change = V (sum of w_i * change_i)                V the identity unless `value`

A router is a form that is never run by itself: a mixture of an expression asks it (`compose.Mix(router=...)`), and gives it
the changes of its members.  Which scores there are is in `scores.py`; `phi` mixtures (of tensors) need weights that do not
look at the changes.

| axis | values |
|---|---|
| squash | `softmax`; `sigmoid`; `bernoulli`: sigmoid over its sum (Polytropon); `free`: the scores are the weights; `clamp`: cut to 0 ... 1 |
| sampler (training only) | `none`; `gumbel`: Gumbel noise on the scores; `relaxed`: logistic noise (relaxed Bernoulli) |
| hard | the largest weight as 1 in the forward, the gradient of the soft ones (straight-through) |
| top | only the k largest compete |
| scope | `site`, `layer`, `shared`: which sites have the same scorer |
| by | `token`, `example` (mean over its tokens), or whatever the scorer says by itself (`model`, `task`) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError
from intarsia.patches.bottleneck import Read, read
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, back, dropped, same_dtype
from intarsia.patches.gated import per_row
from intarsia.patches.init import Fill, normal
from intarsia.patches.place import Place

Squash = Literal["softmax", "sigmoid", "bernoulli", "free", "clamp"]
Sampler = Literal["none", "gumbel", "relaxed"]
Scope = Literal["site", "layer", "shared"]
Look = Literal["auto", "self", "normed", "reads", "residual", "input"]
Changes = Sequence[Tensor | None]


class Scorer(nn.Module):
    """Scores of all members, [N], [R, N] or [..., N] like `h`.

    `reads_changes` says whether it looks at the members' changes, `reads_call` whether it looks at what the call says of rows
    or tokens, `per_input` whether its scores depend on activations, `per_token` whether they differ within a row; `keys` are those of
    the call's context that it looks at.
    """

    reads_changes = False
    reads_call = False
    per_input = True
    per_token = True
    keys: frozenset[str] = frozenset()

    @property
    def fixed(self) -> bool:
        """Whether the scores are the same whatever comes."""
        return not (self.reads_changes or self.per_input or self.keys)

    def forward(self, h: Any, changes: Changes, seen: Seen) -> Tensor:
        raise NotImplementedError


@runtime_checkable
class ScorerSpec(Protocol):
    """A frozen, registered dataclass that builds a scorer for `members`."""

    def scorer(self, members: int, place: Place) -> Scorer: ...


def present(changes: Changes) -> list[int]:
    """Which members have something at a site."""
    return [i for i, change in enumerate(changes) if change is not None]


def looks(place: Place, what: Look) -> Read:
    """`auto` is the add-and-norm of a sub-layer, else the value at the site."""
    return what if what != "auto" else "normed" if place.site.residual is not None else "self"


def width_of(place: Place, what: Read, who: str = "these scores look") -> int:
    """Width of what a scorer looks at."""
    if place.site.port not in ("out", "in"):
        raise SpecError(f"{place.site.name}: {who} at activations, and port {place.site.port!r} has none")
    return place.reads if what == "input" else place.site.features


class AttentionScorer(Scorer):
    """(Q x + a) . (K change_i + b); query: [d, reads], key: [d, d], query_bias, key_bias: [d]."""

    reads_changes = True

    def __init__(self, query: nn.Parameter, query_bias: nn.Parameter, key: nn.Parameter, key_bias: nn.Parameter, spec: Attention, what: Read) -> None:
        super().__init__()
        self.query, self.query_bias = query, query_bias
        self.key, self.key_bias = key, key_bias
        self.spec = spec
        self.what = what

    def forward(self, h: Tensor, changes: Changes, seen: Seen) -> Tensor:
        x = same_dtype(read(h, seen, self.what), self.query)
        query = F.linear(x, self.query, self.query_bias)
        folded = query @ self.key  # q . (K c + b) = (K' q) . c + q . b: no projection per member
        parts = [(folded * same_dtype(c, folded)).sum(-1) if c is not None else folded.new_zeros(folded.shape[:-1]) for c in changes]
        scores = torch.stack(parts, -1) + (query @ self.key_bias)[..., None]
        return dropped(scores, self.spec.dropout, self.training) / self.spec.temperature


@register("attention_scores")
@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over the members' changes (AdapterFusion).

    Attributes:
        read: what the query looks at; `auto` is the add-and-norm of a sub-layer (`normed`), else h itself.
        dropout: on the scores, as the attention's own.
        temperature: divides the scores.
    """

    read: Look = "auto"
    dropout: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.dropout < 1:
            raise SpecError(f"attention needs a temperature above 0 and a dropout below 1, found {self}")

    def scorer(self, members: int, place: Place) -> AttentionScorer:
        what = looks(place, self.read)
        width, reads = place.site.features, width_of(place, what, "attention looks")
        fill: Fill = normal(0.02)
        return AttentionScorer(
            place.parameter(width, reads, fill=fill), place.parameter(width), place.parameter(width, width, fill=fill), place.parameter(width), self, what
        )


class RouterForm(Form):
    """Weights of `spec.parts`; value: [d, d] or None."""

    scorer: Scorer

    def __init__(self, spec: Router, scorer: Scorer, value: nn.Parameter | None, tied: bool) -> None:
        super().__init__()
        self.spec = spec
        self.value = value
        self.reads_call = scorer.reads_call
        if tied:
            self.__dict__["scorer"] = scorer
        else:
            self.scorer = scorer

    def forward(self, h: Any, seen: Seen) -> Any:
        raise CompositionError(f"at {seen.site.name} a router runs by itself; it gives the weights of a mixture: fuse({', '.join(self.spec.parts)}; router=NAME)")

    def weights(self, h: Any, changes: Changes, seen: Seen, top: int | None = None) -> tuple[Tensor, list[int]]:
        """Weights [..., n] of the n members that have something here, and which these are."""
        here = present(changes)
        scores = self.scorer(h, changes, seen)[..., here]
        return squashed(scores, self.spec, self._keep(top), self.training), here

    def mix(self, h: Any, changes: Changes, seen: Seen, top: int | None = None) -> Tensor:
        """The change of the mixture."""
        weights, here = self.weights(h, changes, seen, top)
        seen.note(self, weights, here)
        members: list[Tensor] = [c for c in changes if c is not None]
        return back(self.transformed(combined(weights, members, h)), h)

    def transformed(self, value: Tensor) -> Tensor:
        return value if self.value is None else F.linear(same_dtype(value, self.value), self.value)

    def constant_weights(self, members: list[int], top: int | None = None) -> Tensor | WhyNot:
        """The weights of some members where they are the same for every input."""
        if not self.scorer.fixed or self.value is not None:
            return WhyNot("its mixture is weighed for each input")
        scores = self.scorer(None, [None] * len(self.spec.parts), None)[members]
        return squashed(scores, self.spec, self._keep(top), False)

    def _keep(self, top: int | None) -> int | None:
        return min((k for k in (top, self.spec.top) if k is not None), default=None)

    def as_linear(self) -> Linear | WhyNot:
        return WhyNot("a router gives weights, not a change")


def squashed(scores: Tensor, spec: Router, keep: int | None, training: bool) -> Tensor:
    """Weights from scores, [..., n]."""
    if training and spec.sampler != "none":
        noise = torch.empty_like(scores).exponential_().clamp_(min=1e-20).log().neg()  # Gumbel
        if spec.sampler == "relaxed":
            noise = noise - torch.empty_like(scores).exponential_().clamp_(min=1e-20).log().neg()  # logistic
        scores = scores + noise
    scores = scores / spec.temperature
    size = scores.shape[-1]
    kept = None if keep is None or keep >= size else torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(keep, -1).indices, True)
    if spec.squash == "softmax":
        found = (scores if kept is None else scores.masked_fill(~kept, -torch.inf)).softmax(-1)
    else:
        found = scores if spec.squash == "free" else scores.clamp(0.0, 1.0) if spec.squash == "clamp" else scores.sigmoid()
        if kept is not None:
            found = found.masked_fill(~kept, 0.0)
        if spec.squash == "bernoulli":
            found = found / found.sum(-1, keepdim=True).clamp(min=1e-12)
    if spec.hard:
        one = F.one_hot(found.argmax(-1), size).to(found.dtype)
        found = one + found - found.detach()
    return found


def combined(weights: Tensor, changes: Sequence[Tensor], like: Tensor) -> Tensor:
    """Sum of w_i * change_i; weights [n], [R, n] or [..., n] with the leading dimensions of a change."""
    changes = [same_dtype(c, weights) for c in changes]
    if weights.dim() > 1 and weights.shape[:-1] == like.shape[:-1]:
        stacked = torch.stack([c.expand(like.shape[:-1] + c.shape[-1:]) for c in changes], -2)
        return (weights[..., None, :] @ stacked)[..., 0, :]
    total: Tensor | None = None
    for i, change in enumerate(changes):
        weight = weights[..., i]
        if weight.dim():
            change = change if change.dim() == like.dim() else change.expand_as(like)
            weight = per_row(weight, change)
        total = change * weight if total is None else total + change * weight
    assert total is not None
    return total


@register("router")
@dataclass(frozen=True, slots=True)
class Router:
    """Weights for the members of a mixture.

    Attributes:
        parts: the members, as text, in order.
        value: what is mixed goes through a trained map that starts at the identity.
        top: only so many compete.
        hard: the largest weight counts as 1, gradients are those of the soft weights.
    """

    parts: tuple[str, ...]
    scorer: ScorerSpec = field(default_factory=Attention)
    value: bool = False
    squash: Squash = "softmax"
    sampler: Sampler = "none"
    temperature: float = 1.0
    top: int | None = None
    hard: bool = False
    scope: Scope = "site"

    def __post_init__(self) -> None:
        if not self.parts:
            raise SpecError("a router weighs the members of a mixture: name them, parts=('a', 'b')")
        if len(set(self.parts)) != len(self.parts):
            raise SpecError(f"a router's members are named once each, found {self.parts}")
        if self.temperature <= 0 or (self.top is not None and not 1 <= self.top <= len(self.parts)):
            raise SpecError(f"a router needs a temperature above 0 and top between 1 and {len(self.parts)}, found {self.temperature} and {self.top}")

    def build(self, place: Place) -> RouterForm:
        site = place.site
        if site.port in ("mem", "seq", "logits"):
            raise SpecError(f"{site.name}: a router weighs changes of activations and weights; the port {site.port!r} has none")
        if self.value and site.port == "weight":
            raise SpecError(f"{site.name}: what is mixed there is a parameter, which no map goes over; use value=False")
        value = place.parameter(site.features, site.features, fill=near_identity) if self.value else None
        if self.scope == "site":
            return RouterForm(self, self.scorer.scorer(len(self.parts), place), value, False)
        key = ("router",) if self.scope == "shared" else ("router", site.stack, str(site.layer))
        return RouterForm(self, place.tied(key, lambda: self.scorer.scorer(len(self.parts), place)), value, True)


def near_identity(value: Tensor, generator: torch.Generator) -> None:
    """1 on the diagonal, 1e-6 beside it, as the released code of AdapterFusion."""
    value.fill_(1e-6).fill_diagonal_(1.0)
