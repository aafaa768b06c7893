"""`Bottleneck`: up(sigma(down(x))): adapters.  What x is (`read`) and where the value enters (`at`) make the variant.

| read | x | used by |
|---|---|---|
| `self` | h, as left by the modules before this one | Houlsby et al. 2019 |
| `normed` | LN(h + residual) (post-LN), h + residual (pre-LN) | Pfeiffer et al. 2020 |
| `reads` | what the sub-layer reads | parallel adapters, He et al. 2021 |
| `residual` | the skip connection | variants |
| `input` | the touched module's own input | - |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Seen, back, dropped
from intarsia.patches.factors import Dense, Factor, FactorSpec
from intarsia.patches.place import Place

Read = Literal["self", "normed", "reads", "residual", "input"]


def read(h: Tensor, seen: Seen, what: str) -> Tensor:
    """The tensor a form looks at."""
    if what == "self":
        return h
    if what == "normed":
        return seen.normed(h)
    return getattr(seen, what)


class BottleneckForm(Form):
    """[..., d] -> [..., width] -> [..., d]."""

    def __init__(
        self, down: Factor, up: Factor, down_bias: nn.Parameter, up_bias: nn.Parameter, spec: Bottleneck
    ) -> None:
        super().__init__()
        self.down = down
        self.up = up
        self.down_bias = down_bias
        self.up_bias = up_bias
        self.reading = spec.read
        self.activation = spec.activation
        self.dropout = spec.dropout

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        x = read(h, seen, self.reading)
        hidden = ACTIVATIONS[self.activation](self.down(x) + self.down_bias)
        return back(self.up(dropped(hidden, self.dropout, self.training)) + self.up_bias, h)


@register("bottleneck")
@dataclass(frozen=True, slots=True)
class Bottleneck:
    """An adapter of `width`, or of the model's width divided by `reduction`.

    Attributes:
        init: start of `down`; `up` starts at zero if `zero_up`, else likewise.
    """

    width: int | None = None
    reduction: float = 16.0
    activation: str = "relu"
    read: Read = "self"
    factor: FactorSpec = field(default_factory=Dense)
    init: str = "bert"
    zero_up: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            ACTIVATIONS[self.activation]
        if self.width is not None and self.width < 1:
            raise SpecError(f"adapter width must be at least 1, found {self.width}")

    def size(self, features: int) -> int:
        """Width of the bottleneck for a stream of `features`."""
        return self.width if self.width is not None else max(1, math.floor(features / self.reduction))

    def build(self, place: Place) -> BottleneckForm:
        features, reads = place.site.features, place.reads if self.read == "input" else place.site.features
        size = self.size(features)
        down = self.factor.build((size, reads), place, self.init)
        up = self.factor.build((features, size), place, "zeros" if self.zero_up else self.init)
        return BottleneckForm(down, up, place.parameter(size), place.parameter(features), self)


