"""`Matrix`: the value is a tensor of the parameter's own shape (port `weight`): full fine-tuning, norms, biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from intarsia._codec import register
from intarsia.patches.delta import Form, Seen
from intarsia.patches.factors import Dense, Factor, FactorSpec
from intarsia.patches.place import Place
from intarsia.sites.address import Site


def canonical_shape(site: Site) -> tuple[int, ...]:
    """Shape of a parameter as (out, in), cut to the site's view: what a `Matrix` holds."""
    shape = tuple(reversed(site.shape)) if site.transposed and len(site.shape) == 2 else site.shape
    return (site.view.features, *shape[1:]) if site.view is not None else shape


class MatrixForm(Form):
    """The tensor a factor stands for."""

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, h: Any, seen: Seen) -> Tensor:
        return self.factor.materialise()

    def constant(self) -> Tensor:
        return self.factor.materialise()

    def export(self) -> tuple[Matrix, dict[str, Tensor]] | None:
        exported = self.factor.export()
        return None if exported is None else (Matrix(exported[0]), {f"factor.{k}": t for k, t in exported[1].items()})


@register("matrix")
@dataclass(frozen=True, slots=True)
class Matrix:
    """Change of a whole parameter."""

    factor: FactorSpec = field(default_factory=Dense)

    def build(self, place: Place) -> MatrixForm:
        return MatrixForm(self.factor.build(canonical_shape(place.site), place))
