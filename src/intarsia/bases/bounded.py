"""A cursor over the bytes of a file that checks every count before anything is allocated.

What is here: reading numbers, arrays and byte strings at a moving offset, bounds checked.  What is not: what the bytes
mean (`e5s1.py`, `gguf.py`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from intarsia.errors import BaseError


class Cursor:
    """Reads little-endian values from a buffer; a read past the end is a BaseError, never an allocation.

    Args:
        data: the whole file.
        label: name of the file for messages.
        start: first byte to read.
    """

    def __init__(self, data: memoryview, label: str, start: int = 0) -> None:
        self.data = data
        self.label = label
        self.at = start

    @property
    def left(self) -> int:
        """Bytes from the current offset to the end."""
        return len(self.data) - self.at

    def fail(self, problem: str) -> NoReturn:
        """Raise a BaseError naming the file and the offset."""
        raise BaseError(f"{self.label} is damaged at byte {self.at}: {problem}")

    def need(self, count: int, width: int, what: str) -> None:
        """Check that `count` items of at least `width` bytes are left to read."""
        if count < 0 or count * width > self.left:
            self.fail(f"{count:,} x {width} bytes of {what} were announced, {self.left:,} bytes are left")

    def take(self, layout: str, what: str) -> tuple[Any, ...]:
        """Unpack a fixed `struct` layout (without byte-order mark)."""
        size = struct.calcsize("<" + layout)
        self.need(1, size, what)
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += size
        return values

    def array(self, dtype: DTypeLike, count: int, what: str) -> NDArray[Any]:
        """A read-only view of `count` items."""
        kind = np.dtype(dtype)
        self.need(count, kind.itemsize, what)
        view = np.frombuffer(self.data, kind, count, self.at)
        self.at += count * kind.itemsize
        return view

    def raw(self, count: int, what: str) -> bytes:
        """A copy of `count` bytes."""
        self.need(count, 1, what)
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def text(self, count: int, what: str) -> str:
        """`count` bytes as strict UTF-8."""
        try:
            return self.raw(count, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})")


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, memory-mapped read-only; arrays made from it must be copied before the block ends."""
    try:
        handle = path.open("rb")
    except OSError as error:
        raise BaseError(f"cannot read {path}: {error.strerror}") from error
    with handle:
        if path.stat().st_size == 0:
            raise BaseError(f"{path} is empty")
        # not closed by hand: numpy views of the caller may still refer to it when an error is on its way out
        yield memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
