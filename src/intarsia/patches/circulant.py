"""`Circulant`: blocks [b, b] in which every row is the one above, shifted by one (C3A, Chen et al. 2024, arXiv 2407.19342).

W[a, e][i, j] = kernel[a, e, (j - i) mod b] / in, applied by the fast Fourier transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place


class CirculantFactor(Factor):
    """kernel: [out/b, in/b, b]."""

    def __init__(self, kernel: nn.Parameter) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        _, columns, b = self.kernel.shape
        x = same_dtype(x, self.kernel).unflatten(-1, (columns, b))
        turned = torch.fft.rfft(self.kernel.float()).conj()
        y = torch.einsum("aef,...ef->...af", turned, torch.fft.rfft(x.float()))
        return (torch.fft.irfft(y, b).flatten(-2) / (columns * b)).to(self.kernel.dtype)

    def materialise(self) -> Tensor:
        rows, columns, b = self.kernel.shape
        step = torch.arange(b, device=self.kernel.device)
        blocks = self.kernel[..., (step[None, :] - step[:, None]) % b]
        return blocks.transpose(1, 2).reshape(rows * b, columns * b) / (columns * b)


@register("circulant")
@dataclass(frozen=True, slots=True)
class Circulant:
    """Circulant blocks of size `block`, which divides both sides; `start` is the kernels' initial value."""

    block: int = 256
    start: str = "glorot"

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> CirculantFactor:
        if len(shape) != 2 or self.block < 1 or shape[0] % self.block or shape[1] % self.block:
            raise SpecError(f"{place.site.name}: circulant blocks of {self.block} do not tile a matrix of shape {tuple(shape)}")
        rows, columns = (s // self.block for s in shape)
        return CirculantFactor(place.parameter(rows, columns, self.block, fill=INITS[self.start]))
