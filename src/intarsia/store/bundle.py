"""Bundles: several modules of a store in one file, a plain tar archive without compression.

    index.json                    {"format": "intarsia-bundle", "labels": [[name, version or tag, sha256], ...], "sha256": of the labels, "version": 1}
    blobs/<sha256>.safetensors    module files

Only what this file would write itself is read, byte for byte: every change of a bundle is noticed, and whatever else an archive
may hold (links, devices, folders, paths that climb, extended headers, compression) is refused with the whole archive, before
anything is written.  Python's `tarfile` is not used for reading: it follows extended headers, which may announce any size.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia._codec import canonical_json, parse_json
from intarsia.errors import ModuleError, SpecError, StoreError, UsageError
from intarsia.modules import write_atomic
from intarsia.store.entry import Label
from intarsia.store.pointers import check_label, check_store_name

INDEX = "index.json"
LARGEST = 2 << 30
"""Bytes of a bundle, and of the modules taken from elsewhere at once, that are read unless more is allowed."""
_INDEX_LIMIT = 4 << 20
_ENTRIES = 20_000
_BLOCK = 512
_END = b"\0" * (2 * _BLOCK)
_BLOB = re.compile(r"blobs/([0-9a-f]{64})\.safetensors")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe", b"x": "an extended header",
          b"g": "an extended header", b"L": "a long name", b"K": "a long link", b"S": "a sparse file"}  # fmt: skip
_OTHERS = {b"\x1f\x8b": "compressed (gzip)", b"BZh": "compressed (bzip2)", b"\xfd7zXZ": "compressed (xz)", b"\x28\xb5\x2f\xfd": "compressed (zstd)", b"PK": "a zip archive"}


def write_bundle(path: str | os.PathLike[str], files: Mapping[str, bytes], labels: Sequence[Label]) -> Path:
    """Write a bundle; equal contents give equal bytes.

    Raises:
        StoreError: something is at `path`, or it cannot be written.
    """
    target = Path(path)
    if os.path.lexists(target):
        raise StoreError(f"cannot export to {target}: it exists; give a new file name")
    order = sorted(labels, key=lambda each: (each.name, each.label))
    chunks: list[bytes] = [*_entry(INDEX, _index([[each.name, each.label, each.sha256] for each in order]))]
    for sha256 in sorted(files):
        chunks += _entry(f"blobs/{sha256}.safetensors", files[sha256])
    chunks.append(_END)
    return write_atomic(target, chunks, sum(map(len, chunks)))


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like an archive of some kind, and not like a module."""
    try:
        with open(path, "rb") as file:
            head = file.read(_BLOCK)
    except OSError as error:
        raise StoreError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    return head[257:262] == b"ustar" or any(head.startswith(magic) for magic in _OTHERS)


def read_bundle(path: str | os.PathLike[str], *, limit: int = LARGEST) -> tuple[dict[str, bytes], list[Label]]:
    """Files and names of a bundle.  Sizes are checked against the file before anything is allocated.

    Raises:
        StoreError: it cannot be opened, or is larger than `limit`.
        ModuleError: it is no bundle, or holds anything that a bundle does not; the message names the entry.
    """
    place = os.fspath(path)
    try:
        size = os.stat(path).st_size
        if size > limit:
            raise StoreError(f"{place} has {size:,} bytes; at most {limit:,} are read, --max-bytes allows more")
        with open(path, "rb") as file:
            data = file.read(size)
    except OSError as error:
        raise StoreError(f"cannot read {place}: {error.strerror or error}") from error
    try:
        return _parsed(data)
    except (ModuleError, UsageError) as error:
        raise ModuleError(f"bundle {place}: {error}; nothing was taken from it") from error


