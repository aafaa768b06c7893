"""One module, one safetensors file: `save`, `load`, `read_header`, `put_card`, and the same on bytes, `dumps` and `loads`.

The specification of the format is `docs/module-format.md`.  Equal modules give equal bytes.  Every byte is covered by a
hash: the header by `checksum`, the tensors by `digest`; a file with one flipped bit is refused.

Reading checks the header against limits and the file's size before anything is allocated, then reads each tensor straight
into memory of its own: nothing is mapped, so a file may be replaced or deleted while its module lives.

What is not here: the container (`container.py`), atomic writing (`atomic.py`), the store, other libraries' formats.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intarsia._codec import canonical_json, decode, parse_json
from intarsia.errors import ModuleError, SpecError, StoreError, listing, nearest
from intarsia.methods.method import Method
from intarsia.modules.atomic import write_atomic
from intarsia.modules.card import Card
from intarsia.modules.coding import Coded, check_size, decoded, encoded
from intarsia.modules.compact import Values, compact
from intarsia.modules.container import Entry, Layout, are_sizes, header_bytes, lay_out, read_layout
from intarsia.modules.module import DTYPE_NAMES, DTYPES, Module, Owned, identity, tensor_bytes, tensor_sha256
from intarsia.sites.fingerprint import Fingerprint

FORMAT = "intarsia-module"
VERSION = 2
"""The newest version: 2 has coded tensors; a file without any is written as version 1."""
NEEDS = "0.1"
"""First release of intarsia that reads files of this version; written into the file for the benefit of older ones."""

_KEYS = frozenset(("format", "version", "needs", "name", "method", "base", "labels", "roles", "requires", "context", "card", "digest", "checksum"))
_CODING = "coding"  # the entry that version 2 adds
_HEX = re.compile(r"[0-9a-f]{64}")
_BLANK = b"0" * 64
_BLOCK = 1 << 20  # values looked at together


@dataclass(frozen=True, slots=True)
class Header:
    """What a module file says of itself, without its tensors.

    Attributes:
        specification: the method as JSON; `method` decodes it, which fails if it names what is not installed.
        tensors: dtype, shape and place of each tensor; of a coded one the dtype and shape it is decoded to.
        coding: how tensors are coded that are not stored as they are.
        size: bytes of the file.
    """

    name: str
    specification: Mapping[str, Any]
    base: Fingerprint
    labels: tuple[str, ...] | None
    roles: Mapping[str, str]
    requires: tuple[str, ...]
    context: Mapping[str, Any]
    card: Card
    digest: str
    tensors: Mapping[str, Entry]
    coding: Mapping[str, Coded]
    version: int
    size: int

    @property
    def method(self) -> Method:
        """The specification as an object."""
        return decode(self.specification, Method, "$.method")


def save(module: Module, path: str | os.PathLike[str], *, dtype: Values | None = None) -> str:
    """Write a module to a file, whole or not at all, and return the digest of what was written.

    Masks and rising indices are coded without loss and without being asked (`coding.py`); the digest does not depend on it.

    Args:
        dtype: round the values first, see `compact`; None writes them as they are.

    Raises:
        ModuleError: a tensor holds NaN or infinity, or the header grows beyond its limits.
        StoreError: the file cannot be written; what was there before is untouched.
    """
    module = module if dtype is None else compact(module, dtype)
    chunks = _chunks(module, dtype == "int8")
    write_atomic(path, chunks, sum(len(chunk) for chunk in chunks))
    return module.digest


def load(path: str | os.PathLike[str], *, name: str | None = None) -> Module:
    """Read a module from a file.

    Args:
        name: a name to give it instead of the one in the file.

    Raises:
        ModuleError: the file is damaged, cut, of another format or of a newer version.
        StoreError: the file cannot be opened.
    """
    with _open(path) as (file, size), _about(path):
        return _read(file, size, name)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read what a module file says of itself; its tensors are neither read nor verified.

    Raises:
        ModuleError, StoreError: as `load`.
    """
    with _open(path) as (file, size), _about(path):
        return _header(read_layout(file, size, _version))


def put_card(path: str | os.PathLike[str], card: Card) -> str:
    """Replace the card in a module's file, whole or not at all, and return the digest, which stays.

    Every byte of the file is verified; the tensors' bytes are copied as they are, coded or not, and the file keeps its version.

    Raises:
        ModuleError, StoreError: as `load` and `save`; what was there before is untouched.
    """
    with _open(path) as (file, size), _about(path):
        whole = _recarded(file, size, card)
    digest = loads(whole, source=os.fspath(path)).digest  # verifies the tensors
    write_atomic(path, [whole], len(whole))
    return digest


def recarded(data: bytes, card: Card) -> bytes:
    """The bytes of a module's file with another card, as `put_card` writes it; the tensors are not verified.

    Raises:
        ModuleError: as `load`.
    """
    return _recarded(io.BytesIO(data), len(data), card)


