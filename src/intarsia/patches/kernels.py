"""Kernels of the hot path, with gradients by hand: fewer passes over wide tensors, nothing wide kept for the backward.

| function | equals | gain |
|---|---|---|
| `added(h, x, up, bias, scale)` | h + scale * (x @ up.T + bias) | one pass over h instead of three; in place where h is nobody else's |
| `dropout(x, rate)` | `F.dropout` | 16 random bits for an element instead of 64; the mask is drawn again, not kept |
| `dropped_linear(x, down, rate)` | F.linear(dropout(x), down) | keeps x itself, which is kept anyway, instead of a dropped copy |

All of them fall back to plain operations where those are as good or the only ones that work: `usable` says when.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = 1 << 15


def usable(*tensors: Tensor) -> bool:
    """Whether the hand-written kernels may run on these: one dtype, no autocast, no compiler, no function transform."""
    first = tensors[0]
    return (
        all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and first.is_floating_point()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(first.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


# -- h + scale * (x @ up.T + bias) -------------------------------------------------------------------------------------


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, up: Tensor, bias: Tensor | None, scale: float, in_place: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.scale = scale
        ctx.save_for_backward(flat, up)
        ctx.shape = x.shape
        if in_place:
            ctx.mark_dirty(h)
            target = h.view(-1, h.shape[-1])
            torch.addmm(target, flat, up.t(), alpha=scale, out=target)
            result = h
        else:
            result = torch.addmm(h.reshape(-1, h.shape[-1]), flat, up.t(), alpha=scale).view(h.shape)
        if bias is not None:
            result.add_(bias, alpha=scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, up = ctx.saved_tensors
        of_h, of_x, of_up, of_bias = ctx.needs_input_grad[:4]
        wide = gradient.reshape(-1, gradient.shape[-1])
        scale = ctx.scale
        narrow = wide.new_empty(0)
        if of_x:
            narrow = wide @ up
            narrow = (narrow if scale == 1.0 else narrow.mul_(scale)).view(ctx.shape)
        matrix = None
        if of_up:
            matrix = wide.t() @ flat
            matrix = matrix if scale == 1.0 else matrix.mul_(scale)
        vector = wide.sum(0).mul_(scale) if of_bias else None
        return gradient if of_h else None, narrow if of_x else None, matrix, vector, None, None


def added(h: Tensor, x: Tensor, up: Tensor, bias: Tensor | None = None, scale: float = 1.0, in_place: bool = False) -> Tensor:
    """h + scale * (x @ up.T + bias), with h [..., out], x [..., r], up [out, r], bias [out].

    Args:
        in_place: h is a fresh result that nobody else reads and that no operation has kept for its backward.
    """
    in_place = in_place and h.is_contiguous() and not (h.is_leaf and h.requires_grad) and not h.is_inference()
    return _Added.apply(h, x, up, bias, float(scale), in_place)


# -- dropout -----------------------------------------------------------------------------------------------------------


def _seed() -> int:
    """A number from torch's generator: so that seeds, checkpoints and recomputation decide everything."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def keep_mask(shape: torch.Size, rate: float, seed: int) -> Tensor:
    """Which entries to keep, int8 of `shape` (0 or 1).  16 bits decide each: the rate is exact to 2**-17, see `scale_of`."""
    size = shape.numel()
    words = torch.empty((size + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    return (words.view(torch.int16)[:size] >= _levels(rate) - HALF).view(torch.int8).view(shape)


def _levels(rate: float) -> int:
    return round(rate * 2 * HALF)


def scale_of(rate: float) -> float:
    """What makes the mean right for the rate that is really drawn."""
    return 2 * HALF / (2 * HALF - _levels(rate))


def _applied(x: Tensor, keep: Tensor) -> Tensor:
    """x where kept, else 0; not yet scaled.  A multiplication by floats is several times faster than a choice by bool."""
    return keep.to(x.dtype).mul_(x)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return _applied(x, keep_mask(x.shape, rate, seed)).mul_(scale_of(rate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _applied(gradient, keep_mask(gradient.shape, ctx.rate, ctx.seed)).mul_(scale_of(ctx.rate)), None, None


def dropout(x: Tensor, rate: float) -> Tensor:
    """`F.dropout(x, rate)`; on a CPU with cheap randomness."""
    if not 0.0 < rate < 0.999 or x.device.type != "cpu" or not usable(x):
        return F.dropout(x, rate, True)
    return _Dropout.apply(x, rate, _seed())


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        ctx.save_for_backward(x, down)
        return F.linear(_applied(x, keep_mask(x.shape, rate, seed)), down).mul_(scale_of(rate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, down = ctx.saved_tensors
        keep = keep_mask(x.shape, ctx.rate, ctx.seed)
        narrow = gradient.reshape(-1, gradient.shape[-1]) * scale_of(ctx.rate)
        of_x = of_down = None
        if ctx.needs_input_grad[1]:
            of_down = narrow.t() @ _applied(x, keep).reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0]:
            of_x = (narrow @ down).view(x.shape).mul_(keep)
        return of_x, of_down, None, None


def dropped_linear(x: Tensor, down: Tensor, rate: float) -> Tensor:
    """F.linear(dropout(x, rate), down), [..., in] -> [..., r]."""
    if not 0.0 < rate < 0.999 or x.device.type != "cpu" or not usable(x, down):
        return F.linear(F.dropout(x, rate, True), down)
    return _DroppedLinear.apply(x, down, rate, _seed())
