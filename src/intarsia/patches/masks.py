"""Masks over a tensor: chosen by trained scores (`TopMask`), by gates that can be exactly zero (`HardConcrete`), by pruning (`Ticket`).

| part | value | entries |
|---|---|---|
| `TopMask` | 1 for the largest abs(score) of a tensor, else 0; the gradient passes straight through | exactly ceil(keep * n) ones |
| `HardConcrete` | z * w, z a gate in [0, 1] drawn anew at every training step | as many as its gates leave, see `project` |
| `Ticket` | mask * (W + D), for a mask that starts full and is only ever thinned | as many as `keep` leaves |

Sources: Ramanujan et al. 2020 (arXiv 1911.13299), Zhao et al. 2020 (arXiv 2004.12406); Louizos et al. 2018 (arXiv 1712.01312),
Guo, Rush & Kim 2021 (arXiv 2012.07463); Frankle & Carbin 2019 (arXiv 1803.03635).  What is not here: when a tensor is
projected or pruned (`intarsia.methods.thinning`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, same_dtype
from intarsia.patches.factors import Dense, Factor, FactorSpec
from intarsia.patches.init import INITS
from intarsia.patches.matrix import canonical_shape
from intarsia.patches.place import Place
from intarsia.patches.sparse import Sparse


def largest(scores: Tensor, count: int) -> Tensor:
    """bool, like `scores`: the `count` largest; ties go to the first positions."""
    flat = scores.detach().flatten()
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(len(flat) - count + 1).values  # eight times as fast as sorting, and this runs in every forward
    chosen = flat > limit
    chosen[(flat == limit).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen.view(scores.shape)


class TopMaskFactor(Factor):
    """Ones at the `count` largest abs(scores)."""

    def __init__(self, scores: nn.Parameter, count: int) -> None:
        super().__init__()
        self.scores = scores
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.scores), self.materialise())

    def mask(self) -> Tensor:
        """bool, [shape]."""
        return largest(self.scores.abs(), self.count)

    def materialise(self) -> Tensor:
        size = self.scores.abs()
        return self.mask().to(size.dtype) + (size - size.detach())

    def export(self) -> tuple[FactorSpec, dict[str, Tensor]]:
        return KeptMask(), {"mask": self.mask()}


@register("top_mask")
@dataclass(frozen=True, slots=True)
class TopMask:
    """A trained mask that keeps a share of each tensor's entries.

    Attributes:
        keep: share of the entries that are one.
    """

    keep: float = 0.95

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise SpecError(f"a share of entries to keep lies above 0 and is at most 1, found {self.keep}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "kaiming") -> TopMaskFactor:
        scores = place.parameter(*shape, fill=INITS["kaiming"])
        return TopMaskFactor(scores, math.ceil(self.keep * scores.numel() - 1e-9))


class KeptMaskFactor(Factor):
    """A mask that is no longer trained: one bit an entry in a file."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask.to(x.dtype))

    def materialise(self) -> Tensor:
        return self.mask.float()


@register("kept_mask")
@dataclass(frozen=True, slots=True)
class KeptMask:
    """What `TopMask` leaves: the mask alone."""

    def build(self, shape: tuple[int, ...], place: Place, init: str = "ones") -> KeptMaskFactor:
        return KeptMaskFactor(place.buffer(shape, lambda: torch.ones(shape, dtype=torch.bool)))


LOW, HIGH = -1.5, 1.5
"""The interval that a gate is stretched to before it is cut to [0, 1]."""
_CLOSED = math.log(-LOW / HIGH)
_LEAST = 1e-4  # uniform noise stays this far from 0 and 1


