"""Modules on the way: `push` and `pull` between a store and a remote, `take` from files and bundles, `bundle` into one.

What a module requires goes with it.  Files come first and names last, so that whoever looks in between sees no name without its
module; a transfer that breaks off leaves files without names, which the next attempt finds and `gc` removes in time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.errors import ModuleError, StoreError, UsageError, listing, nearest
from intarsia.modules import read_header
from intarsia.store.bundle import LARGEST, is_bundle, read_bundle, write_bundle
from intarsia.store.entry import Label
from intarsia.store.pointers import LATEST, check_store_name, is_version, order
from intarsia.store.remote import FolderRemote, Remote
from intarsia.store.store import Store


@dataclass(frozen=True, slots=True)
class Moved:
    """What a transfer brought.

    Attributes:
        labels: names written.
        files: sha256 of the module files, those included that were there already.
        required: files that came along because a module requires them.
    """

    labels: tuple[Label, ...]
    files: tuple[str, ...]
    required: tuple[str, ...]


def push(store: Store, remote: Remote, references: Sequence[str] = (), *, everything: bool = False, allow_missing: bool = False) -> Moved:
    """Send modules to a remote, with what they require.

    Args:
        references: names (the newest version), `name@version`, `name@tag` (the tag and its version).
        everything: all names instead.
        allow_missing: send a module although one that it requires is not in the store.

    Raises:
        StoreError: nothing is called so, a version is there with other content, or the remote does not answer.
    """
    labels = chosen(FolderRemote(store.path), references, everything)
    files, required = _closure(store, labels, allow_missing)
    remote.send(store, files, labels)
    return Moved(tuple(labels), tuple(files), tuple(required))


def pull(
    store: Store, remote: Remote, references: Sequence[str] = (), *, everything: bool = False, limit: int = LARGEST, allow_missing: bool = False
) -> Moved:
    """Fetch modules from a remote, with what they require.  A tag that is asked for moves.

    Args:
        limit: bytes that are read at most for one module.

    Raises:
        ModuleError: what arrives is damaged.
        StoreError: nothing is called so, a version is here with other content, what is required is nowhere, or the remote does not answer.
    """
    labels = chosen(remote, references, everything)
    store.check_free(labels)
    files = list(dict.fromkeys(each.sha256 for each in labels))
    required: list[str] = []
    here = store.by_digest() if store.path.exists() else {}
    waiting = list(files)
    while waiting:
        sha256 = waiting.pop()
        module = store.keep(sha256, _bytes(store, remote, sha256, limit))
        for digest in module.requires:
            other = None if digest in here else remote.by_digest(digest)
            if other is not None and other not in (*files, *required):
                required.append(other)
                waiting.append(other)
    store.point(labels, allow_missing=allow_missing)
    return Moved(tuple(labels), (*files, *required), tuple(required))


def _bytes(store: Store, remote: Remote, sha256: str, limit: int) -> bytes:
    """A file as it is here; else, or where it is damaged here, as the remote has it."""
    if store.holds(sha256):
        with contextlib.suppress(ModuleError):
            return store.read(sha256)
    return remote.fetch(sha256, limit)


def take(store: Store, path: str | os.PathLike[str], *, limit: int = LARGEST, allow_missing: bool = False) -> Moved:
    """Take modules from a module file, a bundle, a folder of module files, or another store's folder.

    Module files get the name they have and the next version; a bundle and a store bring names and versions of their own.

    Raises:
        ModuleError: something is damaged; of a bundle nothing is taken then.
        StoreError: a version is here with other content, or there is nothing to take.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "blobs").is_dir() and (place / "names").is_dir():
            return pull(store, FolderRemote(place), everything=True, limit=limit, allow_missing=allow_missing)
        return _folder(store, place, allow_missing)
    if not is_bundle(place):
        return _files(store, [place], allow_missing)
    files, labels = read_bundle(place, limit=limit)
    store.check_free(labels)
    for sha256, data in files.items():
        store.keep(sha256, data)
    store.point(labels, allow_missing=allow_missing)
    named = {each.sha256 for each in labels}
    return Moved(tuple(labels), tuple(files), tuple(sha256 for sha256 in files if sha256 not in named))


