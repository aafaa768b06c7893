"""Remotes: places that modules are sent to and fetched from, always because somebody asks for it.

    a path, file://PATH      another store; its lock is taken
    hf://USER/REPOSITORY     a model repository of the Hugging Face Hub (`hub.py`)
    memory://, s3://, ...    any file system that fsspec knows and whose package is installed

A remote is laid out like a store, with one folder more, `digests/<digest>`: the sha256 of a file of the module with that digest,
so that what a module requires is found without reading every file.  A file is written under another name, read back, compared
with its sha256 and only then given its own name.

What is not here: which modules go (`transfer.py`).  fsspec has no locks: of two that push the same new version to a remote at
once, the last one wins; both files stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError
from intarsia.store.entry import Label
from intarsia.store.pointers import check_label, check_store_name, decoded, encoded, is_version, pointed
from intarsia.store.store import Store

LOCAL = ("file", "local", "memory")
"""Schemes that open no network connection."""


class Remote(Protocol):
    """A place with modules under names."""

    @property
    def url(self) -> str:
        """What the user typed."""
        ...

    def names(self) -> list[str]:
        """All names."""
        ...

    def listed(self, name: str) -> list[str]:
        """Versions and tags of a name; empty if there is no such name."""
        ...

    def pointer(self, name: str, label: str) -> str | None:
        """The sha256 behind `name@label`, None if there is none."""
        ...

    def by_digest(self, digest: str) -> str | None:
        """sha256 of a file of the module with this digest, None if there is none."""
        ...

    def fetch(self, sha256: str, limit: int) -> bytes:
        """The bytes of a file, verified.

        Raises:
            ModuleError: they do not have the hash.
            StoreError: the file is missing, larger than `limit`, or the remote does not answer.
        """
        ...

    def send(self, source: Store, hashes: Sequence[str], labels: Sequence[Label]) -> None:
        """Send files of a store and then names, each file verified after its transfer.

        Raises:
            StoreError: a version is there with other content, or the remote does not answer.
        """
        ...


def open_remote(url: str, *, allow_network: bool = False) -> Remote:
    """The remote at a URL or path.

    Raises:
        UsageError: the URL is malformed, its file system is not installed, or it needs the network and that was not allowed.
    """
    scheme = urlsplit(url).scheme.lower() if "://" in url else "file"
    if "::" in url:
        raise UsageError(f"remote {url!r}: chained file systems ('::') are not used; give the place itself")
    if scheme not in LOCAL and not allow_network:
        raise UsageError(f"remote {url!r} is reached over the network; say that it may be: --allow-network")
    if scheme == "hf":
        from intarsia.store.hub import HubRemote

        return HubRemote(url)
    if scheme in ("file", "local"):
        return FolderRemote(url.split("://", 1)[-1])
    return FileSystemRemote(url)


class FolderRemote:
    """Another store in a folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.url = os.fspath(path)
        self.store = Store(path)
        self._digests: dict[str, list[str]] | None = None

    def names(self) -> list[str]:
        return sorted(self.store.names())

    def listed(self, name: str) -> list[str]:
        return list(self.store.labels(name))

    def pointer(self, name: str, label: str) -> str | None:
        return self.store.pointer(name, label)

    def by_digest(self, digest: str) -> str | None:
        if self._digests is None:
            self._digests = self.store.by_digest()
        return next(iter(self._digests.get(digest, ())), None)

    def fetch(self, sha256: str, limit: int) -> bytes:
        size = self.store.header(sha256).size
        if size > limit:
            raise too_large(self.url, sha256, size, limit)
        return self.store.read(sha256)

    def send(self, source: Store, hashes: Sequence[str], labels: Sequence[Label]) -> None:
        self.store.check_free(labels)
        for sha256 in hashes:
            self.store.keep(sha256, source.read(sha256))
            self.store.read(sha256)  # as it is on the disk now
        self.store.point(labels, allow_missing=True)  # what is missing was asked for when the files were chosen


