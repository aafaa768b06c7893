"""`Fourier`: n real coefficients at fixed positions of a spectrum, W = Re(IDFT2(F)) (FourierFT, Gao et al. 2024, arXiv 2405.03003).

Positions depend on the seed and the shape only, so that all matrices of one shape share them, as the paper prescribes.
`stream="torch"` takes them from `torch.randperm`, as the released code does: for modules that come from there.
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
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import Stream


class FourierFactor(Factor):
    """value: [n]; index: flat positions, [n]."""

    index: Tensor

    def __init__(self, value: nn.Parameter, index: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.value = value
        self.shape = shape
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.value), self.materialise())

    def materialise(self) -> Tensor:
        value = self.value.float()  # the transform is not defined below single precision
        spectrum = value.new_zeros(self.shape[0] * self.shape[1]).index_put((self.index,), value)
        return torch.fft.ifft2(spectrum.view(self.shape)).real.to(self.value.dtype)


@register("fourier")
@dataclass(frozen=True, slots=True)
class Fourier:
    """`count` trained coefficients.

    Attributes:
        start: initial coefficients; N(0, 1) (`unit`) in the released code, which therefore does not start at the base.
    """

    count: int = 1000
    seed: int = 777
    start: str = "unit"
    stream: Literal["philox", "torch"] = "philox"

    def positions(self, shape: tuple[int, int]) -> Tensor:
        """Flat positions, [count]."""
        size = shape[0] * shape[1]
        if self.stream == "torch":
            return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[: self.count]
        return Stream(self.seed, "fourier", f"{shape[0]}x{shape[1]}").distinct(self.count, size)

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> FourierFactor:
        if len(shape) != 2 or not 0 < self.count <= shape[0] * shape[1]:
            raise SpecError(f"{place.site.name}: {self.count} coefficients do not fit a spectrum of shape {tuple(shape)}")
        out, inner = shape
        index = place.buffer((self.count,), lambda: self.positions((out, inner)))
        return FourierFactor(place.parameter(self.count, fill=INITS[self.start]), index, (out, inner))
