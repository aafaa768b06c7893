"""`Const`: a vector that does not look at the input (BitFit's shift, (IA)^3's rescaling)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from intarsia._codec import register
from intarsia.patches.delta import Form, Seen, WhyNot, reads_call
from intarsia.patches.factors import Factor, FactorSpec, spread
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


class FactorConstForm(Form):
    """The vector [features] that a factor stands for, or one per row."""

    def __init__(self, factor: Factor, spec: Const) -> None:
        super().__init__()
        self.factor = factor
        self.spec = spec

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        return spread(self.factor.given(seen).materialise(), h)

    def constant(self) -> Tensor | WhyNot:
        if reads_call(self) and self.factor.fixed({}) is None:
            return WhyNot("its vector is generated for the task of the call; export it for one task first")
        return self.factor.materialise()

    def export_for(self, context: Mapping[str, Any]) -> tuple[Const, dict[str, Tensor]] | None:
        found = self.factor.fixed(context)
        return None if found is None else (replace(self.spec, factor=None), {"value": found})

    def export(self) -> tuple[Const, dict[str, Tensor]] | None:
        return self.export_for({})


@register("const")
@dataclass(frozen=True, slots=True)
class Const:
    """One number per feature; `init` is `zeros` under `Add`, `ones` under `Mul`.

    Attributes:
        factor: how the vector is given; None for a plain trained one.
    """

    init: str = "zeros"
    factor: FactorSpec | None = None

    def build(self, place: Place) -> Form:
        size = place.site.features
        if self.factor is None:
            return ConstForm(place.parameter(size, fill=INITS[self.init]))
        return FactorConstForm(self.factor.build((size,), place.named("value"), self.init), self)
