"""The reader of E5S1 files: what was written is read; damaged and hostile files are BaseErrors without big allocations."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from intarsia.bases import bounded, e5s1
from intarsia.errors import BaseError

from . import fakes

DATA, VALUES = fakes.e5s1()
#: where the tensors start: everything before is counts, texts and the directory
HEAD = DATA.index(b"l1.oln.b") + len(b"l1.oln.b") + 21


def parse(data: bytes) -> e5s1.E5File:
    return e5s1.read(memoryview(data), "tiny.bin")


def test_what_was_written_is_read() -> None:
    file = parse(DATA)
    assert file.shape == e5s1.Shape(32, 2, 2, 64, 20, 24, 2, 1e-12)
    assert list(file.pieces.texts) == fakes.PIECES
    assert np.array_equal(file.pieces.scores, np.array(fakes.SCORES, np.float32))
    assert dict(file.norm) == fakes.NORM
    shapes = e5s1.expected_tensors(file.shape)
    assert shapes.keys() == VALUES.keys()
    for name, shape in shapes.items():
        assert np.array_equal(file.tensor(name, *shape), VALUES[name].reshape(shape)), name


def test_truncated_at_every_length() -> None:
    lengths = [*range(HEAD + 64), *range(HEAD + 64, len(DATA), 37), len(DATA) - 1]
    for length in lengths:
        with pytest.raises(BaseError, match=r"tiny\.bin is damaged at byte \d+"):
            parse(DATA[:length])


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "4s", b"GGUF", "does not start with E5S1"),
        (4, "I", 2, "format version 2"),
        (8, "i", 2**31 - 1, "sizes"),
        (8, "i", 0, "sizes"),
        (8, "i", 48, "do not divide"),
        (12, "i", 1 << 24, "expected 268,435,461"),
        (12, "i", 3, "expected 53"),
        (16, "i", 7, "do not divide"),
        (24, "i", 1 << 24, "missing or of another size: emb.word"),
        (24, "i", 15, "16 pieces for 15 embedding rows"),
        (36, "f", float("nan"), "epsilon"),
        (40, "i", 64, "blocks of 64"),
        (44, "i", 2**31 - 1, "pieces for 20 embedding rows"),
        (44, "i", -1, "pieces for 20 embedding rows"),
        (48, "i", 16, "special ids"),
        (48, "i", 2, "special ids"),
        (64, "Q", 2**63, "were announced"),
        (64, "Q", 1, "do not rise"),
        (72, "I", 1, "do not rise"),
        (76, "I", 2**32 - 1, "do not rise"),
    ],
)
def test_absurd_numbers_are_refused(at: int, layout: str, value: object, message: str) -> None:
    data = bytearray(DATA)
    struct.pack_into("<" + layout, data, at, value)
    with pytest.raises(BaseError, match=message):
        parse(bytes(data))


def mutants() -> Iterator[bytes]:
    rng = random.Random(0)
    for at in range(0, HEAD, 3):
        for word in (0xFFFFFFFF, 0x7FFFFFFF, rng.getrandbits(32)):
            data = bytearray(DATA)
            struct.pack_into("<I", data, at, word)
            yield bytes(data)


def test_no_number_makes_the_reader_crash_or_allocate() -> None:
    tracemalloc.start()
    refused = 0
    try:
        for data in mutants():
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                parse(data)
            except BaseError:
                refused += 1
            assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    finally:
        tracemalloc.stop()
    assert refused > 500  # most of these files are nonsense; what passes has an odd score or text


def test_directory_faults_are_named() -> None:
    at = DATA.index(b"l1.oln.b")
    count, offset = at + 8 + 1, at + 8 + 5
    for where, layout, value in ((at + 8, "B", 7), (count, "I", 31), (offset, "Q", 2**64 - 1), (offset, "Q", len(DATA))):
        data = bytearray(DATA)
        struct.pack_into("<" + layout, data, where, value)
        with pytest.raises(BaseError, match=r"'l1\.oln\.b'"):
            parse(bytes(data))
    with pytest.raises(BaseError, match=r"missing or of another size: l1\.oln\.b"):
        parse(DATA.replace(b"l1.oln.b", b"l1.oln.c"))
    with pytest.raises(BaseError, match="occurs twice"):
        parse(DATA.replace(b"l1.oln.b", b"l0.oln.b"))


def test_pieces_must_be_distinct_text() -> None:
    with pytest.raises(BaseError, match="1 pieces occur twice"):
        parse(twice())
    with pytest.raises(BaseError, match="not UTF-8"):
        parse(DATA.replace("é".encode(), b"\xff\xff", 1))


def twice() -> bytes:
    """The file with its piece `b` spelled `a`."""
    at = DATA.index(b"</s><unk>") + 9 + len("▁".encode())
    assert DATA[at : at + 2] == b"ab"
    return DATA[: at + 1] + b"a" + DATA[at + 2 :]


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, message in (("empty", "is empty"), ("absent", "cannot read")):
        with pytest.raises(BaseError, match=message), bounded.mapped(tmp_path / name):
            pass
