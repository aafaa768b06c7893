"""The GGUF reader: what was written is read; damaged and hostile files are BaseErrors without big allocations."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest

from intarsia.bases import gguf
from intarsia.errors import BaseError

from . import fakes

VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)
PACKED, UNPACKED = fakes.random_q4_0(64, np.random.default_rng(3))
METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.scale": 0.5,
    "flag": True,
    "tokens": ["a", "Ġb", "é"],
    "types": [1, 1, 3],
}
DATA = fakes.gguf({"plain": (0, (2, 32), VALUES.tobytes()), "packed": (2, (2, 32), PACKED)}, METADATA)
HEAD = DATA.index(VALUES.tobytes())


def parse(data: bytes) -> gguf.GGUFFile:
    return gguf.read(memoryview(data), "tiny.gguf")


def test_what_was_written_is_read() -> None:
    file = parse(DATA)
    assert dict(file.metadata) == METADATA
    assert np.array_equal(file.tensor("plain", 2, 32), VALUES)
    assert np.array_equal(file.tensor("packed", 2, 32).ravel(), UNPACKED)


def test_questions_the_file_cannot_answer() -> None:
    file = parse(DATA)
    with pytest.raises(BaseError, match=r"no metadata 'flags'; did you mean 'flag'"):
        file.value("flags", bool)
    with pytest.raises(BaseError, match="metadata 'flag' is a bool"):
        file.value("flag", str)
    with pytest.raises(BaseError, match=r"no tensor 'plane'; did you mean 'plain'"):
        file.tensor("plane", 2, 32)
    with pytest.raises(BaseError, match=r"has shape \(2, 32\), expected \(32, 2\)"):
        file.tensor("plain", 32, 2)


def test_truncated_at_every_length() -> None:
    last = len(DATA) - (-len(PACKED) % 32)  # the padding after the last tensor may be missing
    for length in range(last):
        with pytest.raises(BaseError, match=r"tiny\.gguf is damaged"):
            parse(DATA[:length])
    parse(DATA[:last])


def test_no_number_makes_the_reader_crash_or_allocate() -> None:
    rng = random.Random(0)
    refused = 0
    tracemalloc.start()
    try:
        for at in range(4, HEAD - 8):
            for word in (2**64 - 1, 2**63, 2**40, 0, rng.getrandbits(64)):
                data = bytearray(DATA)
                struct.pack_into("<Q", data, at, word)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                try:
                    parse(bytes(data))
                except BaseError:
                    refused += 1
                assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    finally:
        tracemalloc.stop()
    assert refused > 1000


def test_unknown_things_are_named() -> None:
    for data, message in (
        (b"GGML" + DATA[4:], "does not start with GGUF"),
        (DATA[:4] + struct.pack("<I", 9) + DATA[8:], "format version 9"),
        (fakes.gguf({"t": (14, (2, 32), b"")}, {}), "tensor 't' has type 14"),
        (fakes.gguf({"t": (2, (2, 31), b"\0" * 64)}, {}), "tensor 't' .* does not fit"),
        (fakes.gguf({"t": (0, (1,) * 5, b"\0" * 4)}, {}), "tensor 't' has 5 dimensions"),
        (fakes.gguf({"t": (0, (0,), b"")}, {}), "tensor 't' .* does not fit"),
        (fakes.gguf({}, {"general.alignment": 0}), "alignment 0"),
    ):
        with pytest.raises(BaseError, match=message):
            parse(data)
