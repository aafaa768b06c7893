"""The Walsh-Hadamard transform, unnormalised, in O(n log n), with its true adjoint (itself)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.errors import SpecError

STEP = 64
"""Size of the dense Hadamard matrices the transform is made of."""


def _matrices() -> dict[int, Tensor]:
    """Hadamard matrices of the orders 1, 2, 4 ... `STEP`."""
    h = torch.ones(1, 1)
    found = {1: h}
    while len(h) < STEP:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        found[len(h)] = h
    return found


_MATRICES = _matrices()


def transform(x: Tensor) -> Tensor:
    """H x along the last dimension of x [..., n], n a power of two; transforming twice gives n * x."""
    n = x.shape[-1]
    if n & (n - 1) or not n:
        raise SpecError(f"the Walsh-Hadamard transform needs a power of two, found {n}")
    y, done = x.reshape(-1, n), 1
    while done < n:
        size = min(STEP, n // done)
        matrix = _MATRICES[size].to(x.device, x.dtype)
        y = matrix @ y.reshape(-1, size, done)
        done *= size
    return y.reshape(x.shape)


class _Transform(torch.autograd.Function):
    """`transform` whose gradient is multiplied by `share`: 1 for the adjoint, 1/sqrt(n) as SAID's released code has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return transform(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        back = transform(gradient)
        return (back if ctx.share == 1.0 else back * ctx.share), None


def hadamard(x: Tensor, share: float = 1.0) -> Tensor:
    """`transform`, for autograd; see `_Transform`."""
    return _Transform.apply(x, share)
