"""`Rows`: a matrix that is one number per row, for the op `Mul` (BOFT's output gain)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place


class RowsFactor(Factor):
    """value: [out, 1], the same for all columns."""

    def __init__(self, value: nn.Parameter, inner: int) -> None:
        super().__init__()
        self.value = value
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return same_dtype(x, self.value).sum(-1, keepdim=True) * self.value[:, 0]

    def materialise(self) -> Tensor:
        return self.value.expand(-1, self.inner)


@register("rows")
@dataclass(frozen=True, slots=True)
class Rows:
    """A number per row, starting at `start`."""

    start: str = "ones"

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> RowsFactor:
        if len(shape) != 2:
            raise SpecError(f"{place.site.name}: a number per row is for a matrix, found the shape {tuple(shape)}")
        out, inner = shape
        return RowsFactor(place.parameter(out, 1, fill=INITS[self.start]), inner)
