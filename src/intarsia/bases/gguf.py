"""Reader of GGUF files, versions 2 and 3 (ggml's specification, docs/gguf.md), little-endian.

Metadata, the directory of tensors, and float32 values of the types F32, Q4_0, Q4_1 and Q8_0.  Every count and offset is
checked against the file's size before anything is allocated.  What is not here: what the metadata mean (`smollm2.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.bases.blocks import dequantise, packed_bytes
from intarsia.bases.bounded import Cursor
from intarsia.errors import BaseError, nearest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: metadata type -> struct letter; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KINDS = {0: "f32", 2: "q4_0", 3: "q4_1", 8: "q8_0"}
MOST_DIMENSIONS = 4
MOST_NAME = 1 << 16


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the directory, still packed; `shape` is row-major, as in torch."""

    kind: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file holds: metadata by key, tensors by name."""

    label: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def value(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A metadata value of a type, or a BaseError that names the key."""
        if key not in self.metadata:
            raise BaseError(f"{self.label} has no metadata {key!r}{nearest(key, self.metadata)}")
        found = self.metadata[key]
        if not isinstance(found, kind):
            raise BaseError(f"{self.label}: metadata {key!r} is a {type(found).__name__}")
        return found

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """A tensor as float32, its shape checked."""
        if name not in self.tensors:
            raise BaseError(f"{self.label} has no tensor {name!r}{nearest(name, self.tensors)}")
        stored = self.tensors[name]
        if stored.shape != shape:
            raise BaseError(f"{self.label}: tensor {name!r} has shape {stored.shape}, expected {shape}")
        return dequantise(stored.kind, stored.data, shape)


def _string(cursor: Cursor, what: str, most: int) -> str:
    (length,) = cursor.take("Q", what)
    if length > most:
        cursor.fail(f"{what} of {length:,} bytes")
    return cursor.text(length, what)


def _value(cursor: Cursor, code: int, key: str) -> Any:
    if code in SCALARS:
        return cursor.take(SCALARS[code], key)[0]
    if code == STRING:
        return _string(cursor, key, cursor.left)
    if code != ARRAY:
        cursor.fail(f"metadata {key!r} has unknown type {code}")
    item, count = cursor.take("IQ", key)
    if item in SCALARS:
        return cursor.array("<" + SCALARS[item], count, key).tolist()
    if item != STRING:
        cursor.fail(f"metadata {key!r} is an array of type {item}")
    cursor.need(count, 8, key)
    return [_string(cursor, key, cursor.left) for _ in range(count)]


def read(data: memoryview, label: str) -> GGUFFile:
    """Parse a whole GGUF file; tensors stay views of `data`.

    Raises:
        BaseError: the file is truncated, announces more than it holds, or uses a type this reader does not know.
    """
    cursor = Cursor(data, label)
    if cursor.left < 8 or cursor.raw(4, "magic") != MAGIC:
        cursor.fail(f"it does not start with {MAGIC.decode()}")
    version, tensor_count, key_count = cursor.take("IQQ", "header")
    if version not in VERSIONS:
        cursor.fail(f"format version {version}, this reader knows {VERSIONS}")
    cursor.need(key_count, 13, "metadata")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = _string(cursor, "metadata key", MOST_NAME)
        (code,) = cursor.take("I", key)
        if key in metadata:
            cursor.fail(f"metadata {key!r} occurs twice")
        metadata[key] = _value(cursor, code, key)
    cursor.need(tensor_count, 32, "tensor directory")
    found: list[tuple[str, str, tuple[int, ...], int]] = []
    for _ in range(tensor_count):
        name = _string(cursor, "tensor name", MOST_NAME)
        (rank,) = cursor.take("I", name)
        if not 0 < rank <= MOST_DIMENSIONS:
            cursor.fail(f"tensor {name!r} has {rank} dimensions")
        shape = cursor.take(f"{rank}Q", name)[::-1]
        code, offset = cursor.take("IQ", name)
        if code not in KINDS:
            cursor.fail(f"tensor {name!r} has type {code}, this reader knows {KINDS}")
        found.append((name, KINDS[code], shape, offset))
    return GGUFFile(label, metadata, _tensors(cursor, found, metadata.get("general.alignment", 32)))


def _tensors(cursor: Cursor, found: list[tuple[str, str, tuple[int, ...], int]], align: Any) -> dict[str, Stored]:
    if not isinstance(align, int) or not 0 < align <= 4096:
        cursor.fail(f"alignment {align!r}")
    start = -(-cursor.at // align) * align
    tensors: dict[str, Stored] = {}
    for name, kind, shape, offset in found:
        size = packed_bytes(kind, prod(shape))
        if size <= 0 or start + offset + size > len(cursor.data) or name in tensors:
            cursor.fail(f"tensor {name!r} {shape} does not fit the file, or occurs twice")
        tensors[name] = Stored(kind, shape, cursor.data[start + offset : start + offset + size])
    return tensors
