"""Dequantisation against the definition, one weight at a time, and against the package `gguf` where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.bases.blocks import CHUNK, PACKINGS, dequantise, packed_bytes

from .fakes import random_q4_0


def by_definition(kind: str, data: bytes) -> list[float]:
    """ggml-quants.c, dequantize_row_*, written out for one block after another."""
    out: list[float] = []
    size = PACKINGS[kind].dtype.itemsize
    for start in range(0, len(data), size):
        block = data[start : start + size]
        scale = float(np.frombuffer(block[:2], "<f2")[0])
        if kind == "q8_0":
            out += [scale * float(q) for q in np.frombuffer(block[2:], "i1")]
            continue
        offset = -8 * scale if kind == "q4_0" else float(np.frombuffer(block[2:4], "<f2")[0])
        quants = block[2:] if kind == "q4_0" else block[4:]
        out += [scale * (byte & 15) + offset for byte in quants] + [scale * (byte >> 4) + offset for byte in quants]
    return out


@given(st.sampled_from(sorted(PACKINGS)), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_dequantise_is_the_definition(kind: str, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = np.frombuffer(rng.bytes(blocks * PACKINGS[kind].dtype.itemsize), PACKINGS[kind].dtype).copy()
    for field in set(made.dtype.names) - {"q"}:
        made[field] = rng.normal(size=blocks).astype(np.float16)
    found = dequantise(kind, memoryview(made.tobytes()), (blocks, 32))
    np.testing.assert_allclose(found.ravel(), by_definition(kind, made.tobytes()), rtol=1e-6, atol=1e-7)


def test_q4_0_is_exact_in_float32() -> None:
    data, values = random_q4_0(32 * 50, np.random.default_rng(0))
    assert np.array_equal(dequantise("q4_0", memoryview(data), (50, 32)).ravel(), values)


def test_chunks_do_not_show() -> None:
    one, _ = random_q4_0(32, np.random.default_rng(1))
    found = dequantise("q4_0", memoryview(one * (CHUNK + 3)), (CHUNK + 3, 32))
    assert (found == found[0]).all()


def test_a_count_that_is_no_multiple_of_the_block_has_no_size() -> None:
    assert packed_bytes("q4_0", 33) == -1
    assert packed_bytes("f32", 33) == 132


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_against_the_package_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    code = gguf.GGMLQuantizationType[kind.upper()]
    values = np.random.default_rng(2).normal(size=(7, 96)).astype(np.float32)
    packed = gguf.quants.quantize(values, code)
    assert np.array_equal(dequantise(kind, memoryview(packed.tobytes()), (7, 96)), gguf.quants.dequantize(packed, code))
