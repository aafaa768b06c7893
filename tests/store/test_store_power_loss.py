"""The power fails while a store is changed: of every disk that could be found afterwards, each name leads to a whole module.

The model of `tests/modules/test_power_loss.py` for a tree of folders.  Contents that were not synced may be there, in part, or not
at all.  Changes of names reach the disk in order within a folder, in any order between folders, and surely when the folder is
synced.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import IntarsiaError
from intarsia.modules import atomic
from intarsia.store import pointers
from intarsia.store import store as stores
from intarsia.store.store import Store
from tests.store.small import age, module

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="needs descriptors of folders")

Entries = dict[str, "int | str"]
"""Name -> number of a file, or path of a folder."""
State = dict[str, "bytes | None"]
"""Path below the root -> content, None for a folder."""


class Disk:
    """Watches what happens below a folder and knows which disks a loss of power would leave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[tuple[bytes, bytes]] = []  # synced and written content
        self.entries: dict[str, Entries] = {}
        self.pending: dict[str, list[list[tuple[str, int | str | None]]]] = {}
        self.paths: dict[str, int] = {}
        self.descriptors: dict[int, str] = {}
        self.states: list[list[State]] = []
        self._scan(root)

    def _scan(self, folder: Path) -> None:
        held: Entries = {}
        for path in folder.iterdir():
            if path.is_dir():
                self._scan(path)
                held[path.name] = str(path)
            else:
                held[path.name] = self._file(str(path), path.read_bytes())
        self.entries[str(folder)] = held

    def _file(self, path: str, content: bytes = b"") -> int:
        self.files.append((content, content))
        self.paths[path] = len(self.files) - 1
        return self.paths[path]

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "mkdir", "unlink", "rmdir")}

        def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            new = flags & os.O_CREAT and not os.path.lexists(path)
            descriptor: int = real["open"](path, flags, *rest, **more)
            self.descriptors[descriptor] = str(path)
            if new and self.inside(path):
                self.change(path, self._file(str(path)))
            return descriptor

        def fsync(descriptor: int) -> None:
            path = self.descriptors[descriptor]
            if path in self.paths:
                self.written(path)
            self.moment()
            real["fsync"](descriptor)
            if path in self.paths:
                content = self.files[self.paths[path]][1]
                self.files[self.paths[path]] = (content, content)
            elif path in self.entries:
                self.entries[path] = after(self.entries[path], self.pending.pop(path, []))
            self.moment()

        def replace(old: Any, new: Any) -> None:
            self.written(str(old))
            self.moment()
            real["replace"](old, new)
            number = self.paths.pop(str(old))
            self.paths[str(new)] = number
            self.change(new, number, (Path(old).name, None))

        def mkdir(path: Any, *rest: Any, **more: Any) -> None:
            real["mkdir"](path, *rest, **more)
            if self.inside(path):
                self.entries[str(path)] = {}
                self.change(path, str(path))

        def gone(name: str) -> Callable[..., None]:
            def remove(path: Any, *rest: Any, **more: Any) -> None:
                real[name](path, *rest, **more)
                if self.inside(path):
                    self.change(path, None)

            return remove

        made = {"open": open_, "fsync": fsync, "replace": replace, "mkdir": mkdir, "unlink": gone("unlink"), "rmdir": gone("rmdir")}
        for name, function in made.items():
            patch.setattr(os, name, function)
            if hasattr(pathlib, "_NormalAccessor") and hasattr(pathlib._NormalAccessor, name):  # Python 3.10 keeps functions of its own
                patch.setattr(pathlib._NormalAccessor, name, staticmethod(function))

    def inside(self, path: Any) -> bool:
        return str(path).startswith(f"{self.root}{os.sep}")

    def written(self, path: str) -> None:
        self.files[self.paths[path]] = (self.files[self.paths[path]][0], Path(path).read_bytes())

    def change(self, path: Any, target: int | str | None, *with_it: tuple[str, None]) -> None:
        self.pending.setdefault(str(Path(path).parent), []).append([(Path(path).name, target), *with_it])
        self.moment()

    def moment(self) -> None:
        """Remember every disk that a loss of power would leave now."""
        folders = sorted(self.pending)
        found = []
        for counts in itertools.product(*(range(len(self.pending[folder]) + 1) for folder in folders)):
            names = {**self.entries, **{f: after(self.entries[f], self.pending[f][:count]) for f, count in zip(folders, counts)}}
            found += [dict(self.tree(names, str(self.root), "", loss)) for loss in ("all", "nothing", "half")]
        self.states.append([state for i, state in enumerate(found) if state not in found[:i]])

    def tree(self, names: dict[str, Entries], folder: str, lead: str, loss: str) -> Iterator[tuple[str, bytes | None]]:
        for name, target in names[folder].items():
            if isinstance(target, str):
                yield lead + name, None
                yield from self.tree(names, target, f"{lead}{name}/", loss)
            else:
                synced, written = self.files[target]
                yield lead + name, {"all": synced, "nothing": written, "half": written[: len(written) // 2] if written != synced else synced}[loss]


def after(entries: Entries, changes: list[list[tuple[str, int | str | None]]]) -> Entries:
    found = dict(entries)
    for name, target in itertools.chain.from_iterable(changes):
        if target is None:
            found.pop(name, None)
        else:
            found[name] = target
    return found


def found_after(disk: Disk, tmp_path: Path) -> list[list[dict[str, dict[str, str]] | str]]:
    """At each moment, what the stores that could be found hold: their names, or what is wrong with them."""
    seen: dict[str, dict[str, dict[str, str]] | str] = {}
    told = []
    for states in disk.states:
        here = []
        for state in states:
            key = repr(sorted(state.items()))
            if key not in seen:
                place = tmp_path / f"found{len(seen)}"
                place.mkdir()
                for path, content in state.items():
                    (place / path).mkdir() if content is None else (place / path).write_bytes(content)
                seen[key] = judged(Store(place))
            here.append(seen[key])
        told.append(here)
    return told


def judged(store: Store) -> dict[str, dict[str, str]] | str:
    try:
        problems = store.verify()
        store.gc(grace=0)
        return "; ".join(problems) or store.names()
    except IntarsiaError as error:
        return str(error)


def added(store: Store) -> None:
    store.add(module(1), tags=("best",))


def removed(store: Store) -> None:
    store.remove("swh")
    store.gc(grace=0)


def tagged(store: Store) -> None:
    store.tag("swh@1", "good")


@pytest.mark.parametrize(("work", "fresh"), [(added, True), (added, False), (removed, False), (tagged, False)])
def test_a_loss_of_power_never_leaves_a_name_without_its_module(tmp_path: Path, work: Callable[[Store], None], fresh: bool) -> None:
    store = Store(tmp_path / "store")
    store.path.mkdir()
    if not fresh:
        store.add(module(0), tags=("best",))
        age(store)
    before = store.names()
    disk = Disk(store.path)
    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch)
        work(store)
    now = store.names()
    told = found_after(disk, tmp_path)
    assert len(told) >= 4 and all(isinstance(each, dict) for here in told for each in here), told
    assert all(each == now for each in told[-1]), "what has returned is on the disk"
    for here in told:
        for each in here:
            assert isinstance(each, dict)
            labels = each.get("swh", {})
            allowed = {label: {before.get("swh", {}).get(label), now.get("swh", {}).get(label)} for label in ("1", "2", "best", "good")}
            assert all(labels.get(label) in values for label, values in allowed.items()), each


def test_the_model_sees_a_missing_sync(tmp_path: Path) -> None:
    """A store that synced its folders late would be found with names that lead nowhere: the test above can fail."""
    store = Store(tmp_path / "store")
    store.add(module(0))
    disk = Disk(store.path)
    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch)
        for room in (atomic, pointers, stores):
            patch.setattr(room, "_sync_folder", lambda folder: None)
        store.add(module(1))
    told = [each for here in found_after(disk, tmp_path) for each in here]
    assert any(isinstance(each, str) and "not there" in each for each in told)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(store.path)
        disk.watch(patch)
        patch.setattr(atomic, "_sync", lambda descriptor: None)
        store.add(module(2))
    told = [each for here in found_after(disk, tmp_path / "found0") for each in here]
    assert any(isinstance(each, str) for each in told)
