"""Frozen tensors that a seed stands for.  They are drawn again wherever a module is built and never stored.

The algorithm, `philox-1`: 64-bit words of NumPy's Philox4x64 (a counter-based generator whose stream NumPy keeps stable),
keyed by the first 128 bits of the SHA-256 of the seed and the names that tell tensors apart; everything else is arithmetic
in double precision, rounded once.  So the same seed gives the same tensor in another process, on another device and with
another release of torch, whose own generators promise none of this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from intarsia._registry import Registry

ALGORITHM = "philox-1"


class Stream:
    """An endless sequence of numbers.

    Args:
        seed: of the method.
        names: what this tensor is (site, leaf ...).
    """

    def __init__(self, seed: int, *names: str) -> None:
        text = "\0".join((ALGORITHM, str(seed), *names))
        digest = hashlib.sha256(text.encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def words(self, count: int) -> np.ndarray:
        """uint64, [count]."""
        return self._bits.random_raw(count)

    def uniform(self, count: int) -> Tensor:
        """Doubles in [0, 1)."""
        return torch.from_numpy((self.words(count) >> np.uint64(11)) * 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """N(0, 1) in double precision (Box and Muller)."""
        radius, angle = self.uniform(2 * ((count + 1) // 2)).view(2, -1)
        radius = (-2.0 * torch.log1p(-radius)).sqrt()
        angle = angle * (2 * math.pi)
        return torch.stack((radius * angle.cos(), radius * angle.sin()), 1).flatten()[:count]

    def signs(self, count: int) -> Tensor:
        """+1 or -1, int8."""
        return torch.from_numpy((self.words(count) >> np.uint64(63)).astype(np.int8)) * 2 - 1

    def permutation(self, count: int) -> Tensor:
        """0 ... count-1 in random order, int64."""
        return torch.from_numpy(np.argsort(self.words(count), kind="stable"))

    def distinct(self, count: int, limit: int) -> Tensor:
        """`count` different numbers below `limit` in ascending order, int64."""
        if count > limit // 2:
            return self.permutation(limit)[:count].sort().values
        found = np.empty(0, np.uint64)
        while len(found) < count:  # in order of first appearance, so that the cut at the end takes no side
            found = np.concatenate((found, self.words(count - len(found)) % np.uint64(limit)))
            found = found[np.sort(np.unique(found, return_index=True)[1])]
        return torch.from_numpy(np.sort(found).astype(np.int64))


Draw = Callable[[tuple[int, ...], Stream], Tensor]
DRAWS: Registry[Draw] = Registry("draw")


@DRAWS.register("unit")
def unit(shape: tuple[int, ...], stream: Stream) -> Tensor:
    """N(0, 1)."""
    return stream.normal(math.prod(shape)).view(shape).float()


def _symmetric(shape: tuple[int, ...], stream: Stream, bound: float) -> Tensor:
    return ((stream.uniform(math.prod(shape)) * 2 - 1) * bound).view(shape).float()


@DRAWS.register("kaiming")
def kaiming(shape: tuple[int, ...], stream: Stream) -> Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)) for [m, n], as LoRA's in-factor."""
    return _symmetric(shape, stream, 1 / math.sqrt(shape[-1]))


@DRAWS.register("he")
def he(shape: tuple[int, ...], stream: Stream) -> Tensor:
    """U(-b, b) with b = sqrt(6/n) for [m, n]: kaiming-uniform with gain sqrt(2), as VeRA's projections."""
    return _symmetric(shape, stream, math.sqrt(6 / shape[-1]))


@DRAWS.register("tiled")
def tiled(shape: tuple[int, ...], stream: Stream) -> Tensor:
    """Identity matrices side by side, [I I ... I] cut to [r, n]: no draw at all (MiSS)."""
    rows, columns = shape
    return (torch.arange(columns)[None] % rows == torch.arange(rows)[:, None]).float()