def _recarded(file: io.BufferedIOBase, size: int, card: Card) -> bytes:
    layout = read_layout(file, size, _version)
    _header(layout)  # verifies the header that is replaced
    return _sealed(layout.entries, {**layout.metadata, "card": canonical_json(card).decode("utf-8")}) + file.read()


def dumps(module: Module, *, dtype: Values | None = None) -> bytes:
    """The bytes `save` would write."""
    return b"".join(_chunks(module if dtype is None else compact(module, dtype), dtype == "int8"))


def loads(data: bytes, *, name: str | None = None, source: str = "bytes") -> Module:
    """Read a module from the bytes of a file.

    Args:
        source: where they come from, for messages.

    Raises:
        ModuleError: as `load`.
    """
    with _about(source):
        return _read(io.BytesIO(data), len(data), name)


def _chunks(module: Module, int8: bool) -> list[bytes | memoryview]:
    """The file in pieces: length and header, then each tensor's memory."""
    _check_host()
    check_finite(module.tensors)
    coded = {key: found for key, tensor in module.tensors.items() if (found := encoded(tensor, int8))}
    held = {key: coded[key][1] if key in coded else tensor for key, tensor in module.tensors.items()}
    entries = lay_out({key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in held.items()})
    coding = {_CODING: canonical_json({key: list(what) for key, (what, _) in coded.items()}).decode("utf-8")} if coded else {}
    values = {
        "format": FORMAT, "version": "2" if coded else "1", **coding, "needs": NEEDS, "name": module.name, "digest": module.digest,
        **{
            key: canonical_json(value).decode("utf-8")
            for key, value in (
                ("method", module.method), ("base", module.base.to_dict()), ("labels", module.labels), ("roles", module.roles),
                ("requires", module.requires), ("context", module.context), ("card", module.card),
            )
        },
    }  # fmt: skip
    return [_sealed(entries, values), *(tensor_bytes(held[key]) for key in entries)]


