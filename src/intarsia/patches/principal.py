"""Low-rank factors that start inside the base weight: PiSSA (Meng et al. 2024, arXiv 2404.02948) and its relatives.

The papers move the start B0 A0 out of the weight and train B A on what is left.  Here the base stays as it is and the factor
stands for B A - B0 A0, zero at first; as a plain product it has twice the rank (`export`), which is how it is kept after
training.

| start | of the weight W = U S V^T | paper |
|---|---|---|
| `major` | the largest singular values, their roots on both sides | PiSSA |
| `minor` | the smallest | MiLoRA (Wang et al. 2024, arXiv 2406.09044) |
| `qr` | the first columns of Q and rows of R | OLoRA (Bueyuekakyuez 2024, arXiv 2406.01775) |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor, LowRank
from intarsia.patches.place import Place
from intarsia.patches.spectrum import check_rank, leading, thin


class RebasedFactor(Factor):
    """up @ down - up0 @ down0: [out, r], [r, in]; the start is stored, not recomputed."""

    up0: Tensor
    down0: Tensor

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(up.clone())
        self.down = nn.Parameter(down.clone())
        self.register_buffer("up0", up)
        self.register_buffer("down0", down)

    def forward(self, x: Tensor) -> Tensor:
        # two products and not one of twice the rank: at the start their difference is zero to the bit
        x = same_dtype(x, self.down)
        return F.linear(F.linear(x, self.down), self.up) - F.linear(F.linear(x, self.down0), self.up0)

    def materialise(self) -> Tensor:
        return self.up @ self.down - self.up0 @ self.down0

    def export(self) -> tuple[LowRank, dict[str, Tensor]]:
        up, down = torch.cat([self.up, -self.up0], 1), torch.cat([self.down, self.down0])
        return LowRank(down.shape[0]), {"up": up, "down": down}


@register("principal")
@dataclass(frozen=True, slots=True)
class Principal:
    """A product that starts as a part of the weight, minus that start.

    Attributes:
        scale: by which the op multiplies the factor; the start is divided by it.
    """

    rank: int = 8
    start: Literal["major", "minor", "qr"] = "major"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")

    def sides(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B0 [out, r] and A0 [r, in]."""
        check_rank(self.rank, weight)
        if self.start == "qr":
            q, r = torch.linalg.qr(weight.detach().to("cpu", torch.float64))
            return (q[:, : self.rank] / self.scale).float(), r[: self.rank].float()
        if self.start == "major":
            u, s, vt = leading(weight, self.rank)
        else:
            whole = thin(weight)
            u, s, vt = whole[0][:, -self.rank :], whole[1][-self.rank :], whole[2][-self.rank :]
        root = (s / self.scale).sqrt()
        return u * root, root[:, None] * vt

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> RebasedFactor:
        if place.device.type == "meta":
            check_rank(self.rank, torch.empty(shape, device="meta"))
            return RebasedFactor(place.parameter(shape[0], self.rank).data, place.parameter(self.rank, shape[1]).data)
        weight = place.base_weight()
        if tuple(weight.shape) != tuple(shape):
            raise SpecError(f"{place.site.name}: the weight there is {tuple(weight.shape)}, what starts from it would be {tuple(shape)}")
        up, down = (side.to(place.device, place.dtype).contiguous() for side in self.sides(weight))
        return RebasedFactor(up, down)
