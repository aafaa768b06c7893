"""The names of a store: `names/<name>/<version or tag>`, each a file that holds the sha256 of a blob.

A version begins with a digit and never changes; a tag begins with a letter and moves.  A name is written into the file
system percent-encoded, upper-case letters and dots too, so that no name is a path and names stay apart where the file system
ignores case.

What is not here: locks (`store.py` holds one around every change) and blobs.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from intarsia.errors import StoreError, UsageError
from intarsia.modules.atomic import _sync_folder, sweep_temporary, write_atomic
from intarsia.modules.names import check_name

LATEST = "latest"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")
_LONGEST = 200  # bytes of an encoded name; file systems allow 255
_VERSION = re.compile(r"[0-9][a-z0-9_.-]{0,59}")
_TAG = re.compile(r"[a-z][a-z0-9_.-]{0,59}")
_DEVICES = frozenset(("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))))  # Windows takes them for devices
_SHA256 = re.compile(rb"([0-9a-f]{64})\n")


class Pointers:
    """The pointer files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """All names, sorted; a folder in which nothing stands yet is none."""
        return sorted(decoded(entry, self.folder) for entry in _listed(self.folder) if _listed(self.folder / entry))

    def labels(self, name: str) -> dict[str, str]:
        """Versions and tags of a name with the sha256 each holds; empty if there is no such name."""
        folder, found = self._of(name), {}
        for label in sorted(_listed(folder)):
            try:
                found[label] = self._read(folder / check_label(label))
            except StoreError:
                if os.path.lexists(folder / label):  # else another process has just removed it
                    raise
        return found

    def versions(self, name: str) -> list[str]:
        """Versions of a name, the newest last (numbers count as numbers)."""
        return sorted((entry for entry in _listed(self._of(name)) if _VERSION.fullmatch(entry)), key=order)

    def read(self, name: str, label: str) -> str | None:
        """The sha256 behind `name@label`, None if there is none."""
        path = self._of(name) / check_label(label)
        return self._read(path) if real_folder(path.parent) and os.path.lexists(path) else None

    def write(self, name: str, label: str, sha256: str) -> None:
        """Write a pointer, replacing a tag whole."""
        folder = self._of(name)
        make_folder(folder)
        path = folder / check_label(label)
        if os.path.lexists(path):
            self._read(path)  # a link or a damaged file is not replaced without a word
        write_atomic(path, [f"{sha256}\n".encode()], 65)

    def remove(self, name: str, label: str) -> None:
        """Remove a pointer, and the name with its last one."""
        folder = self._of(name)
        (folder / check_label(label)).unlink()
        _sync_folder(folder)
        if not _listed(folder):
            sweep_temporary(folder, 0.0)  # of killed writers: this one holds the lock
            folder.rmdir()
            _sync_folder(self.folder)

    def sweep(self, grace: float) -> None:
        """Remove what killed writers left: temporary files older than `grace` seconds, and folders in which nothing stands."""
        for folder in [self.folder / entry for entry in _listed(self.folder)]:
            if real_folder(folder):
                sweep_temporary(folder, grace)
                if not os.listdir(folder):
                    folder.rmdir()

    def _of(self, name: str) -> Path:
        name = check_store_name(name)
        real_folder(self.folder)  # refuses a link
        return self.folder / encoded(name)

    def _read(self, path: Path) -> str:
        return pointed(read_regular(path, 66), path)


def pointed(data: bytes, path: str | Path) -> str:
    """The sha256 in a pointer file.

    Raises:
        StoreError: it holds something else.
    """
    found = _SHA256.fullmatch(data)
    if found is None:
        raise StoreError(f"store: pointer {path} is damaged: expected one sha256 of 64 hexadecimal digits, found {data[:40]!r}")
    return found[1].decode()


def check_store_name(name: str) -> str:
    """A module's name that may stand in a store: as elsewhere, without `@`, and not too long for a file system."""
    name = check_name(name)
    if "@" in name:
        raise UsageError(f"store: the name {name!r} contains '@', which separates name and version; give another with --name")
    if len(encoded(name)) > _LONGEST:
        raise UsageError(f"store: the name {name[:40]!r}... takes {len(encoded(name))} bytes as a folder; at most {_LONGEST} are allowed")
    return name


def check_label(label: str) -> str:
    """A version or a tag."""
    if not _VERSION.fullmatch(label) and not _TAG.fullmatch(label):
        raise UsageError(
            f"store: {label[:60]!a} is neither a version (such as '3' or '1.0.2') nor a tag (such as 'best'): small letters, digits, '_', '.', '-', at most 60"
        )
    if label.endswith(".") or label.split(".")[0] in _DEVICES:
        raise UsageError(f"store: {label!r} is no file name on Windows; take another version or tag")
    return label


def is_version(label: str) -> bool:
    """Whether a label is a version; the others are tags."""
    return _VERSION.fullmatch(label) is not None


def real_folder(path: Path) -> bool:
    """Whether a folder is there.

    Raises:
        StoreError: something else is in its place, such as a symbolic link.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise StoreError(f"store: {path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'not a folder'}; a store holds plain files and folders only")
    return True


def _listed(folder: Path) -> list[str]:
    """Entries of a folder without those that begin with a dot (files being written); none if it is not there."""
    try:
        return [entry for entry in os.listdir(folder) if not entry.startswith(".")] if real_folder(folder) else []
    except FileNotFoundError:  # removed since
        return []


def make_folder(path: Path) -> None:
    """Make a folder of the store, and those above it, and put the entry of each on the disk."""
    if real_folder(path):
        return
    try:
        for each in reversed([path, *itertools.takewhile(lambda above: not above.exists(), path.parents)]):
            each.mkdir(exist_ok=True)
            _sync_folder(each.parent)
    except OSError as error:
        raise StoreError(f"store: cannot make the folder {path}: {error.strerror}; choose another with --store") from error


def read_regular(path: Path, limit: int) -> bytes:
    """Up to `limit` bytes of a regular file; a link is not followed, a pipe or device not waited for.

    Raises:
        StoreError: it is missing, cannot be read, or is something else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise StoreError(f"store: {path} is a symbolic link; a store holds plain files and folders only")
        descriptor = os.open(path, flags)
    except OSError as error:
        raise StoreError(f"store: cannot read {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreError(f"store: {path} is not a regular file; a store holds plain files and folders only")
        return file.read(limit)


def order(version: str) -> list[tuple[int, int, str]]:
    """Where a version, or another text with numbers, stands among others: numbers before words, numbers by size: 2 before 10, 1.0 before 1.0.1."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", version)]


def encoded(name: str) -> str:
    """A name as it stands in a file system: small letters, digits, `_`, `-`; every other byte as `%XX`."""
    data = name.encode("utf-8")
    first = f"%{data[0]:02X}" if name in _DEVICES else ""
    return first + "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data[bool(first) :])


def decoded(entry: str, folder: str | Path) -> str:
    """The inverse of `encoded`.

    Raises:
        StoreError: no name is written so.
    """
    name = unquote(entry, errors="replace")
    if not name or encoded(name) != entry:
        raise StoreError(f"store: {folder}/{entry} is not the name of a module as a store writes it; move it away")
    return name
