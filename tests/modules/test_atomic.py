"""Old or new, whole: under kill, full disk, missing permission, concurrent writers, and a fault at every step."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import StoreError
from intarsia.modules import Module, Owned, atomic, dumps, load, save, sweep_temporary, write_atomic
from tests.modules.make import forked, module

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def big(seed: int) -> Module:
    """600 kB, so that a write takes several system calls."""
    return module(tensors={f"{i}.ffn/x.a": torch.full((150, 100), float(seed)) for i in range(10)})


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "m.safetensors"
    for child in _children:
        child.kill()
    _children.clear()


class Child:
    """A forked process that runs `work` until it is killed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        _children.append(self)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


_children: list[Child] = []


def keep_saving(modules: list[Module], path: Path) -> None:
    while True:
        for made in modules:
            save(made, path)


def leftovers(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix == ".tmp"]


def test_a_killed_writer_leaves_the_old_or_the_new_module(path: Path) -> None:
    a, b = big(1), big(2)
    digests, chance = {a.digest, b.digest}, random.Random(0)
    save(a, path)
    for made in (a, b):
        dumps(made)  # compute digests before forking
    for _ in range(100):
        child = Child(lambda: keep_saving([b, a], path))
        time.sleep(chance.uniform(0.0, 0.02))
        child.kill()
        assert load(path).digest in digests
    left = leftovers(path.parent)
    assert left, "no kill hit a writer at work: the test shows nothing"
    assert sweep_temporary(path.parent) == []  # a young one may belong to a writer at work
    assert sorted(sweep_temporary(path.parent, older_than=0)) == sorted(left)
    assert os.listdir(path.parent) == [path.name]


def test_two_writers_and_a_reader(path: Path) -> None:
    a, b = big(1), big(2)
    save(a, path)
    save(b, path)
    writers = [Child(lambda: keep_saving([a, b], path)), Child(lambda: keep_saving([b, a], path))]
    seen, until = {a.digest: 0, b.digest: 0}, time.monotonic() + 2
    while time.monotonic() < until:
        seen[load(path).digest] += 1
    for writer in writers:
        writer.kill()
    assert min(seen.values()) > 0, seen


STEPS = ["os.open", "write", "os.fsync", "os.replace", "os.fsync folder"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt(), MemoryError()], ids=["EIO", "interrupt", "memory"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_any_step_leaves_old_or_new_and_no_litter(path: Path, step: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = big(1), big(2)
    save(old, path)
    calls = {"os.fsync": 0}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise failure

    def fsync(descriptor: int) -> None:
        calls["os.fsync"] += 1
        if calls["os.fsync"] == (1 if step == "os.fsync" else 2):
            raise failure

    expected = StoreError if isinstance(failure, OSError) else type(failure)
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        if step.startswith("os.fsync"):
            patch.setattr(atomic.os, "fsync", fsync)
        elif step == "write":

            def chunks() -> Iterator[bytes]:
                yield b"half"
                raise failure

            write_atomic(path, chunks(), 8)
        else:
            patch.setattr(atomic.os, step.removeprefix("os."), fail)
        save(new, path)
    if expected is StoreError:
        assert str(path) in str(caught.value) and "I/O error" in str(caught.value)
    assert load(path) == (new if step == "os.fsync folder" else old)
    assert os.listdir(path.parent) == [path.name]


def test_order_of_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are synced before the rename, the folder after it."""
    events: list[str] = []

    def spy(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            what = "folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else ""
            size = f" {os.fstat(args[0]).st_size}" if name == "fsync" and not what else ""
            events.append(f"{name} {what}".strip() + size)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(atomic.os, name, spy(name))
    save(big(1), path)
    assert events == [f"fsync {len(dumps(big(1)))}", "replace", "fsync folder"]


def test_full_disk_by_file_size_limit(path: Path) -> None:
    save(big(1), path)

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            save(big(2), path)
        except StoreError as error:
            return str(error)
        return "saved"

    size = len(dumps(big(2)))
    assert forked(limited).startswith(f"cannot write {path}: the file-size limit of this process (ulimit -f); the file needs {size:,} bytes")
    assert load(path) == big(1) and os.listdir(path.parent) == [path.name]


def test_full_disk(path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    save(big(1), path)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:
        full.write(b"x")
    error = caught.value

    def chunks() -> Iterator[bytes]:
        yield b"x" * 1000
        raise error

    with pytest.raises(StoreError, match=r"no space left; the file needs 12,345 bytes, the disk has [0-9,]+ free") as refused:
        write_atomic(path, chunks(), 12_345)
    assert str(path) in str(refused.value)
    assert load(path) == big(1) and os.listdir(path.parent) == [path.name]


def as_nobody(work: Callable[[], None]) -> int:
    """Exit status of a forked process without root's privileges: 0 if `work` returned."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_read_only_folder(path: Path) -> None:
    save(big(1), path)
    path.parent.chmod(0o555)

    def refused() -> None:
        with pytest.raises(StoreError, match="no permission to write in"):
            save(big(2), path)
        load(path)

    if os.geteuid() == 0:
        for parent in path.parents:
            if parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o005)  # pytest's folders are private to root
        assert as_nobody(refused) == 0
    else:
        refused()
    path.parent.chmod(0o755)
    assert load(path) == big(1) and os.listdir(path.parent) == [path.name]


def test_unreadable_file(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    save(big(1), path)
    path.chmod(0)
    with pytest.raises(StoreError, match="permission denied"):
        load(path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_the_umasks(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(module(), path)
        save(module(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "m.safetensors", tmp_path / "link"
    save(big(1), target)
    link.symlink_to(target)
    save(big(2), link)
    assert link.is_symlink() and load(target) == big(2) == load(link)
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == [target.name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("none/m.safetensors", "create it with: mkdir -p"), ("folder", "it is a folder"), ("x" * 300, "name too long"), ("file/m.safetensors", "Not a directory")],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError) as caught:
        save(module(), tmp_path / name)
    assert words.lower() in str(caught.value).lower()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_longest_file_name(tmp_path: Path) -> None:
    save(module(), tmp_path / ("x" * 255))
    assert load(tmp_path / ("x" * 255)) == module()


def test_sweeping_leaves_everything_else(tmp_path: Path) -> None:
    keep = ["m.safetensors", ".intarsia-notes.tmp", "x.tmp", ".intarsia-1-0123456789abcdef.tmp.bak"]
    for name in [*keep, ".intarsia-1-0123456789abcdef.tmp"]:
        (tmp_path / name).touch()
    assert [p.name for p in sweep_temporary(tmp_path, older_than=0)] == [".intarsia-1-0123456789abcdef.tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


def test_memory_for_saving_is_not_the_files(path: Path) -> None:
    """Tensors are written from where they lie and read to where they stay: one copy of 120 MB in memory at any time."""

    def measure() -> list[int]:
        made = module(tensors=Owned({"0.ffn/x.a": torch.ones(30_000_000)}))
        start = peak()
        save(made, path)
        saved = peak()
        del made
        load(path)
        return [saved - start, peak() - start]

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB

    saving, loading = forked(measure)
    assert saving < 30 and loading < 30


def test_limits_are_untouched() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
