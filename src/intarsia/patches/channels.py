"""`Columns`: whole input channels of a matrix, or output channels of another that are the same units of the model (S2FT).

A unit is a channel of the feed-forward layer or an attention head: columns of `down` and rows of `up` and `gate`, columns of `o`
and rows of `v`.  The paper (Yang et al. 2024, arXiv 2412.06289) permutes the model so that chosen units lie side by side, which
changes nothing it computes; here their positions are kept instead, so what is stored fits the base as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import ModuleError, SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import Stream
from intarsia.patches.sparse import rising


class ColumnsFactor(Factor):
    """values [out, k] in the columns index [k], or [k, in] in the rows; zero elsewhere."""

    index: Tensor

    def __init__(self, length: int, index: Tensor, values: nn.Parameter, rows: bool) -> None:
        super().__init__()
        self.length = length
        self.rows = rows
        self.register_buffer("index", index)
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        x = same_dtype(x, self.values)
        if not self.rows:
            return F.linear(x[..., self.index.long()], self.values)
        return x.new_zeros(*x.shape[:-1], self.length).index_copy(-1, self.index.long(), F.linear(x, self.values))

    def adopt(self, leaves: Mapping[str, Tensor]) -> None:
        """Make room for stored leaves, whose channels need not be as many as those of a fresh factor.

        Raises:
            ModuleError: they are not channels of this matrix and values for each.
        """
        index, values = leaves["index"], leaves["values"]
        axis = 0 if self.rows else 1
        shape = tuple(len(index) if i == axis else size for i, size in enumerate(self.values.shape))
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool or values.shape != shape:
            raise ModuleError(f"channels need a vector of positions and values of shape {shape}, found {tuple(index.shape)} {index.dtype} and {tuple(values.shape)}")
        if not rising(index, self.length):
            raise ModuleError(f"positions of channels must rise and lie below {self.length}")
        self.index = index.to(self.index.device, self.index.dtype)
        self.values = nn.Parameter(torch.zeros(shape, dtype=self.values.dtype, device=self.values.device), self.values.requires_grad)

    def materialise(self) -> Tensor:
        shape = (self.length, self.values.shape[1]) if self.rows else (self.values.shape[0], self.length)
        zero = torch.zeros(shape, dtype=self.values.dtype, device=self.values.device)
        return zero.index_copy(0 if self.rows else 1, self.index.long(), self.values)


@register("columns")
@dataclass(frozen=True, slots=True)
class Columns:
    """Whole columns (or rows) of a matrix, drawn from a seed.

    Attributes:
        share: of the units; at least one is chosen.
        block: neighbouring columns that are one unit.
        seed: of the choice.
        heads: in an attention, a unit is a head.
        coupled: the matrices of a sub-layer choose the same units; query heads that share keys and values are then one.
        rows: output channels instead of input channels.
    """

    share: float = 0.02
    block: int = 1
    seed: int = 0
    heads: bool = False
    coupled: bool = False
    rows: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0 or self.block < 1:
            raise SpecError(f"columns need a share above 0 and at most 1, and blocks of at least 1, found {self}")

    def unit(self, length: int, place: Place) -> int:
        """How many neighbours are one unit."""
        if not self.heads or not {"attn", "xattn"} & set(place.site.name.split(".")):
            return self.block
        if len(place.heads) != 2:
            raise SpecError(f"{place.site.name}: the size of its attention's heads is not known here; choose single channels (heads=false) or set block")
        count, size = place.heads
        return max(1, length // count) if self.coupled and not self.rows else size

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> ColumnsFactor:
        length = shape[0 if self.rows else -1]
        size = self.unit(length, place)
        if len(shape) != 2 or length % size:
            what = "rows" if self.rows else "columns"
            raise SpecError(f"{place.site.name}: {what} in blocks of {size} need a matrix with a multiple of as many, found shape {shape}")
        units = length // size
        count = max(1, int(self.share * units))
        label = place.site.name.rsplit(".", 2)[0] if self.coupled else place.label

        def chosen() -> Tensor:
            first = Stream(self.seed, "columns", label).distinct(count, units) * size
            return (first[:, None] + torch.arange(size)).flatten().to(torch.int32)

        k = count * size
        values = place.parameter(*((k, shape[1]) if self.rows else (shape[0], k)), fill=INITS[init])
        return ColumnsFactor(length, place.buffer((k,), chosen), values, self.rows)
