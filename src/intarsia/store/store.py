"""`Store`: modules kept in a folder by the hash of their bytes, with names, versions and tags that point at them.

    blobs/<sha256>.safetensors    module files as `modules.save` writes them; never changed
    names/<name>/<version>        the sha256 of a blob; never changed
    names/<name>/<tag>            the same, may be moved

A writer holds the lock of the store (`.lock`; released by the system when a process dies) and writes a blob before its
pointer, each whole and synced.  Readers take no lock: what they find is whole, and its hash is checked.

What is not here: the pointer files (`pointers.py`), what is asked of modules (`finding.py`), what modules are to one another
(`lineage.py`), bundles (`bundle.py`), remotes (`remote.py`), comparison of two modules (`diff.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError, listing, nearest
from intarsia.modules import Header, Module, dumps, loads, read_header, recarded, sweep_temporary, write_atomic
from intarsia.modules.atomic import _sync_folder
from intarsia.store.entry import Collected, Label, Stored
from intarsia.store.finding import Query
from intarsia.store.pointers import (
    LATEST,
    Pointers,
    check_label,
    check_store_name,
    is_version,
    make_folder,
    read_regular,
    real_folder,
)

GRACE = 3600.0
"""Seconds for which `gc` keeps a blob that nothing points at."""
_SUFFIX = ".safetensors"
_BLOB = re.compile(r"([0-9a-f]{64})\.safetensors")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_WAIT = 60.0  # seconds for another writer to finish


def default_path() -> Path:
    """The folder of the environment variable INTARSIA_STORE, else `~/.local/share/intarsia`."""
    return Path(os.environ.get("INTARSIA_STORE") or "~/.local/share/intarsia").expanduser()


class Store:
    """A store in a folder, which is made by the first `add`.

    Args:
        path: the folder; None is `default_path()`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self._blobs = self.path / "blobs"
        self._pointers = Pointers(self.path / "names")

    def add(
        self, module: Module | str | os.PathLike[str], *, name: str | None = None, version: str | None = None, tags: Iterable[str] = (),
        conflicts: Iterable[str] = (), allow_missing: bool = False,
    ) -> str:  # fmt: skip
        """Keep a module, or the module file at a path, and return the sha256 of its file.

        Args:
            name: name in the store, by default the module's own.
            version: by default the next whole number; the newest version again if it holds the same bytes.
            tags: tags to move to it.
            conflicts: references of modules it must not be used together with; written on its card.
            allow_missing: keep it although a module that it requires is not in the store.

        Raises:
            ModuleError, StoreError: the file is damaged or cannot be read.
            StoreError: the version exists with other content, what it requires is not here, or the store cannot be written.
        """
        if isinstance(module, Module):
            data = dumps(module)
        else:
            size = read_header(module).size  # limits are checked before the file is read
            data = _read_outside(Path(module), size)
            module = loads(data, source=os.fspath(module))
        if foes := [self.header(reference).digest for reference in conflicts]:
            data = recarded(data, replace(module.card, conflicts=tuple(dict.fromkeys((*module.card.conflicts, *foes)))))
        name = check_store_name(module.name if name is None else name)
        tags = [_check_tag(tag) for tag in tags]
        if version is not None and not is_version(check_label(version)):
            raise UsageError(f"store: version {version!r} must begin with a digit; a word is a tag: --tag {version}")
        sha256 = hashlib.sha256(data).hexdigest()
        with self._locked():
            if not allow_missing and (missing := self.missing(module.requires)):
                raise StoreError(
                    f"store {self.path}: {module.name!r} requires {listing(_short(digest) for digest in missing)}, not in this store; "
                    "add what it requires first, or go on with --allow-missing"
                )
            version = self._free_version(name, version, sha256)
            self._put(sha256, data)
            self._pointers.write(name, version, sha256)
            for tag in tags:
                self._pointers.write(name, tag, sha256)
        return sha256

    def resolve(self, reference: str) -> str:
        """The sha256 that a name (its newest version), `name@version`, `name@tag` or 8 or more first digits of a sha256 mean.

        Raises:
            StoreError: nothing is called so, or more than one module is.
        """
        name, at, label = reference.rpartition("@")
        if at:
            found = self._newest(name) if label == LATEST else self._pointers.read(name, label)
            if found is None:
                have = sorted(self._pointers.labels(name))
                raise StoreError(f"store {self.path}: no {reference!r}; " + (f"{name!r} has {listing(have)}" if have else self._no_name(name)))
            return found
        candidates = {named} if (named := self._newest(reference)) else set()
        if _PREFIX.fullmatch(reference):
            candidates |= {sha256 for sha256 in self._hashes() if sha256.startswith(reference)}
        if len(candidates) > 1:
            raise StoreError(f"store {self.path}: {reference!r} is ambiguous: it means {listing(sorted(candidates))}; type more digits, or name@version")
        if not candidates:
            raise StoreError(f"store {self.path}: no {reference!r}; {self._no_name(reference)}")
        return candidates.pop()

    def get(self, reference: str) -> Module:
        """Load a module; only its pointer and its file are opened.

        Raises:
            StoreError: there is none, see `resolve`.
            ModuleError: the bytes do not have the hash, or are no module.
        """
        sha256 = self.resolve(reference)
        return loads(self.read(sha256), source=str(self._blob(sha256)))

    def file(self, reference: str) -> Path:
        """The verified file of a module, to be read and not to be changed.

        Raises:
            StoreError, ModuleError: see `get`.
        """
        sha256 = self.resolve(reference)
        self.read(sha256)
        return self._blob(sha256)

    def read(self, sha256: str) -> bytes:
        """The verified bytes of a module's file.

        Raises:
            StoreError: it is not here.
            ModuleError: the bytes do not have the hash.
        """
        size = self._header(sha256).size
        data = read_regular(self._blob(sha256), size + 1)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ModuleError(f"store: {self._blob(sha256)} is damaged: its sha256 is {found[:12]}..., the name says {sha256[:12]}...; add the module again")
        return data

    def holds(self, sha256: str) -> bool:
        """Whether a file with this hash is here; it is not read."""
        return os.path.lexists(self._blob(sha256))

    def by_digest(self) -> dict[str, list[str]]:
        """sha256 of the files by the digest of the module in them: two files of one module differ in the card only."""
        found: dict[str, list[str]] = {}
        for sha256 in self._hashes():
            with contextlib.suppress(IntarsiaError):  # a damaged file holds no module; if it is reached, `_reached` refuses
                found.setdefault(self._header(sha256).digest, []).append(sha256)
        return found

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Which of these digests no module in the store has."""
        if not digests:
            return []
        here = self.by_digest()
        return [digest for digest in digests if digest not in here]

    def names_of(self, sha256: str) -> list[str]:
        """`name@version` and `name@tag` that point at a file."""
        return [f"{name}@{label}" for name, held in self.names().items() for label, value in held.items() if value == sha256]

    def labels(self, name: str) -> dict[str, str]:
        """Versions and tags of a name with the sha256 each holds; empty if there is no such name."""
        return self._pointers.labels(name)

    def pointer(self, name: str, label: str) -> str | None:
        """The sha256 behind `name@label`, None if there is none."""
        return self._pointers.read(name, label)

    def check_free(self, labels: Sequence[Label]) -> None:
        """Refuse names that cannot be written here.

        Raises:
            StoreError: a version is here with other content.
            UsageError: a name or label is malformed.
        """
        for each in labels:
            check_store_name(each.name)
            held = self._pointers.read(each.name, check_label(each.label))
            if is_version(each.label) and held not in (None, each.sha256):
                raise StoreError(
                    f"store {self.path}: {each} is {str(held)[:12]}... here and {each.sha256[:12]}... there; a version never changes. No name was written"
                )

    def keep(self, sha256: str, data: bytes) -> Module:
        """Keep a module file from elsewhere, verified, without a name: `point` gives it one, else `gc` removes it in time.

        Raises:
            ModuleError: the bytes do not have the hash, or are no module.
        """
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ModuleError(f"damaged on the way: the sha256 is {found[:12]}..., expected {sha256[:12]}...; the file was not taken")
        module = loads(data, source=f"module {sha256[:12]}")
        with self._locked():
            self._put(sha256, data)
        return module

    def point(self, labels: Sequence[Label], *, allow_missing: bool = False) -> None:
        """Write names that came from elsewhere: all of them, or none.

        Args:
            allow_missing: also where a module that one of them requires is not here.

        Raises:
            StoreError: a version is here with other content, a file is not here, or what a module requires is not.
        """
        with self._locked():
            self.check_free(labels)
            required: dict[str, Label] = {}
            for each in labels:
                required |= dict.fromkeys(self._header(each.sha256).requires, each)
            if not allow_missing and (missing := self.missing(list(required))):
                wants = ", ".join(f"{required[digest]} requires {_short(digest)}" for digest in missing[:5])
                raise StoreError(f"store {self.path}: no name was written: {wants}, which is neither here nor came along; --allow-missing goes on")
            for each in sorted(labels, key=lambda each: not is_version(each.label)):  # a tag stands beside versions only
                self._pointers.write(each.name, each.label, each.sha256)

    def header(self, reference: str) -> Header:
        """What a module says of itself; its tensors are not read."""
        return self._header(self.resolve(reference))

    def names(self) -> dict[str, dict[str, str]]:
        """Every name with its versions and tags and the sha256 each holds."""
        return {name: self._pointers.labels(name) for name in self._pointers.names()}

    def entries(self) -> list[Stored]:
        """Every module, by sha256; of each file the header is read.  A file that cannot be read is listed with its problem."""
        labels: dict[str, list[str]] = {}
        for name, held in self.names().items():
            for label, sha256 in held.items():
                labels.setdefault(sha256, []).append(f"{name}@{label}")
        found = [self._stored(sha256, tuple(labels.get(sha256, ()))) for sha256 in sorted({*self._hashes(), *labels})]
        return [entry for entry in found if entry.header or entry.names or self._blob(entry.sha256).exists()]  # else collected since

    def find(
        self, *, language: str | None = None, script: str | None = None, task: str | None = None, base: str | None = None,
        method: str | None = None, domain: str | None = None,
    ) -> list[Stored]:  # fmt: skip
        """The modules that answer to all that is asked for, see `Query`; those with a problem do not."""
        query = Query(language=language, script=script, task=task, base=base, method=method, domain=domain)
        return [entry for entry in self.entries() if entry.header is not None and query.fits(entry.header)]

    def verify(self, reference: str | None = None) -> list[str]:
        """Read modules (all of them by default) and say what is wrong; an empty list if nothing is."""
        named = {sha256 for labels in self.names().values() for sha256 in labels.values()}
        problems, digests, required = [], set(), {}
        for sha256 in sorted(named | set(self._hashes())) if reference is None else [self.resolve(reference)]:
            try:
                module = loads(self.read(sha256), source=str(self._blob(sha256)))
            except IntarsiaError as error:
                problems.append(str(error))
                continue
            digests.add(module.digest)
            if sha256 in named or reference is not None:  # one without a name may be on its way
                required.update(dict.fromkeys(module.requires, sha256))
        if reference is not None and required:
            digests = set(self.by_digest())
        problems += [f"module {by} requires digest {digest}, which is not in the store" for digest, by in required.items() if digest not in digests]
        return problems

    def tag(self, reference: str, tag: str, *, expected: str | None = None) -> str:
        """Move a tag of a name (`name`, `name@version` or `name@tag`) and return the sha256 it holds now.

        Args:
            expected: first digits of the sha256 that the tag must hold until now, or "none"; compared under the lock.

        Raises:
            StoreError: there is no such module, or the tag holds something else.
        """
        _check_tag(tag)
        name = reference.rpartition("@")[0] or reference
        with self._locked(make=False):
            if not self._pointers.versions(name):
                raise StoreError(f"store {self.path}: {self._no_name(name)}; a tag belongs to a name")
            sha256 = self.resolve(reference if "@" in reference else f"{name}@{LATEST}")
            held = self._pointers.read(name, tag) or "none"
            if expected is not None and (not expected or not held.startswith(expected)):
                raise StoreError(f"store {self.path}: {name}@{tag} is {held[:12]} and not {expected[:12]}: another process has moved it; nothing was changed")
            self._pointers.write(name, tag, sha256)
        return sha256

    def remove(self, reference: str) -> list[str]:
        """Remove a pointer (`name@version`, `name@tag`) or a name with all of them; `gc` removes the bytes later.

        Returns:
            The pointers removed.
        """
        name, at, label = reference.rpartition("@")
        name = name if at else reference
        with self._locked(make=False):
            labels = self._pointers.labels(name)
            if not labels or (at and label not in labels):
                raise StoreError(f"store {self.path}: no {reference!r} to remove; " + (f"{name!r} has {listing(labels)}" if labels else self._no_name(name)))
            # tags first: a process killed in between leaves versions, never a tag alone
            chosen = [label] if at else sorted(labels, key=is_version)
            for each in chosen:
                self._pointers.remove(name, each)
        return [f"{name}@{each}" for each in chosen]

    def gc(self, *, grace: float = GRACE, dry_run: bool = False) -> Collected:
        """Remove the blobs that no pointer reaches, directly or through `requires`, and that are older than `grace` seconds.

        Raises:
            StoreError: a module that is kept cannot be read, so that what it requires is unknown.
        """
        if grace < 0:
            raise UsageError(f"store: the grace period is {grace} seconds; expected 0 or more")
        with self._locked(make=False):
            hashes, now = self._hashes(), time.time()
            young = {sha256 for sha256 in hashes if now - self._blob(sha256).lstat().st_mtime < grace}
            kept = self._reached({sha256 for labels in self.names().values() for sha256 in labels.values()} | young)
            removed = [sha256 for sha256 in hashes if sha256 not in kept]
            freed = sum(self._blob(sha256).lstat().st_size for sha256 in removed)
            if not dry_run and real_folder(self._blobs):
                for sha256 in removed:
                    self._blob(sha256).unlink()
                sweep_temporary(self._blobs, grace)
                _sync_folder(self._blobs)
                self._pointers.sweep(grace)
        return Collected(tuple(removed), len(hashes) - len(removed), freed)

    def export(self, reference: str, path: str | os.PathLike[str]) -> Path:
        """Copy a module's file out of the store, verified; an existing file is not replaced."""
        target = Path(path)
        if os.path.lexists(target):
            raise StoreError(f"cannot export to {target}: it exists; give a new file name")
        data = self.read(self.resolve(reference))
        return write_atomic(target, [data], len(data))

    def _reached(self, start: set[str]) -> set[str]:
        by_digest = self.by_digest()
        reached: set[str] = set()
        waiting = list(start)
        while waiting:
            sha256 = waiting.pop()
            if sha256 in reached:
                continue
            reached.add(sha256)
            try:
                header = self._header(sha256)
            except IntarsiaError as error:
                raise StoreError(f"store: nothing was removed, because what a module requires is unknown: {error}") from error
            waiting += [other for digest in header.requires for other in by_digest.get(digest, ())]
        return reached

    def _free_version(self, name: str, version: str | None, sha256: str) -> str:
        versions = self._pointers.versions(name)
        if version is None:
            if versions and self._pointers.read(name, versions[-1]) == sha256:
                return versions[-1]
            return str(1 + max((int(re.match(r"[0-9]+", v)[0]) for v in versions), default=0))  # type: ignore[index]
        held = self._pointers.read(name, version) if versions else None
        if held not in (None, sha256):
            raise StoreError(f"store {self.path}: {name}@{version} exists and is {str(held)[:12]}..., this module is {sha256[:12]}...; a version never changes: give another")
        return version

    def _put(self, sha256: str, data: bytes) -> None:
        make_folder(self._blobs)
        path = self._blob(sha256)
        if os.path.lexists(path):
            try:
                self.read(sha256)
            except ModuleError:
                pass  # damaged: write it again
            else:
                os.utime(path)  # the grace period begins anew
                return
        write_atomic(path, [data], len(data))

    def _header(self, sha256: str) -> Header:
        path = self._blob(sha256)
        real_folder(self._blobs)
        if path.is_symlink():
            raise StoreError(f"store: {path} is a symbolic link; a store holds plain files and folders only")
        if not path.exists():
            raise StoreError(f"store {self.path}: the module {sha256} is not there; a name points at it: remove the name or add the module again")
        return read_header(path)

    def _stored(self, sha256: str, names: tuple[str, ...]) -> Stored:
        try:
            return Stored(sha256, names, self._header(sha256))
        except IntarsiaError as error:
            return Stored(sha256, names, None, str(error))

    def _hashes(self) -> list[str]:
        if not real_folder(self._blobs):
            return []
        return sorted(found[1] for entry in os.listdir(self._blobs) if (found := _BLOB.fullmatch(entry)))

    def _newest(self, name: str) -> str | None:
        versions = self._pointers.versions(name)
        return self._pointers.read(name, versions[-1]) if versions else None

    def _no_name(self, name: str) -> str:
        if not self.path.exists():
            return "there is no store in this folder yet: intarsia store add FILE makes it"
        close = nearest(name, self._pointers.names())
        return f"no module is called {name!r}{close}; intarsia store ls shows all"

    def _blob(self, sha256: str) -> Path:
        return self._blobs / f"{sha256}{_SUFFIX}"

    @contextlib.contextmanager
    def _locked(self, make: bool = True) -> Iterator[None]:
        if make:
            make_folder(Path(os.path.realpath(self.path)))
        elif not self.path.is_dir():
            raise StoreError(f"store {self.path}: there is no store in this folder yet: intarsia store add FILE makes it")
        lock = FileLock(str(self.path / ".lock"), timeout=_WAIT)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(f"store {self.path}: another process has been writing for {_WAIT:.0f} s; wait for it, or end it") from error
        except OSError as error:
            raise StoreError(f"store {self.path}: cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()


def _short(digest: str) -> str:
    return f"digest {digest[:12]}..."


def _check_tag(tag: str) -> str:
    if is_version(check_label(tag)):
        raise UsageError(f"store: tag {tag!r} begins with a digit; such labels are versions, which do not move")
    if tag == LATEST:
        raise UsageError(f"store: {LATEST!r} always means the newest version and cannot be set; take another word")
    return tag


def _read_outside(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
