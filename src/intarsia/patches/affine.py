"""`Affine`: a linear map of the touched layer's input, beside the layer: y + s * F(dropout(x)) (LoRA's activation form).

At a linear layer this equals a change of its weight (law A1), computed without ever forming the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from intarsia._codec import register
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, dropped
from intarsia.patches.factors import Factor, FactorSpec, LowRank
from intarsia.patches.place import Place


class AffineForm(Form):
    """factor(dropout(input)), [..., in] -> [..., out]."""

    def __init__(self, factor: Factor, dropout: float) -> None:
        super().__init__()
        self.factor = factor
        self.dropout = dropout

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        return self.factor(dropped(seen.input, self.dropout, self.training))

    def as_linear(self) -> Linear | WhyNot:
        return Linear(self.factor.materialise(), None)


@register("affine")
@dataclass(frozen=True, slots=True)
class Affine:
    """A factor applied to the input of the touched layer."""

    factor: FactorSpec = field(default_factory=LowRank)
    dropout: float = 0.0

    def build(self, place: Place) -> AffineForm:
        return AffineForm(self.factor.build((place.site.features, place.reads), place), self.dropout)
