"""Tensors as data: the factor axis.  A factor stands for a matrix [out, in] (or a tensor of any shape) and obeys

    factor(x) == x @ factor.materialise().T          (the law every member is tested for)

`Dense` stores the tensor, `LowRank` the product up @ down.  A specification builds its factor for given sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import Seen, same_dtype
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

    def export(self) -> tuple[FactorSpec, dict[str, Tensor]] | None:
        """A cheaper equal factor as (specification, its tensors by leaf), or None if this is already the cheapest."""
        return None

    def export_for(self, context: Mapping[str, Any]) -> tuple[FactorSpec, dict[str, Tensor]] | None:
        """`export` under a call's context, for factors whose tensor depends on it (a task id)."""
        return self.export()

    def row_squares(self, base: Tensor, scale: float, squares: Tensor) -> Tensor:
        """Squared norms of the rows of base + scale * materialise(), [out]; members avoid the dense product if they can.

        Args:
            squares: those of `base` alone.
        """
        return (base + scale * self.materialise()).square().sum(1)

    def given(self, seen: Seen) -> Applied:
        """The factor under a call: itself, unless its tensor depends on the call's context."""
        return self

    def fixed(self, context: Mapping[str, Any]) -> Tensor | None:
        """The tensor under a context, None if the context does not decide it."""
        return self.materialise()


class Applied(Protocol):
    """A factor in a forward pass.  `materialise` has a first dimension more where rows differ: [R, *shape]."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def materialise(self) -> Tensor: ...


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A vector [n], or one per row [R, n], so that it meets `like` [R * k, ..., n]."""
    if value.dim() == 1:
        return value
    if like.shape[0] != value.shape[0]:  # a layer that flattens [B, T]
        value = value.repeat_interleave(like.shape[0] // value.shape[0], 0)
    return value.view(value.shape[0], *[1] * (like.dim() - 2), value.shape[-1])


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

    def row_squares(self, base: Tensor, scale: float, squares: Tensor) -> Tensor:
        cross = (F.linear(base, self.down) * self.up).sum(1)
        own = (self.up @ (self.down @ self.down.T) * self.up).sum(1)
        return squares + 2.0 * scale * cross + scale**2 * own


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