def _parsed(data: bytes) -> tuple[dict[str, bytes], list[Label]]:
    for magic, what in _OTHERS.items():
        if data.startswith(magic):
            raise ModuleError(f"it is {what}; a bundle is a plain tar archive")
    index: bytes | None = None
    files: dict[str, bytes] = {}
    at = 0
    while True:
        head = data[at : at + _BLOCK]
        if len(head) < _BLOCK:
            raise ModuleError(f"truncated at byte {len(data):,}: the end of the archive is missing")
        if head == b"\0" * _BLOCK:
            break
        name, size = _checked(head, at)
        begin, end = at + _BLOCK, at + _BLOCK + size
        if end > len(data):
            raise ModuleError(f"entry {name!r} announces {size:,} bytes, {max(0, len(data) - begin):,} are there")
        if name == INDEX and index is None and size <= _INDEX_LIMIT:
            index = data[begin:end]
        elif (found := _BLOB.fullmatch(name)) and found[1] not in files:
            files[found[1]] = data[begin:end]
            if hashlib.sha256(files[found[1]]).hexdigest() != found[1]:
                raise ModuleError(f"entry {name!r} is damaged: its bytes do not have the sha256 of its name")
        else:
            raise ModuleError(f"entry {ascii(name)[:120]} stands twice, or is too large")
        if len(files) > _ENTRIES:
            raise ModuleError(f"more than {_ENTRIES:,} entries")
        at = begin + -(-size // _BLOCK) * _BLOCK
        if data[end:at].strip(b"\0"):
            raise ModuleError(f"entry {name!r}: something stands in the space behind it")
    if data[at:] != _END:
        raise ModuleError(f"truncated, or something stands behind the end of the archive, at byte {at:,}")
    if index is None:
        raise ModuleError(f"it has no {INDEX}: an archive, but not one that intarsia store export wrote")
    return files, _labels(index, files)


def _checked(head: bytes, at: int) -> tuple[str, int]:
    """Name and size in the header of a regular entry."""
    kind = head[156:157]
    name = _text(head[345:500]) + "/" * bool(_text(head[345:500])) + _text(head[:100])
    if head[257:263] != b"ustar\0" or kind not in (b"0", b"\0"):
        what = _KINDS.get(kind, "of an unknown kind")
        raise ModuleError(f"entry {ascii(name)[:120]} is {what}; a bundle holds regular files only" if head[257:262] == b"ustar" else f"no tar header at byte {at:,}")
    size = int(head[124:135], 8) if re.fullmatch(rb"[0-7]{11}", head[124:135]) else -1
    if not (name == INDEX or _BLOB.fullmatch(name)):
        raise ModuleError(f"entry {ascii(name)[:120]} is not expected; a bundle holds {INDEX} and blobs/<sha256>.safetensors, each once")
    if size < 0 or head != _head(name, size):
        raise ModuleError(f"entry {ascii(name)[:120]}: its header is damaged, or another program wrote it")
    return name, size


def _labels(index: bytes, files: Mapping[str, bytes]) -> list[Label]:
    try:
        value: Any = parse_json(index, INDEX)
    except SpecError as error:
        raise ModuleError(str(error)) from error
    if not isinstance(value, dict) or value.get("format") != "intarsia-bundle":
        raise ModuleError(f"{INDEX} is not that of a bundle")
    if value.get("version") != 1:
        raise ModuleError(f"it has version {str(value.get('version'))[:20]}, this intarsia reads version 1 (pip install -U intarsia)")
    rows = value.get("labels")
    if not isinstance(rows, list) or index != _index(rows):
        raise ModuleError(f"{INDEX} is damaged: it does not have the sha256 it names")
    found = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(isinstance(word, str) for word in row):
            raise ModuleError(f"{INDEX}: {str(row)[:80]} is not [name, version or tag, sha256]")
        if row[2] not in files:
            raise ModuleError(f"{INDEX}: {row[0]}@{row[1]} is {row[2][:12]!r}, which is not in the bundle")
        found.append(Label(check_store_name(row[0]), check_label(row[1]), row[2]))
    return found


def _index(rows: list[Any]) -> bytes:
    return canonical_json({"format": "intarsia-bundle", "version": 1, "labels": rows, "sha256": hashlib.sha256(canonical_json({"labels": rows})).hexdigest()})


def _entry(name: str, data: bytes) -> list[bytes]:
    if len(data) > LARGEST:
        raise StoreError(f"{name} has {len(data):,} bytes; a bundle holds files of up to {LARGEST:,}: push it instead")
    return [_head(name, len(data)), data, b"\0" * (-len(data) % _BLOCK)]


def _head(name: str, size: int) -> bytes:
    head = bytearray(_BLOCK)
    for begin, value in ((0, name.encode("ascii")), (100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (124, b"%011o\0" % size),
                         (136, b"%011o\0" % 0), (148, b" " * 8), (156, b"0"), (257, b"ustar\x0000")):  # fmt: skip
        head[begin : begin + len(value)] = value
    head[148:156] = b"%06o\0 " % sum(head)  # summed with blanks where the sum will stand
    return bytes(head)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("latin-1")
