"""`Pairs`: features turned and stretched two by two, in place (RoAd, Liao & Monz 2024, arXiv 2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.place import Place


class PairsFactor(Factor):
    """angle, length: [n/2].  Within a group, feature i is paired with feature i + group/2."""

    def __init__(self, angle: nn.Parameter, length: nn.Parameter, group: int) -> None:
        super().__init__()
        self.angle = angle
        self.length = length
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        half = self.group // 2
        first, second = same_dtype(x, self.angle).unflatten(-1, (-1, 2, half)).unbind(-2)
        cosine = (self.length * self.angle.cos()).view(-1, half)
        sine = (self.length * self.angle.sin()).view(-1, half)
        return torch.stack((first * cosine - second * sine, second * cosine + first * sine), -2).flatten(-3)

    def materialise(self) -> Tensor:
        n = 2 * len(self.angle)
        return self(torch.eye(n, dtype=self.angle.dtype, device=self.angle.device)).T


@register("pairs")
@dataclass(frozen=True, slots=True)
class Pairs:
    """One angle and one length per pair of features; the identity at the start."""

    group: int = 64

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> PairsFactor:
        n = shape[0]
        if len(shape) != 2 or n != shape[1] or self.group < 2 or self.group % 2 or n % self.group:
            raise SpecError(f"{place.site.name}: groups of {self.group} features (even) do not divide a width of {n}")
        return PairsFactor(place.parameter(n // 2), place.parameter(n // 2, fill=1.0), self.group)
