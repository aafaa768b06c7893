"""`Sketch`: up @ S with a frozen S [r, in] that is never stored: LoRA-FA (random S; Zhang et al. 2023, arXiv 2308.03303) and
MiSS (S = [I I ... I]; Kang & Yin 2024, arXiv 2409.15371).  The backward pass keeps S x (r numbers) instead of x."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import DRAWS, Stream


class SketchFactor(Factor):
    """up [out, r]."""

    down: Tensor

    def __init__(self, up: nn.Parameter, down: Tensor) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("down", down, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(same_dtype(x, self.down), self.down), self.up)

    def materialise(self) -> Tensor:
        return self.up @ self.down


@register("sketch")
@dataclass(frozen=True, slots=True)
class Sketch:
    """A trained out-factor on a frozen in-factor, drawn from `seed` and the site's name."""

    rank: int = 8
    seed: int = 0
    draw: str = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")
        DRAWS[self.draw]

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> SketchFactor:
        if len(shape) != 2:
            raise SpecError(f"{place.site.name}: a sketch is for a matrix, found the shape {tuple(shape)}")
        out, inner = shape
        size = (self.rank, inner)
        down = place.buffer(size, lambda: DRAWS[self.draw](size, Stream(self.seed, place.label, "down")))
        return SketchFactor(place.parameter(out, self.rank, fill=INITS[init]), down)