def _sealed(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header with the checksum over both."""
    blank = header_bytes(entries, {**metadata, "checksum": _BLANK.decode()})
    checksum = hashlib.sha256(blank).hexdigest()
    return blank.replace(_field(_BLANK), _field(checksum.encode()))


def _field(checksum: bytes) -> bytes:
    """The checksum as it stands in the header; quotes inside other values are escaped, so nothing else looks like it."""
    return b'"checksum":"' + checksum + b'"'


def _read(file: io.BufferedIOBase, size: int, name: str | None) -> Module:
    _check_host()
    layout = read_layout(file, size, _version)
    header = _header(layout)
    tensors, hashes = Owned(), {}
    for key, entry in layout.entries.items():
        tensor = _read_tensor(file, key, entry, layout)
        tensors[key] = decoded(key, header.coding[key], tensor) if key in header.coding else tensor
        hashes[key] = tensor_sha256(tensors[key])
    module = Module(
        name=header.name if name is None else name,
        method=header.method,
        tensors=tensors,
        base=header.base,
        labels=header.labels,
        roles=header.roles,
        requires=header.requires,
        card=header.card,
        context=header.context,
    )
    digest = identity(module, hashes)
    if digest != header.digest:
        raise ModuleError(f"damaged: the tensors do not match the digest; found {digest[:12]}..., the file says {header.digest[:12]}...")
    check_finite(tensors)
    module.__dict__["digest"] = digest
    return module


def _read_tensor(file: io.BufferedIOBase, key: str, entry: Entry, layout: Layout) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    target, filled = tensor_bytes(tensor), 0
    while filled < len(target):
        count = file.readinto(target[filled:])
        if not count:
            raise ModuleError(f"truncated while being read: {len(layout.text) + entry.begin + filled:,} of {layout.size:,} bytes")
        filled += count
    if entry.dtype == "BOOL" and filled and int(tensor.view(torch.uint8).max()) > 1:
        raise ModuleError(f"damaged: tensor {key!r} is BOOL but holds bytes other than 0 and 1")
    return tensor


def _header(layout: Layout) -> Header:
    """Interpret and check the metadata of a module file."""
    meta = layout.metadata
    version = _version(meta)
    keys = _KEYS if version == 1 else _KEYS | {_CODING}
    unknown, missing = sorted(set(meta) - keys), sorted(keys - set(meta))
    if unknown or missing:
        parts = [f"unknown entries {listing(ascii(k[:40]) for k in unknown)}"] * bool(unknown) + [f"missing entries {listing(missing, 20)}"] * bool(missing)
        raise ModuleError(f"header: {' and '.join(parts)} in the metadata")
    _verify_checksum(layout)
    value = {key: parse_json(meta[key], key) for key in ("method", "base", "labels", "roles", "requires", "context", "card")}
    if not isinstance(value["method"], dict):
        raise ModuleError("header: the method is not a JSON object")
    try:
        base = Fingerprint.from_dict(value["base"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModuleError(f"header: the base's fingerprint cannot be read: {error}") from error
    coding = _coding(parse_json(meta[_CODING], _CODING), layout) if version > 1 else {}
    tensors = {k: Entry(coding[k].dtype, coding[k].shape, e.begin, e.end) if k in coding else e for k, e in layout.entries.items()}
    return Header(
        name=meta["name"],
        specification=value["method"],
        base=base,
        labels=decode(value["labels"], tuple[str, ...] | None, "$.labels"),
        roles=decode(value["roles"], Mapping[str, str], "$.roles"),
        requires=decode(value["requires"], tuple[str, ...], "$.requires"),
        context=decode(value["context"], Mapping[str, object], "$.context"),
        card=decode(value["card"], Card, "$.card"),
        digest=meta["digest"],
        tensors=tensors,
        coding=coding,
        version=version,
        size=layout.size,
    )


def _coding(value: Any, layout: Layout) -> dict[str, Coded]:
    """How tensors are coded, checked against the bytes each has; nothing of their decoded size is allocated."""
    if not isinstance(value, dict) or not value:
        raise ModuleError("header: coding is not an object that names a tensor")
    found = {}
    for key, what in value.items():
        entry = layout.entries.get(key)
        if entry is None or entry.dtype != "U8" or len(entry.shape) != 1:
            raise ModuleError(f"header: coding names {ascii(key)[:80]}, which is no row of bytes in this file")
        if not isinstance(what, list) or len(what) != 3 or not all(isinstance(word, str) for word in what[:2]) or not are_sizes(what[2]):
            raise ModuleError(f"header: the coding of tensor {key!r} is {str(what)[:80]}; expected [code, dtype, shape]")
        found[key] = Coded(what[0], what[1], tuple(what[2]))
        check_size(key, found[key], entry.end - entry.begin)
    return found


def _version(meta: Mapping[str, str]) -> int:
    """The format version, if these are the metadata of a module this code can read."""
    if meta.get("format") != FORMAT:
        found = f"its metadata says format {meta['format'][:40]!r}" if "format" in meta else "its metadata names no format"
        raise ModuleError(
            f"a safetensors file, but not an intarsia module: {found}. It lacks the method and the base it belongs to; "
            "such tensors become a module only together with those"
        )
    text, needs = meta.get("version", ""), meta.get("needs", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ModuleError(f"header: version is {text[:40]!r}, expected a number")
    if int(text) > VERSION:
        release = f"intarsia >= {needs}" if re.fullmatch(r"[0-9]+(\.[0-9]+){0,3}", needs[:40]) else "a newer intarsia"
        raise ModuleError(f"the file has format version {text}, this intarsia reads up to {VERSION}: it needs {release} (pip install -U intarsia)")
    return int(text)


def _verify_checksum(layout: Layout) -> None:
    written = layout.metadata["checksum"]
    if not _HEX.fullmatch(written) or layout.text.count(_field(written.encode())) != 1:
        raise ModuleError("damaged: the header's checksum cannot be read")
    found = hashlib.sha256(layout.text.replace(_field(written.encode()), _field(_BLANK))).hexdigest()
    if found != written:
        raise ModuleError(f"damaged or edited: the header does not match its checksum; found {found[:12]}..., the file says {written[:12]}...")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModuleError: names the tensor, how many values are not finite, and the place of the first.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_BLOCK)):
            continue
        bad = ~torch.isfinite(tensor)
        first = tuple(bad.nonzero()[0].tolist())
        more = f"{int(bad.sum()):,} of {tensor.numel():,} values"
        raise ModuleError(f"tensor {key!r}: {more} are NaN or infinite, the first at {first}; a module holds finite numbers only")


def _check_host() -> None:
    if sys.byteorder != "little":
        raise ModuleError("module files are little endian; this machine is not, and swapping bytes is not implemented")


@contextlib.contextmanager
def _about(source: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except (ModuleError, SpecError) as error:
        raise ModuleError(f"module file {os.fspath(source)}: {error}") from error


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """Open a regular file, following links; a pipe or device is refused without waiting for it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StoreError(_explain(error, Path(path))) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        what = "a folder; name the module file in it" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise StoreError(f"cannot read {os.fspath(path)}: it is {what}")
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file, status.st_size
        except OSError as error:
            raise StoreError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error


def _explain(error: Exception, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        with contextlib.suppress(OSError, ValueError):
            return f"no such file: {path}{nearest(path.name, os.listdir(path.parent))}"
        return f"no such file: {path}"
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"cannot read {path}: permission denied"
    return f"cannot read {str(path)!r}: {error}"
