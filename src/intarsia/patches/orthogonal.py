"""Orthogonal factors: `Cayley` blocks (OFT, Qiu et al. 2023, arXiv 2306.07280), `Butterfly` products of them (BOFT, Liu et al.
2024, arXiv 2311.06243) and `Householder` reflections (HRA, Yuan et al. 2024, arXiv 2405.17484).

Each stands for R^T, so that applied to the rows of a weight it gives W R (op `Rot`, port `weight`): y = W R x, a rotation of
what the layer reads.  R = I at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import kaiming
from intarsia.patches.place import Place


def _square(shape: tuple[int, ...], place: Place) -> int:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise SpecError(f"{place.site.name}: an orthogonal factor is square, found the shape {tuple(shape)}")
    return shape[0]


def skew(entries: Tensor, b: int) -> Tensor:
    """Skew-symmetric matrices [..., b, b] from the entries above their diagonals, [..., b (b - 1) / 2], row by row."""
    row, column = torch.triu_indices(b, b, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], b, b)
    upper[..., row, column] = entries
    return upper - upper.transpose(-1, -2)


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """(I - Q)(I + Q)^-1 of skew Q [..., b, b]: orthogonal.

    Args:
        terms: of the truncated series I - 2Q + 2Q^2 - ... + Q^(terms-1) instead (peft's default, with 5): faster for large
            blocks, and orthogonal for small Q only.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
    if terms is None:
        return torch.linalg.solve(eye + q, eye - q)
    total, power = eye, eye
    for k in range(1, terms):
        power = power @ -q
        total = total + power * (1.0 if k == terms - 1 and k > 2 else 2.0)
    return total


class CayleyFactor(Factor):
    """angles: [blocks, b (b - 1) / 2]; one block if all are the same."""

    def __init__(self, angles: nn.Parameter, n: int, spec: Cayley) -> None:
        super().__init__()
        self.angles = angles
        self.n = n
        self.spec = spec

    def blocks(self) -> Tensor:
        """R's diagonal blocks, [n/b, b, b]."""
        b = self.spec.block
        return cayley(skew(self.angles.float(), b), self.spec.terms).to(self.angles.dtype).expand(self.n // b, b, b)

    def forward(self, x: Tensor) -> Tensor:
        x = same_dtype(x, self.angles).unflatten(-1, (-1, self.spec.block))
        return torch.einsum("...kb,kbc->...kc", x, self.blocks()).flatten(-2)

    def materialise(self) -> Tensor:
        return torch.block_diag(*self.blocks()).T


@register("cayley")
@dataclass(frozen=True, slots=True)
class Cayley:
    """Block-diagonal rotation with blocks of size `block`, which divides the width.

    Attributes:
        share: one block for all.
        terms: see `cayley`.
    """

    block: int = 32
    share: bool = False
    terms: int | None = None

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> CayleyFactor:
        n = _square(shape, place)
        if self.block < 2 or n % self.block:
            raise SpecError(f"{place.site.name}: orthogonal blocks of {self.block} do not divide a width of {n}")
        count = 1 if self.share else n // self.block
        return CayleyFactor(place.parameter(count, self.block * (self.block - 1) // 2), n, self)


class ButterflyFactor(Factor):
    """angles: [m, n/b, b (b - 1) / 2].  R = R_m ... R_1; R_j couples positions b * 2^(j-1) / 2 apart."""

    def __init__(self, angles: nn.Parameter, block: int) -> None:
        super().__init__()
        self.angles = angles
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        x = same_dtype(x, self.angles)
        rotations = cayley(skew(self.angles.float(), self.block)).to(self.angles.dtype)
        for j in reversed(range(len(rotations))):
            x = self._mix(x, rotations[j], 2**j)
        return x

    def _mix(self, x: Tensor, rotation: Tensor, stride: int) -> Tensor:
        """x [..., n] times R_j: half-blocks `stride` apart form the blocks; a reshape, no permutation matrix."""
        half = self.block // 2
        x = x.unflatten(-1, (-1, 2, stride, half)).transpose(-3, -2)
        shape = x.shape
        mixed = torch.einsum("...kb,kbc->...kc", x.reshape(*shape[:-4], -1, self.block), rotation)
        return mixed.reshape(shape).transpose(-3, -2).flatten(-4)

    def materialise(self) -> Tensor:
        n = self.angles.shape[1] * self.block
        return self(torch.eye(n, dtype=self.angles.dtype, device=self.angles.device)).T


@register("butterfly")
@dataclass(frozen=True, slots=True)
class Butterfly:
    """Product of `factors` block rotations whose blocks reach twice as far each time.

    Only the entries that count are stored: b (b - 1) / 2 per block, where the released code stores b * b.
    """

    block: int = 8
    factors: int = 1

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> ButterflyFactor:
        n = _square(shape, place)
        if self.block < 2 or self.block % 2 or self.factors < 1 or n % (self.block * 2 ** (self.factors - 1)):
            raise SpecError(
                f"{place.site.name}: a butterfly of {self.factors} factors with blocks of {self.block} (even) needs a width "
                f"divisible by {self.block * 2 ** max(self.factors - 1, 0)}, found {n}"
            )
        return ButterflyFactor(place.parameter(self.factors, n // self.block, self.block * (self.block - 1) // 2), self.block)


class HouseholderFactor(Factor):
    """vectors: [n, r].  R = H_1 ... H_r with H = I - 2 u u^T / ||u||^2."""

    def __init__(self, vectors: nn.Parameter) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, x: Tensor) -> Tensor:
        x = same_dtype(x, self.vectors)
        for u in F.normalize(self.vectors, dim=0).unbind(1):
            x = x - 2.0 * (x @ u)[..., None] * u
        return x

    def materialise(self) -> Tensor:
        n = self.vectors.shape[0]
        return self(torch.eye(n, dtype=self.vectors.dtype, device=self.vectors.device)).T


@register("householder")
@dataclass(frozen=True, slots=True)
class Householder:
    """`count` reflections, in pairs of equals at the start, which cancel."""

    count: int = 8

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> HouseholderFactor:
        n = _square(shape, place)
        if self.count < 2 or self.count % 2:
            raise SpecError(f"reflections start in pairs that cancel, so their number is even, found {self.count}")

        def pairs(value: Tensor, generator: torch.Generator) -> None:
            half = torch.empty(self.count // 2, n)
            kaiming(half, generator)
            value.copy_(half.T.repeat_interleave(2, 1))

        return HouseholderFactor(place.parameter(n, self.count, fill=pairs))
