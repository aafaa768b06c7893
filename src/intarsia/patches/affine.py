"""`Affine`: a linear map beside the layer: y + s * F(dropout(x)), x being the layer's input (LoRA's activation form).

At a linear layer this equals a change of its weight (law A1), computed without ever forming the product.  With
`read="self"` x is the tensor at the site itself: under `Rot` the output (or, at the port `weight`, the rows of W) is mapped
by F (laws A4 and A5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches import kernels
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, dropped
from intarsia.patches.factors import Factor, FactorSpec, LowRank, LowRankFactor
from intarsia.patches.matrix import canonical_shape
from intarsia.patches.place import Place

GENERATED = "its matrix is generated for the task of the call; export it for one task first"


class AffineForm(Form):
    """factor(dropout(x)), [..., in] -> [..., out]."""

    def __init__(self, factor: Factor, spec: Affine) -> None:
        super().__init__()
        self.factor = factor
        self.spec = spec

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        x = h if self.spec.read == "self" else seen.input
        return self.factor.given(seen)(dropped(x, self.spec.dropout, self.training))

    def into(self, h: Tensor, seen: Seen, scale: float, fresh: bool) -> Tensor | None:
        factor = self.factor
        x = h if self.spec.read == "self" else seen.input
        if type(factor) is not LowRankFactor or not kernels.usable(h, x, factor.down, factor.up):
            return None
        rate = self.spec.dropout if self.training else 0.0
        narrow = kernels.dropped_linear(x, factor.down, rate) if rate else F.linear(x, factor.down)
        return kernels.added(h, narrow, factor.up, None, scale, fresh and self.spec.read == "input")

    def as_linear(self) -> Linear | WhyNot:
        if self.spec.read == "self":
            return WhyNot("a map of a layer's output is affine in the layer's input only together with the layer")
        matrix = self.factor.fixed({})
        return WhyNot(GENERATED) if matrix is None else Linear(matrix, None)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        if self.spec.read == "input":
            return super().value_at(base, port)
        if base.weight is None:
            return WhyNot("there is no weight here to map")
        matrix = self.factor.fixed({})
        if matrix is None:
            return WhyNot(GENERATED)
        if port == "weight":  # the rows of W are what is mapped
            return Linear(base.weight @ matrix.T, None)
        if port == "in":
            return Linear(base.weight @ matrix, None)
        return Linear(matrix @ base.weight, None if base.bias is None else matrix @ base.bias)

    def export(self) -> tuple[Affine, dict[str, Tensor]] | None:
        return self.export_for({})

    def export_for(self, context: Mapping[str, Any]) -> tuple[Affine, dict[str, Tensor]] | None:
        exported = self.factor.export_for(context)
        if exported is None:
            return None
        factor, tensors = exported
        return Affine(factor, self.spec.dropout, self.spec.read), {f"factor.{k}": t for k, t in tensors.items()}


@register("affine")
@dataclass(frozen=True, slots=True)
class Affine:
    """A factor applied to the input of the touched layer, or to the tensor at the site itself."""

    factor: FactorSpec = field(default_factory=LowRank)
    dropout: float = 0.0
    read: Literal["input", "self"] = "input"

    def build(self, place: Place) -> AffineForm:
        width = place.reads
        if self.read == "self":
            width = canonical_shape(place.site)[-1] if place.site.port == "weight" else place.site.features
        elif place.site.port == "weight":
            raise SpecError(f"{place.site.name}: a parameter has no input to read; use read='self', or the port 'out'")
        outer = width if self.read == "self" else place.site.features
        return AffineForm(self.factor.build((outer, width), place), self)
