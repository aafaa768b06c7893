"""Factors made of factors: `Sum`, `Hadamard` (product entry by entry) and `Blocks` (a grid)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor, FactorSpec, LowRank
from intarsia.patches.place import Place


class SumFactor(Factor):
    """The sum of the parts."""

    def __init__(self, parts: list[Factor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)

    def materialise(self) -> Tensor:
        return torch.stack([part.materialise() for part in self.parts]).sum(0)  # type: ignore[operator]


class HadamardFactor(Factor):
    """The product of the parts, entry by entry."""

    def __init__(self, parts: list[Factor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        w = self.materialise()
        return F.linear(same_dtype(x, w), w)

    def materialise(self) -> Tensor:
        first, *others = (part.materialise() for part in self.parts)  # type: ignore[operator]
        for other in others:
            first = first * other
        return first


class BlocksFactor(Factor):
    """parts, row by row, of a grid with `columns` columns."""

    def __init__(self, parts: list[Factor], columns: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(self.columns, -1)
        rows = [self.parts[i : i + self.columns] for i in range(0, len(self.parts), self.columns)]
        return torch.cat([torch.stack([part(p) for part, p in zip(row, pieces)]).sum(0) for row in rows], -1)

    def materialise(self) -> Tensor:
        blocks = [part.materialise() for part in self.parts]  # type: ignore[operator]
        return torch.cat([torch.cat(blocks[i : i + self.columns], 1) for i in range(0, len(blocks), self.columns)])


@register("sum")
@dataclass(frozen=True, slots=True)
class Sum:
    """Several factors added; each starts as the caller asks, or as it says itself."""

    parts: tuple[FactorSpec, ...]

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> SumFactor:
        return SumFactor([part.build(shape, place, init) for part in self.parts])


@register("hadamard")
@dataclass(frozen=True, slots=True)
class Hadamard:
    """Several factors multiplied entry by entry.

    Attributes:
        inits: start of each part; empty for the caller's, which only the first may then take as zero.
    """

    parts: tuple[FactorSpec, ...]
    inits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or (self.inits and len(self.inits) != len(self.parts)):
            raise SpecError(f"a Hadamard product has two or more parts and an init for each, found {len(self.parts)} and {len(self.inits)}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> HadamardFactor:
        inits = self.inits or tuple(init for _ in self.parts)
        return HadamardFactor([part.build(shape, place, i) for part, i in zip(self.parts, inits)])


@register("blocks")
@dataclass(frozen=True, slots=True)
class Blocks:
    """A grid of equal blocks, each with a factor of its own (GraLoRA, Jung et al. 2025, arXiv 2505.20355)."""

    rows: int = 2
    columns: int = 2
    factor: FactorSpec = field(default_factory=LowRank)

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> BlocksFactor:
        if len(shape) != 2 or self.rows < 1 or self.columns < 1 or shape[0] % self.rows or shape[1] % self.columns:
            raise SpecError(f"{place.site.name}: a grid of {self.rows} x {self.columns} does not tile a matrix of shape {tuple(shape)}")
        block = (shape[0] // self.rows, shape[1] // self.columns)
        return BlocksFactor([self.factor.build(block, place, init) for _ in range(self.rows * self.columns)], self.columns)
