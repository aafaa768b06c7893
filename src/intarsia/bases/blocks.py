"""Blocks of quantised weights -> float32, exactly as ggml defines them (ggml-quants.c: Q4_0, Q4_1, Q8_0).

A block holds 32 weights of one row.  A value is a small integer times an fp16 scale (plus an fp16 offset): up to
15 significant bits, so float32 holds it exactly and fp16 or bf16 do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
#: blocks dequantised at a time: 1 MB of float32, which stays in the processor's cache
CHUNK = 8192

_Q4_0 = np.dtype([("d", "<f2"), ("q", "u1", (16,))])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", (16,))])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", (32,))])


def _nibbles(q: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """The low half of byte j is weight j, the high half weight j + 16."""
    np.bitwise_and(q, 15, out=out[:, :16], casting="unsafe")
    np.right_shift(q, 4, out=out[:, 16:], casting="unsafe")


def _q4_0(blocks: NDArray[Any], out: NDArray[np.float32]) -> None:
    _nibbles(blocks["q"], out)
    out -= 8
    out *= blocks["d"].astype(np.float32)[:, None]


def _q4_1(blocks: NDArray[Any], out: NDArray[np.float32]) -> None:
    _nibbles(blocks["q"], out)
    out *= blocks["d"].astype(np.float32)[:, None]
    out += blocks["m"].astype(np.float32)[:, None]


def _q8_0(blocks: NDArray[Any], out: NDArray[np.float32]) -> None:
    np.multiply(blocks["q"], blocks["d"].astype(np.float32)[:, None], out=out)


@dataclass(frozen=True, slots=True)
class Packing:
    """How 32 weights lie in a block, and how to unpack many blocks into `out` [blocks, 32]."""

    dtype: np.dtype[Any]
    unpack: Callable[[NDArray[Any], NDArray[np.float32]], None]


PACKINGS = {"q4_0": Packing(_Q4_0, _q4_0), "q4_1": Packing(_Q4_1, _q4_1), "q8_0": Packing(_Q8_0, _q8_0)}


def packed_bytes(kind: str, count: int) -> int:
    """Bytes that `count` values of a kind (`f32` or a packing) occupy; -1 if the count is no multiple of the block."""
    if kind == "f32":
        return 4 * count
    return -1 if count % BLOCK else count // BLOCK * PACKINGS[kind].dtype.itemsize


def dequantise(kind: str, data: memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A fresh float32 array of `shape`, row-major, from its packed bytes.

    Args:
        kind: `f32`, `q4_0`, `q4_1` or `q8_0`.
        data: exactly `packed_bytes(kind, prod(shape))` bytes; the caller has checked it.
    """
    if kind == "f32":
        return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    packing = PACKINGS[kind]
    blocks = np.frombuffer(data, packing.dtype)
    out = np.empty((len(blocks), BLOCK), np.float32)
    for low in range(0, len(blocks), CHUNK):
        packing.unpack(blocks[low : low + CHUNK], out[low : low + CHUNK])
    return out.reshape(shape)