def bundle(store: Store, path: str | os.PathLike[str], references: Sequence[str] = (), *, everything: bool = False, allow_missing: bool = False) -> Moved:
    """Write modules of a store, with what they require, into one file.

    Raises:
        StoreError: nothing is called so, or the file exists.
    """
    labels = chosen(FolderRemote(store.path), references, everything)
    files, required = _closure(store, labels, allow_missing)
    write_bundle(path, {sha256: store.read(sha256) for sha256 in files}, labels)
    return Moved(tuple(labels), tuple(files), tuple(required))


def chosen(source: Remote, references: Sequence[str], everything: bool = False) -> list[Label]:
    """The names that references mean in a place.

    Raises:
        UsageError: there are none, or references and everything.
        StoreError: nothing is called so.
    """
    if bool(references) == everything:
        raise UsageError("say which modules: names such as topics@2, or --all for every one")
    if everything:
        found = [Label(name, label, sha256) for name in source.names() for label in source.listed(name) if (sha256 := source.pointer(name, label))]
        if not found:
            raise StoreError(f"{source.url}: there are no modules")
        return found
    return list(dict.fromkeys(label for reference in references for label in _one(source, reference)))


def _one(source: Remote, reference: str) -> list[Label]:
    name, at, label = reference.rpartition("@")
    name, label = (name, label) if at else (reference, LATEST)
    have = source.listed(check_store_name(name))
    versions = sorted((each for each in have if is_version(each)), key=order)
    if label == LATEST and versions:
        label = versions[-1]
    sha256 = source.pointer(name, label) if label in have else None
    if sha256 is None:
        what = f"{name!r} has {listing(have)}" if have else f"no module is called so{nearest(name, source.names())}"
        raise StoreError(f"{source.url}: no {reference!r}; {what}")
    same = [] if is_version(label) else [each for each in versions if source.pointer(name, each) == sha256]
    return [Label(name, each, sha256) for each in (*same, label)]


def _closure(store: Store, labels: Sequence[Label], allow_missing: bool) -> tuple[list[str], list[str]]:
    """Files behind names, and those that they require."""
    files = list(dict.fromkeys(each.sha256 for each in labels))
    required: list[str] = []
    here: dict[str, list[str]] | None = None
    waiting = list(files)
    while waiting:
        header = store.header(waiting.pop())
        for digest in header.requires:
            here = store.by_digest() if here is None else here
            held = here.get(digest)
            if held is None and not allow_missing:
                raise StoreError(f"store {store.path}: {header.name!r} requires digest {digest[:12]}..., which is not in the store; --allow-missing goes on without it")
            if held and not any(each in files or each in required for each in held):
                required.append(held[0])
                waiting.append(held[0])
    return [*files, *required], required


def _folder(store: Store, folder: Path, allow_missing: bool) -> Moved:
    found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file() and not path.name.startswith("."))
    if not found:
        raise StoreError(f"{folder} has no module files (*.safetensors) and is no store; name the folder that holds them")
    return _files(store, found, allow_missing)


def _files(store: Store, paths: Sequence[Path], allow_missing: bool) -> Moved:
    """Module files in an order in which what is required comes first."""
    headers = {path: read_header(path) for path in paths}
    ordered: list[Path] = []
    while rest := [path for path in paths if path not in ordered]:
        waiting = {headers[path].digest for path in rest}
        ordered += [path for path in rest if waiting.isdisjoint(headers[path].requires)] or rest
    hashes, labels = [], []
    for path in ordered:
        sha256 = store.add(path, allow_missing=allow_missing)
        hashes.append(sha256)
        name = headers[path].name
        labels += [Label(name, label, sha256) for label, held in store.labels(name).items() if held == sha256 and is_version(label)]
    return Moved(tuple(labels), tuple(hashes), ())