def gate(alpha: Tensor, noise: Tensor | None) -> Tensor:
    """clip(sigmoid(logit(noise) + alpha) * (HIGH - LOW) + LOW, 0, 1), the noise being uniform; without noise its middle."""
    shift = 0.0 if noise is None else torch.logit(noise.clamp(_LEAST, 1 - _LEAST))
    return ((shift + alpha).sigmoid() * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_chance(alpha: Tensor) -> Tensor:
    """P(gate > 0)."""
    return (alpha - _CLOSED).sigmoid()


class HardConcreteFactor(Factor):
    """z * w; after `project` w alone, on the entries that were kept."""

    kept: Tensor
    chosen: Tensor

    def __init__(self, value: nn.Parameter, alpha: nn.Parameter, group: nn.Parameter | None, kept: Tensor, chosen: Tensor) -> None:
        super().__init__()
        self.value = value
        self.alpha = alpha
        self.alpha_group = group
        self.register_buffer("kept", kept)
        self.register_buffer("chosen", chosen)

    @property
    def projected(self) -> bool:
        """Whether the entries are chosen and the gates out of use."""
        return bool(self.chosen)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.value), self.materialise())

    def gates(self, sample: bool) -> Tensor:
        """z, [shape]: a draw, or the middle of the distribution."""
        z = gate(self.alpha, torch.rand_like(self.alpha) if sample else None)
        if self.alpha_group is not None:
            z = z * gate(self.alpha_group, torch.rand_like(self.alpha_group) if sample else None)
        return z

    def materialise(self) -> Tensor:
        if not self.projected:
            return self.value * self.gates(self.training)
        gone = self.alpha * 0.0 if self.alpha_group is None else self.alpha * 0.0 + self.alpha_group * 0.0
        return torch.where(self.kept, self.value + gone, 0.0)  # the gates stay part of the graph: their gradient is zero

    def expected_entries(self, official: bool) -> Tensor:
        """E of the number of entries that are not zero, []: the product of both gates' chances, or their sum as in the released code."""
        own = open_chance(self.alpha)
        if self.alpha_group is None:
            return own.sum()
        group = open_chance(self.alpha_group)
        return own.sum() + group.sum() if official else (own * group).sum()

    @torch.no_grad()
    def project(self, kept: Tensor) -> None:
        """Train w alone from now on, at the entries of the mask `kept`, from its gated value."""
        self.value.copy_(torch.where(kept, self.value * self.gates(False), 0.0))
        self.kept.copy_(kept)
        self.chosen.fill_(True)

    def export(self) -> tuple[FactorSpec, dict[str, Tensor]]:
        if not self.projected:
            return Dense(), {"value": (self.value * self.gates(False)).detach()}
        index = self.kept.flatten().nonzero()[:, 0].to(torch.int32 if self.kept.numel() < 2**31 else torch.int64)
        return Sparse(), {"index": index, "values": self.value.detach().flatten()[index.long()]}


@register("hard_concrete")
@dataclass(frozen=True, slots=True)
class HardConcrete:
    """A dense difference under gates.

    Attributes:
        alpha: start of the gates' logits.
        structured: one gate more for the whole tensor.
    """

    alpha: float = 5.0
    structured: bool = True

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> HardConcreteFactor:
        value = place.parameter(*shape, fill=INITS[init])
        group = place.parameter(1, fill=self.alpha) if self.structured else None
        kept = place.buffer(shape, lambda: torch.zeros(shape, dtype=torch.bool))
        chosen = place.buffer((1,), lambda: torch.zeros(1, dtype=torch.bool))
        return HardConcreteFactor(value, place.parameter(*shape, fill=self.alpha), group, kept, chosen)


class TicketForm(Form):
    """mask * (W + D).  `start` is the weight as the last forward pass of training met it."""

    mask: Tensor

    def __init__(self, value: nn.Parameter, mask: Tensor) -> None:
        super().__init__()
        self.value = value
        self.register_buffer("mask", mask)
        self.__dict__["start"] = None

    def forward(self, h: Any, seen: Seen) -> Tensor:
        if self.training:
            self.__dict__["start"] = h.detach()
        return torch.where(self.mask, same_dtype(h, self.value) + self.value, 0.0)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        if port != "weight" or base.weight is None:
            return WhyNot("a pruned tensor is a parameter, and there is none here")
        return Linear(torch.where(self.mask, base.weight + self.value, 0.0), None)

    @torch.no_grad()
    def thin(self, mask: Tensor, rewind: Tensor | None) -> None:
        """Take entries away; what is left goes back to the value D had (`rewind`), or to zero."""
        self.mask.logical_and_(mask)
        self.value.copy_(torch.where(self.mask, torch.zeros_like(self.value) if rewind is None else rewind, 0.0))


@register("ticket")
@dataclass(frozen=True, slots=True)
class Ticket:
    """A dense change of a parameter under a mask that training thins; enters by `Rot`, as what it gives stands for the weight."""

    def build(self, place: Place) -> TicketForm:
        shape = canonical_shape(place.site)
        mask = place.buffer(shape, lambda: torch.ones(shape, dtype=torch.bool))
        return TicketForm(place.parameter(*shape), mask)
