"""`Const`: a vector that does not look at the input (BitFit's shift, (IA)^3's rescaling)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from intarsia._codec import register
from intarsia.patches.delta import Form, Seen
from intarsia.patches.init import INITS
from intarsia.patches.place import Place


class ConstForm(Form):
    """value [features], the same at every position."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self, h: Any, seen: Seen) -> Tensor:
        return self.value

    def constant(self) -> Tensor:
        return self.value


@register("const")
@dataclass(frozen=True, slots=True)
class Const:
    """One number per feature; `init` is `zeros` under `Add`, `ones` under `Mul`."""

    init: str = "zeros"

    def build(self, place: Place) -> ConstForm:
        return ConstForm(place.parameter(place.site.features, fill=INITS[self.init]))
