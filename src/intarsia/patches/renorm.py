"""`Renorm`: direction and length of a weight apart (DoRA, Liu et al. 2024, arXiv 2402.09353).

    W' = m * (W + s F) / ||W + s F||          row by row; m [out] trained, starting at the rows' norms

Computed beside the layer, from its output and its input, without the dense product: with g = m / ||W + s F||
the change is (g - 1) * (h - b) + g * s * F(x).  The norm has a closed form for a low-rank F and is a constant for the
gradient (`detach`, the paper's section 4.3).  The bias is not rescaled; dropout reaches the low-rank branch only.

AdapterHub's DoRA is another formula, m / ||W + F|| * (W x + b + s F x): `scaled_norm=False`, `whole=True`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, back, dropped
from intarsia.patches.factors import Factor, FactorSpec, LowRank
from intarsia.patches.place import Place


class RenormForm(Form):
    """magnitude: [out]."""

    squares: Tensor

    def __init__(self, factor: Factor, magnitude: nn.Parameter, squares: Tensor, spec: Renorm) -> None:
        super().__init__()
        self.factor = factor
        self.magnitude = magnitude
        self.spec = spec
        self.register_buffer("squares", squares, persistent=False)  # of the base's rows, which never change

    def gain(self, weight: Tensor) -> Tensor:
        """m / ||W + s F|| for every row, [out]."""
        with torch.no_grad() if self.spec.detach else nullcontext():
            scale = self.spec.scale if self.spec.scaled_norm else 1.0
            squares = self.factor.row_squares(weight.to(self.magnitude.dtype), scale, self.squares)
            norm = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return self.magnitude / norm

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        gain, bias = self.gain(seen.weight), seen.bias
        linear = h if bias is None or self.spec.whole else h - bias
        change = self.factor(dropped(seen.input, self.spec.dropout, self.training)) * (self.spec.scale * gain)
        return back(change, h) + linear * back(gain - 1.0, h)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        origin = base.origin or base
        if port != "out" or origin.weight is None or base.weight is None:
            return WhyNot("rows are renormed at the output of a linear layer")
        gain = self.gain(origin.weight)[:, None]
        weight = (gain - 1.0) * base.weight + gain * self.spec.scale * self.factor.materialise()
        if base.bias is None:
            return Linear(weight, None)
        if self.spec.whole or origin.bias is None:
            return Linear(weight, (gain[:, 0] - 1.0) * base.bias)
        return Linear(weight, (gain[:, 0] - 1.0) * (base.bias - origin.bias))


@register("renorm")
@dataclass(frozen=True, slots=True)
class Renorm:
    """A factor whose sum with the layer's weight is brought to trained row norms.

    Attributes:
        scale: of the factor, inside the norm.
        detach: the norm is a constant for the gradient.
        scaled_norm: the scale counts in the norm.
        whole: the layer's bias is rescaled with its rows.
    """

    factor: FactorSpec = field(default_factory=LowRank)
    scale: float = 1.0
    dropout: float = 0.0
    detach: bool = True
    scaled_norm: bool = True
    whole: bool = False

    def build(self, place: Place) -> RenormForm:
        out = place.site.features
        factor = self.factor.build((out, place.reads), place)
        squares = place.buffer((out,), lambda: place.base_weight().to(place.dtype).square().sum(1))
        magnitude = nn.Parameter(squares.sqrt())
        return RenormForm(factor, magnitude, squares, self)
