"""Tensors as data: the factor axis.  A factor stands for a matrix [out, in] (or a tensor of any shape) and obeys

    factor(x) == x @ factor.materialise().T          (the law every member is tested for)

`Dense` stores the tensor, `LowRank` the product up @ down.  A specification builds its factor for given sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.init import INITS
from intarsia.patches.place import Place


class Factor(nn.Module):
    """A matrix given by parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], equal to `x @ materialise().T`."""
        raise NotImplementedError

    def materialise(self) -> Tensor:
        """The tensor itself."""
        raise NotImplementedError


@runtime_checkable
class FactorSpec(Protocol):
    """A frozen, registered dataclass that builds a factor."""

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> Factor:
        """A factor for a tensor of `shape`, with `init` naming its starting value."""


class DenseFactor(Factor):
    """The tensor itself, of any shape."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.value), self.value)

    def materialise(self) -> Tensor:
        return self.value


@register("dense")
@dataclass(frozen=True, slots=True)
class Dense:
    """All entries are parameters."""

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> DenseFactor:
        return DenseFactor(place.parameter(*shape, fill=INITS[init]))


class LowRankFactor(Factor):
    """up @ down, with `down` [r, in] and `up` [out, r] (Hu et al. 2021, arXiv 2106.09685: A and B)."""

    def __init__(self, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(same_dtype(x, self.down), self.down), self.up)

    def materialise(self) -> Tensor:
        return self.up @ self.down


@register("low_rank")
@dataclass(frozen=True, slots=True)
class LowRank:
    """Rank-r product; zero at the start because `up` is zero."""

    rank: int = 8
    down_init: str = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> LowRankFactor:
        if len(shape) != 2:
            raise SpecError(f"a low-rank factor needs a matrix, {place.site.name} holds a tensor of shape {tuple(shape)}")
        out, inner = shape
        down = place.parameter(self.rank, inner, fill=INITS[self.down_init])
        up = place.parameter(out, self.rank, fill=INITS[init])
        return LowRankFactor(down, up)


def check_law(factor: Factor, x: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the defining law holds on `x`; for tests of new members."""
    return torch.allclose(factor(x), x @ factor.materialise().T, atol=tolerance, rtol=tolerance)
