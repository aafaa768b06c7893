"""Bundles and imports: what was exported comes back, and of a hostile archive nothing is taken (`docs/faults.md`, row 14)."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import resource
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError
from intarsia.modules import save
from intarsia.store import bundle as bundles
from intarsia.store.bundle import read_bundle
from intarsia.store.store import Store
from intarsia.store.transfer import bundle, take
from tests.modules import make
from tests.store.small import lora, module


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`lang`, and `task` (with a tag) that requires it."""
    store = Store(tmp_path / "store")
    lang = lora(0, "lang", layers=(0,))
    store.add(lang)
    store.add(lora(1, "task", layers=(0,), requires=(lang.digest,)), tags=("best",))
    return store


@pytest.fixture
def whole(store: Store, tmp_path: Path) -> bytes:
    path = tmp_path / "all.tar"
    bundle(store, path, everything=True)
    return path.read_bytes()


def test_there_and_back(store: Store, tmp_path: Path) -> None:
    moved = bundle(store, tmp_path / "some.tar", ["task@best"])
    assert [str(each) for each in moved.labels] == ["task@1", "task@best"] and moved.required == (store.resolve("lang"),)
    other = Store(tmp_path / "other")
    taken = take(other, tmp_path / "some.tar")
    assert other.names() == {"task": store.names()["task"]} and other.verify() == [] and taken.required == moved.required
    assert other.get("task").digest == store.get("task").digest
    assert take(other, tmp_path / "some.tar").files == taken.files  # again: nothing changes
    with tarfile.open(tmp_path / "some.tar") as archive:  # an ordinary archive to others
        assert sorted(member.name for member in archive)[-1] == "index.json" and all(member.isreg() for member in archive)
    with pytest.raises(StoreError, match="exists"):
        bundle(store, tmp_path / "some.tar", ["task"])
    for wrong, every in (([], False), (["task"], True)):
        with pytest.raises(UsageError, match="--all"):
            bundle(store, tmp_path / "no.tar", wrong, everything=every)
    with pytest.raises(StoreError, match="did you mean 'task'"):
        bundle(store, tmp_path / "no.tar", ["tasc"])