class FileSystemRemote:
    """A folder in a file system of fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"remote {url!r}: {error}") from error
        self._root = root.rstrip("/")
        self._fs.invalidate_cache()

    def names(self) -> list[str]:
        folder = f"{self._root}/names"
        return sorted(decoded(entry, folder) for entry in self._entries(folder))

    def listed(self, name: str) -> list[str]:
        return [check_label(entry) for entry in self._entries(f"{self._root}/names/{encoded(check_store_name(name))}")]

    def pointer(self, name: str, label: str) -> str | None:
        return self._pointer(self._label(name, label))

    def by_digest(self, digest: str) -> str | None:
        return self._pointer(f"{self._root}/digests/{digest}")

    def fetch(self, sha256: str, limit: int) -> bytes:
        return self._read(self._blob(sha256), sha256, limit)

    def send(self, source: Store, hashes: Sequence[str], labels: Sequence[Label]) -> None:
        check_versions(self, labels)
        for sha256 in hashes:
            data = source.read(sha256)
            if not self._has(sha256, len(data)):
                self._place(self._blob(sha256), data)
            self._place(f"{self._root}/digests/{source.header(sha256).digest}", f"{sha256}\n".encode())
        for each in sorted(labels, key=lambda each: not is_version(each.label)):
            self._place(self._label(each.name, each.label), f"{each.sha256}\n".encode())

    def _has(self, sha256: str, size: int) -> bool:
        try:
            return bool(self._read(self._blob(sha256), sha256, size))
        except (StoreError, ModuleError):  # not there, or damaged: sent again
            return False

    def _place(self, path: str, data: bytes) -> None:
        folder = path.rpartition("/")[0]
        temporary = f"{folder}/.intarsia-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        with reaching(self.url):
            self._fs.makedirs(folder, exist_ok=True)
            try:
                self._fs.pipe_file(temporary, data)
                self._read(temporary, hashlib.sha256(data).hexdigest(), len(data))
                self._fs.mv(temporary, path)
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is what counts
                    self._fs.rm_file(temporary)
                raise

    def _read(self, path: str, sha256: str, limit: int) -> bytes:
        with reaching(self.url):
            if not self._fs.isfile(path):
                raise StoreError(f"remote {self.url}: no file {path}")
            size = self._fs.info(path).get("size")
            if not isinstance(size, int):
                raise StoreError(f"remote {self.url}: it does not say how large {path} is, and nothing is read blindly")
            if size > limit:
                raise too_large(self.url, path.rpartition("/")[2], size, limit)
            with self._fs.open(path, "rb") as file:
                data: bytes = file.read(size)
        check_hash(self.url, data, sha256)
        return data

    def _pointer(self, path: str) -> str | None:
        with reaching(self.url):
            if not self._fs.isfile(path):
                return None
            with self._fs.open(path, "rb") as file:
                return pointed(file.read(66), path)

    def _entries(self, folder: str) -> list[str]:
        with reaching(self.url):
            try:
                found: list[Any] = self._fs.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return sorted(entry for path in found if not (entry := path.rstrip("/").rpartition("/")[2]).startswith("."))

    def _blob(self, sha256: str) -> str:
        return f"{self._root}/blobs/{sha256}.safetensors"

    def _label(self, name: str, label: str) -> str:
        return f"{self._root}/names/{encoded(check_store_name(name))}/{check_label(label)}"


def check_versions(remote: Remote, labels: Sequence[Label]) -> None:
    """Refuse to change a version.

    Raises:
        StoreError: one is in the remote with other content.
    """
    for each in labels:
        held = remote.pointer(each.name, each.label)
        if is_version(each.label) and held not in (None, each.sha256):
            raise StoreError(f"remote {remote.url}: {each} is {str(held)[:12]}... there and {each.sha256[:12]}... here; a version never changes. Nothing was sent")


def check_hash(url: str, data: bytes, sha256: str) -> None:
    """Refuse bytes that do not have their hash.

    Raises:
        ModuleError: says both.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ModuleError(f"remote {url}: damaged in the transfer or there: the sha256 is {found[:12]}..., expected {sha256[:12]}...")


def too_large(url: str, what: str, size: int, limit: int) -> StoreError:
    """The error for a file that announces more bytes than are allowed."""
    return StoreError(f"remote {url}: {what[:40]} has {size:,} bytes; at most {limit:,} are read, --max-bytes allows more")


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Whatever a file system raises, as an error that names the remote."""
    try:
        yield
    except IntarsiaError:
        raise
    except Exception as error:  # every backend has errors of its own
        raise StoreError(f"remote {url}: {type(error).__name__}: {str(error).strip()[:300] or 'no answer'}") from error
