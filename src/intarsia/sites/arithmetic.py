"""What `infer` means by equal vectors, rotated heads, a part of a fused output, a norm, experts."""

from __future__ import annotations

import math

from torch import Tensor, nn

TOLERANCE = 1e-4


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest value."""
    return bool((a.reshape(-1) - b.reshape(-1)).abs().max() <= TOLERANCE * max(float(a.abs().max()), 1e-12))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Two tensors hold the same vectors, however their leading dimensions are laid out."""
    return a is not None and b is not None and a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and close(a, b)


def rows(tensor: Tensor | None) -> int:
    """Number of vectors in a tensor, -1 for none."""
    return -1 if tensor is None else math.prod(tensor.shape[:-1])


def merged(heads: Tensor) -> Tensor:
    """`[B, H, T, D]` -> `[B, T, H * D]`."""
    return heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], -1)


def part_of(fused: Tensor, groups: int, start: int, width: int) -> Tensor:
    """The part of a fused projection's output that a `View` describes."""
    return fused.reshape(*fused.shape[:-1], groups, -1)[..., start : start + width].reshape(*fused.shape[:-1], -1)


def rotated(projected: Tensor, heads: Tensor) -> bool:
    """Whether the heads are the projection up to a rotation and one factor: their lengths are proportional."""
    size = heads.shape[-1]
    if projected.numel() != heads.numel():
        return False
    before = projected.reshape(-1, size).norm(dim=-1)
    after = merged(heads).reshape(-1, size).norm(dim=-1)
    ratio = after / before.clamp_min(1e-12)
    return bool((ratio - ratio.mean()).abs().max() <= 1e-3 * ratio.mean())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of some kind; the only thing told by the name of a class."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has the matrices of many experts in one parameter."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