def test_equal_contents_are_equal_bytes(store: Store, whole: bytes, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    take(other, tmp_path / "all.tar")
    bundle(other, tmp_path / "again.tar", everything=True)
    assert (tmp_path / "again.tar").read_bytes() == whole


def test_a_version_with_other_content_stops_the_import(store: Store, whole: bytes, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.add(module(5), name="lang", version="1")
    before = other.names()
    with pytest.raises(StoreError, match="never changes"):
        take(other, tmp_path / "all.tar")
    assert other.names() == before


def tar(*members: tuple[str, bytes, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of (name, content, type)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as archive:
        for name, content, type_ in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = type_, len(content) if type_ == b"0" else 0
            info.linkname = "/etc/passwd" if type_ in b"12" else ""
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


FILE = b"0"
BLOB = f"blobs/{'ab' * 32}.safetensors"


def zipped(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, b"x")
    return made.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "climbs": (tar(("../evil", b"x", FILE)), "'../evil' is not expected"),
    "climbs inside": (tar((f"blobs/../../{'ab' * 32}.safetensors", b"x", FILE)), "not expected"),
    "absolute": (tar(("/tmp/evil", b"x", FILE)), "not expected"),
    "symbolic link": (tar((BLOB, b"", tarfile.SYMTYPE)), "a symbolic link"),
    "hard link": (tar((BLOB, b"", tarfile.LNKTYPE)), "a hard link"),
    "device": (tar((BLOB, b"", tarfile.CHRTYPE)), "a device"),
    "pipe": (tar((BLOB, b"", tarfile.FIFOTYPE)), "a pipe"),
    "folder": (tar(("blobs", b"", tarfile.DIRTYPE)), "a folder"),
    "extended header": (tar(("x" * 300, b"x", FILE), kind=tarfile.PAX_FORMAT), "an extended header"),
    "long name": (tar(("x" * 300, b"x", FILE), kind=tarfile.GNU_FORMAT), "a long name|no tar header"),
    "other bytes": (tar((BLOB, b"x", FILE)), "another program|damaged"),
    "other names": (tar(("pointers", b"x", FILE)), "not expected"),
    "control characters": (tar(("a\x1b[2Jb", b"x", FILE)), r"a\\x1b"),
    "gzip": (gzip.compress(tar((BLOB, b"x", FILE))), "compressed"),
    "zip": (zipped("../evil"), "a zip archive"),
    "empty": (b"\0" * 1024, "has no index|not|truncated|empty"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_whole(tmp_path: Path, kind: str) -> None:
    data, reason = HOSTILE[kind]
    room = tmp_path / "a" / "b"
    room.mkdir(parents=True)
    (room / "x.tar").write_bytes(data)
    with pytest.raises(IntarsiaError, match=reason):
        take(Store(room / "store"), room / "x.tar")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b", "a/b/x.tar"]


def edited(whole: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The archive with its entries changed, each with the header that is right for it."""
    entries, at = [], 0
    while whole[at : at + 512].strip(b"\0"):
        size = int(whole[at + 124 : at + 135], 8)
        end = at + 512 + -(-size // 512) * 512
        entries.append(whole[at:end])
        at = end
    return b"".join(change(entries)) + b"\0" * 1024


def test_doubled_missing_and_unnamed_entries(store: Store, whole: bytes, tmp_path: Path) -> None:
    other, path = Store(tmp_path / "other"), tmp_path / "x.tar"
    extra = b"".join(bundles._entry(f"blobs/{'cd' * 32}.safetensors", b"module"))
    for change, reason in (
        (lambda e: [e[0], e[1], e[1], e[2]], "twice"), (lambda e: [e[0], *e], "twice"), (lambda e: e[:2], "not in the bundle"),
        (lambda e: e[1:], "has no index"), (lambda e: [*e, extra], "damaged"),
    ):  # fmt: skip
        path.write_bytes(edited(whole, change))
        with pytest.raises(ModuleError, match=reason):
            take(other, path)
    path.write_bytes(whole + b"\0" * 512)
    with pytest.raises(ModuleError, match="behind the end"):
        take(other, path)
    assert not other.path.exists()
    path.write_bytes(edited(whole, lambda e: [e[0], *e[:0:-1]]))  # in another order: no harm
    assert len(take(other, path).files) == 2


@pytest.mark.parametrize(("name", "label"), [("../up", "1"), ("a\0b", "1"), ("a@b", "1"), ("swh", "../1"), ("swh", "LATEST"), ("", "1"), ("x" * 300, "1")])
def test_hostile_names_in_a_bundle(tmp_path: Path, store: Store, name: str, label: str) -> None:
    data = store.read(store.resolve("lang"))
    sha256 = store.resolve("lang")
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join([*bundles._entry("index.json", bundles._index([[name, label, sha256]])), *bundles._entry(f"blobs/{sha256}.safetensors", data), b"\0" * 1024]))
    with pytest.raises(IntarsiaError):
        take(Store(tmp_path / "other"), path)
    assert not (tmp_path / "other").exists()


def test_every_truncation_is_refused(whole: bytes) -> None:
    for length in range(0, len(whole), 7):
        with pytest.raises(ModuleError):
            bundles._parsed(whole[:length])


def test_every_flipped_byte_is_refused(whole: bytes) -> None:
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        with pytest.raises((ModuleError, UsageError)):
            bundles._parsed(bytes(changed))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=20)), min_size=1, max_size=5))
def test_any_bytes_are_read_or_refused(whole: bytes, edits: list[tuple[int, bytes]]) -> None:
    changed = bytearray(whole)
    for position, patch in edits:
        changed[position % len(whole) : position % len(whole) + len(patch)] = patch
    if bytes(changed) == whole:
        return
    with pytest.raises((ModuleError, UsageError)):
        bundles._parsed(bytes(changed))


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """A header that announces 8 GiB, and a file of a terabyte that is none, under a limit of memory."""
    path = tmp_path / "bomb.tar"
    path.write_bytes(bundles._head(BLOB, 8**11 - 1) + b"x" * 512 + b"\0" * 1024)
    large = tmp_path / "large.tar"
    with open(large, "wb") as file:
        file.write(bundles._head("index.json", 10))
        file.truncate(1 << 40)

    def tries() -> list[str]:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
        found = []
        for each in (path, large):
            try:
                read_bundle(each)
            except IntarsiaError as error:
                found.append(str(error))
        return found

    announced, size = make.forked(tries)
    assert "announces 8,589,934,591 bytes, 1,536 are there" in announced
    assert "1,099,511,627,776 bytes" in size and "--max-bytes" in size


def test_a_folder_of_files_in_any_order(tmp_path: Path) -> None:
    """What is required is taken first, whatever the files are called; other files are left alone."""
    lang = module(0, name="lang")
    task = module(1, name="task", requires=(lang.digest,))
    top = module(2, name="top", requires=(task.digest,))
    for number, order in enumerate(itertools.permutations((lang, task, top))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for position, each in enumerate(order):
            save(each, folder / f"{position}.safetensors")
        (folder / "notes.txt").write_text("hello")
        store = Store(tmp_path / f"store{number}")
        assert sorted(str(each) for each in take(store, folder).labels) == ["lang@1", "task@1", "top@1"]
        assert store.verify() == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no module files"):
        take(store, tmp_path / "empty")
    with pytest.raises(StoreError, match="cannot read"):
        take(store, tmp_path / "nothing")


def test_a_module_file_and_another_store(store: Store, tmp_path: Path) -> None:
    save(module(4, name="one"), tmp_path / "one.safetensors")
    other = Store(tmp_path / "other")
    assert [str(each) for each in take(other, tmp_path / "one.safetensors").labels] == ["one@1"]
    take(other, store.path)
    assert other.names() == {**store.names(), "one": other.names()["one"]} and other.verify() == []
    blob = store.path / "blobs" / f"{store.resolve('lang')}.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ModuleError):
        take(Store(tmp_path / "third"), store.path)
    assert Store(tmp_path / "third").names() == {}
    os.unlink(blob)
    os.symlink("/etc/passwd", blob)
    with pytest.raises(StoreError, match="symbolic link"):
        take(Store(tmp_path / "third"), store.path)
