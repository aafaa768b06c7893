"""The safetensors container: laying out a header, and reading one that may be hostile.

    8 bytes    length of the header, little endian
    header     JSON: {"__metadata__": {str: str}, tensor name: {"dtype", "shape", "data_offsets": [begin, end]}, ...},
               filled up with spaces to a multiple of 8
    data       the tensors' bytes, without gaps

The container is written here and not by the `safetensors` library because that keeps the metadata in a hash map, whose order
differs between runs, and a module's bytes must not; it is read here because every limit is checked before anything of that
size is allocated.  Format: https://github.com/huggingface/safetensors, section "Format".  Files written here are read by
that library.

What is not here: what the metadata of a module means (`file.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, NamedTuple

from intarsia._codec import parse_json
from intarsia.errors import ModuleError, SpecError, listing
from intarsia.modules.module import DTYPES, check_key

MAX_HEADER = 4 * 1024 * 1024
"""Bytes of a header."""
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_STRUCTURE = 400_000
"""Brackets, braces, commas and colons in a header: bounds what parsing it can allocate."""

_META = "__metadata__"
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with: git lfs pull"),
)


class Entry(NamedTuple):
    """One tensor in the file; offsets are bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A checked header.

    Attributes:
        metadata: text by name.
        entries: tensors in the order of their data, which they cover without gap or overlap.
        text: the header's bytes with the eight length bytes in front.
        size: bytes of the whole file.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    text: bytes
    size: int


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Places for tensors given as (dtype, shape): wide types first, so that each is aligned; by name within a width."""
    places, begin = {}, 0
    for key in sorted(tensors, key=lambda k: (-DTYPES[tensors[k][0]].itemsize, k)):
        dtype, shape = tensors[key]
        end = begin + _nbytes(dtype, shape)
        places[key] = Entry(dtype, shape, begin, end)
        begin = end
    return places


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header, the metadata sorted by name, tensors in the order of `entries`.

    Raises:
        ModuleError: the header exceeds what a reader accepts.
    """
    document: dict[str, Any] = {_META: dict(sorted(metadata.items()))}
    for key, entry in entries.items():
        document[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    _check_limits(len(entries), text)
    return len(text).to_bytes(8, "little") + text


def read_layout(file: BufferedIOBase, size: int, accept: Callable[[Mapping[str, str]], object]) -> Layout:
    """Read and check a header.

    Args:
        file: at its start; left at the start of the data.
        size: bytes of the whole file.
        accept: raises if the metadata are of another format or version; called before the tensors' entries are looked at,
            which another format may write otherwise.

    Raises:
        ModuleError: the file is no safetensors file, is cut, or its header breaks a rule above.
    """
    if size == 0:
        raise ModuleError("the file is empty")
    start = file.read(min(size, 32))
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > MAX_HEADER:
        _refuse_foreign(start)
    if size < 8:
        raise ModuleError(f"truncated: {size} of at least 8 bytes")
    if length > MAX_HEADER:
        raise ModuleError(f"not a module file: its header would be {length:,} bytes, at most {MAX_HEADER:,} are allowed")
    if size < 8 + length:
        raise ModuleError(f"truncated: {size:,} of at least {8 + length:,} bytes")
    file.seek(8)
    header = file.read(length)
    if len(header) != length:
        raise ModuleError(f"truncated while being read: {8 + len(header):,} of at least {8 + length:,} bytes")
    if not header.startswith(b"{"):
        raise ModuleError("not a module file: the header does not begin with '{'")
    _check_limits(header.count(b'"data_offsets"'), header)
    metadata, document = _parse(header)
    accept(metadata)
    entries = _cover(document)
    total = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size != total:
        raise ModuleError(f"truncated: {size:,} of {total:,} bytes" if size < total else f"{size - total:,} bytes too many after the {total:,} of the module")
    return Layout(metadata, entries, start[:8] + header, size)


def _parse(header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata, and the entries as they stand in the JSON."""
    try:
        document = parse_json(header, "header")
    except SpecError as error:
        raise ModuleError(str(error)) from None
    if not isinstance(document, dict):
        raise ModuleError("header: not a JSON object")
    metadata = document.pop(_META, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModuleError("header: the metadata is not an object of strings")
    return metadata, document


def _cover(document: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries, checked one by one and then together: in the order of their data, without gap or overlap."""
    entries = {key: _entry(key, value) for key, value in document.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    reached = 0
    for key, entry in ordered.items():
        if entry.begin != reached:
            what = "overlaps the tensor before it" if entry.begin < reached else "leaves a gap before it"
            raise ModuleError(f"header: tensor {key!r} at byte {entry.begin:,} {what} (which ends at {reached:,})")
        reached = entry.end
    return ordered


def _entry(key: str, value: Any) -> Entry:
    try:
        check_key(key)
    except SpecError as error:
        raise ModuleError(f"header: {error}") from None
    if not isinstance(value, dict) or sorted(value) != ["data_offsets", "dtype", "shape"]:
        raise ModuleError(f"header: tensor {key!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModuleError(f"header: tensor {key!r} has dtype {str(dtype)[:40]!r}; allowed are {listing(DTYPES, 20)}")
    if not are_sizes(shape):
        raise ModuleError(f"header: tensor {key!r} has shape {str(shape)[:80]}; a shape is at most {MAX_DIMENSIONS} sizes below 2**48")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ModuleError(f"header: tensor {key!r} has data_offsets {str(offsets)[:80]}; expected [begin, end]")
    needed = _nbytes(dtype, shape)
    if offsets[1] - offsets[0] != needed:
        raise ModuleError(f"header: tensor {key!r} of {dtype} {shape} needs {needed:,} bytes, its data_offsets hold {offsets[1] - offsets[0]:,}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def are_sizes(value: Any) -> bool:
    """Whether a value from JSON is a shape: at most eight sizes below 2**48."""
    return isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _nbytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of a tensor, in Python's integers, which cannot overflow."""
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    return count


def _check_limits(tensors: int, header: bytes) -> None:
    """Limits that need no parsing."""
    if len(header) > MAX_HEADER:
        raise ModuleError(f"the header has {len(header):,} bytes; at most {MAX_HEADER:,} are allowed (is the card or a label list very long?)")
    if tensors > MAX_TENSORS:
        raise ModuleError(f"the header lists {tensors:,} tensors; at most {MAX_TENSORS:,} are allowed")
    structure = sum(header.count(mark) for mark in (b"{", b"[", b",", b":"))
    if structure > MAX_STRUCTURE:
        raise ModuleError(f"the header has {structure:,} JSON elements; at most {MAX_STRUCTURE:,} are allowed")


def _refuse_foreign(start: bytes) -> None:
    """Name well-known files of other kinds by their first bytes."""
    for magic, what in _MAGIC:
        if start.startswith(magic):
            pickle = "torch.save" in what or "pickle" in what
            advice = (
                ". intarsia never opens pickles, which can run code: re-save its tensors with safetensors in a program that trusts it" if pickle else ""
            )
            raise ModuleError(f"not a module file but {what}{advice}")
