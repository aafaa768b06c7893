"""The power fails while a module is saved: every disk that could be found afterwards holds the old or the new module, whole.

A model of a disk (as in SQLite's crash tests): what was not synced may be there, in part, as zeros, or not at all; names change
in order, but when they reach the disk is open until the folder is synced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import ModuleError
from intarsia.modules import Module, atomic, dumps, load, save
from tests.modules.make import module

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="needs descriptors of folders")


class Disk:
    """Watches the writes into one folder and knows which disks a loss of power would leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, str] = {path.name: path.name for path in folder.iterdir()}  # name -> file, on disk
        self.renames: list[tuple[str, str | None, str]] = []  # new name, old name, file; not on disk yet
        self.synced = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.written = dict(self.synced)
        self.descriptors: dict[int, str] = {}
        self.moments: list[list[dict[str, bytes]]] = []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        opened, synced, replaced = os.open, os.fsync, os.replace

        def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            descriptor = opened(path, flags, *rest, **more)
            self.descriptors.pop(descriptor, None)  # numbers are used again
            if flags & os.O_CREAT and Path(path).parent == self.folder:
                name = Path(path).name
                self.descriptors[descriptor] = name
                self.renames.append((name, None, name))
                self.synced[name] = self.written[name] = b""
                self.moment()
            return descriptor

        def fsync(descriptor: int) -> None:
            name = self.descriptors.get(descriptor)
            if name is not None:
                self.written[name] = (self.folder / name).read_bytes()
            self.moment()
            synced(descriptor)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.names, self.renames = self.after(len(self.renames)), []
            else:
                assert name is not None
                self.synced[name] = self.written[name]
            self.moment()

        def replace(old: Any, new: Any) -> None:
            self.written[Path(old).name] = Path(old).read_bytes()
            self.moment()
            replaced(old, new)
            self.renames.append((Path(new).name, Path(old).name, Path(old).name))
            self.moment()

        patch.setattr(atomic.os, "open", open_)
        patch.setattr(atomic.os, "fsync", fsync)
        patch.setattr(atomic.os, "replace", replace)

    def after(self, count: int) -> dict[str, str]:
        """The folder when `count` of the pending changes of names have reached the disk."""
        names = dict(self.names)
        for new, old, file in self.renames[:count]:
            names[new] = file
            if old is not None:
                names.pop(old, None)
        return names

    def contents(self, file: str) -> Iterator[bytes]:
        """What may be found in a file."""
        known, now = self.synced[file], self.written[file]
        yield known
        if now != known:
            yield from (now, now[: len(now) // 2], bytes(len(now)), now[: len(now) // 2] + bytes(len(now) - len(now) // 2))

    def moment(self) -> None:
        """Remember every disk that a loss of power would leave now."""
        found = []
        for count in range(len(self.renames) + 1):
            target = self.after(count)["m.safetensors"]
            found += [{"m.safetensors": content} for content in self.contents(target)]
        self.moments.append(found)


def crashed(tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[Disk, Module, Module]:
    old, new = module(1), module(2)
    folder = tmp_path / "folder"
    folder.mkdir()
    save(old, folder / "m.safetensors")
    disk = Disk(folder)
    with patch.context() as inner:
        disk.watch(inner)
        save(new, folder / "m.safetensors")
    return disk, old, new


def outcomes(disk: Disk, tmp_path: Path) -> list[set[str]]:
    """The digests, or `torn`, that could be found at each moment."""
    found = []
    for disks in disk.moments:
        seen = set()
        for files in disks:
            (tmp_path / "found").write_bytes(files["m.safetensors"])
            try:
                seen.add(load(tmp_path / "found").digest)
            except ModuleError:
                seen.add("torn")
        found.append(seen)
    return found


def test_a_loss_of_power_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, old, new = crashed(tmp_path, monkeypatch)
    found = outcomes(disk, tmp_path)
    assert len(found) >= 6 and all(seen <= {old.digest, new.digest} for seen in found), found
    assert found[0] == {old.digest} and found[-1] == {new.digest}, "what save() returned from is on disk"
    assert {old.digest, new.digest} in found, "between the rename and the sync of the folder both are possible"
    assert (disk.folder / "m.safetensors").read_bytes() == dumps(new)


def test_the_model_sees_a_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sync of the data, or of the folder, a loss of power does harm: the test above can fail."""
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync", lambda descriptor: None)
        (tmp_path / "a").mkdir()
        disk, *_ = crashed(tmp_path / "a", patch)
        assert any("torn" in seen for seen in outcomes(disk, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync_folder", lambda folder: None)
        (tmp_path / "b").mkdir()
        disk, old, new = crashed(tmp_path / "b", patch)
        assert outcomes(disk, tmp_path)[-1] == {old.digest, new.digest}
