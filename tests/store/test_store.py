"""The store: what is added comes back, versions stay, names are no paths, and nobody ever sees a torn module."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import pathlib
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError
from intarsia.modules import Card, dumps, load, save
from intarsia.store.remote import FolderRemote
from intarsia.store.store import Store
from intarsia.store.transfer import pull
from tests.store.small import age, module


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_round_trip_by_every_reference(store: Store, tmp_path: Path) -> None:
    one, two = module(0), module(1)
    first = store.add(one, tags=("best",))
    path = tmp_path / "two.safetensors"
    save(two, path)
    second = store.add(path)
    assert second == hashlib.sha256(path.read_bytes()).hexdigest()
    assert store.names() == {"swh": {"1": first, "2": second, "best": first}}
    for reference, expected in (("swh", two), ("swh@latest", two), ("swh@1", one), ("swh@best", one), (first[:8], one), (second, two)):
        assert store.get(reference).digest == expected.digest
    assert store.header("swh@1").digest == one.digest
    assert load(store.export("swh@1", tmp_path / "out.safetensors")).digest == one.digest
    with pytest.raises(StoreError, match="exists"):
        store.export("swh@1", tmp_path / "out.safetensors")


def test_the_same_bytes_are_the_same_version(store: Store) -> None:
    assert store.add(module()) == store.add(module())
    assert list(store.names()["swh"]) == ["1"] and len(store.entries()) == 1


def test_versions_do_not_change_and_tags_move(store: Store) -> None:
    first = store.add(module(0), version="1.0", tags=("best",))
    with pytest.raises(StoreError, match="never changes"):
        store.add(module(1), version="1.0", tags=("best",))
    assert store.resolve("swh@1.0") == store.resolve("swh@best") == first
    assert store.add(module(0), version="1.0") == first
    second = store.add(module(1), version="1.10")
    store.add(module(2), version="1.9")
    assert store.resolve("swh") == second  # 1.10 is newer than 1.9
    assert store.tag("swh@1.10", "best") == store.resolve("swh@best") == second
    for wrong in ("2", "latest", "../x", "Best", "", ".x", "a/b"):
        with pytest.raises(UsageError):
            store.tag("swh", wrong)
    with pytest.raises(UsageError, match="--tag"):
        store.add(module(3), version="best")


def test_an_ambiguous_or_short_prefix_is_refused(store: Store) -> None:
    sha256 = store.add(module(0))
    blobs = store.path / "blobs"
    (blobs / (sha256[:60] + ("0000" if sha256[60:] != "0000" else "1111") + ".safetensors")).write_bytes(b"")
    with pytest.raises(StoreError, match="ambiguous"):
        store.resolve(sha256[:60])
    assert store.resolve(sha256) == sha256
    with pytest.raises(StoreError, match="no "):
        store.resolve(sha256[:7])
    other = store.add(module(1), name=sha256[:20])
    assert other != sha256
    with pytest.raises(StoreError, match="ambiguous"):
        store.resolve(sha256[:20])


def test_unknown_references_name_what_there_is(store: Store) -> None:
    with pytest.raises(StoreError, match="no store in this folder yet"):
        store.get("swh")
    store.add(module())
    with pytest.raises(StoreError, match="did you mean 'swh'"):
        store.get("swhx")
    with pytest.raises(StoreError, match="'swh' has 1"):
        store.get("swh@7")


def thousand(store: Store) -> None:
    """A thousand modules, written without syncing a thousand times; m500 is an ordinary one."""
    blobs, names = store.path / "blobs", store.path / "names"
    store.add(module(500), name="m500")
    for number in range(1000):
        if number != 500:
            sha256 = hashlib.sha256(str(number).encode()).hexdigest()
            (blobs / f"{sha256}.safetensors").write_bytes(b"x" * 4096)
            (names / f"m{number}").mkdir()
            (names / f"m{number}" / "1").write_text(f"{sha256}\n")


def watched(store: Store, work: Callable[[], Any]) -> tuple[set[str], int]:
    """Files and folders of the store that `work` opens or lists, and the bytes this process reads meanwhile."""
    touched: set[str] = set()
    listening = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening[0] and event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(str(store.path)):
            touched.add(os.path.relpath(str(arguments[0]), store.path))

    sys.addaudithook(hook)
    before = read_so_far()
    work()
    count = read_so_far() - before
    listening[0] = False
    return touched, count


def read_so_far() -> int:
    """Bytes this process has read in its life."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_loading_one_of_a_thousand_costs_its_own_bytes(store: Store, tmp_path: Path) -> None:
    """The same files and bytes as from a store of one, whatever it is called by; nothing grows with the number of modules."""
    alone = Store(tmp_path / "alone")
    alone.add(module(500), name="m500")
    thousand(store)
    size = store.header("m500@1").size
    idle = watched(store, lambda: None)[1]  # what looking at the counter reads
    for reference, listed in (("m500@1", set()), ("m500", {"names/m500"}), ("m500@latest", {"names/m500"})):
        found = [watched(each, lambda each=each, reference=reference: each.get(reference)) for each in (alone, store)]
        assert found[0][0] == found[1][0] == {"names/m500/1", f"blobs/{store.resolve('m500@1')}.safetensors", *listed}
        assert abs(found[1][1] - found[0][1]) < 100 and found[1][1] - idle < 2 * size + 200  # its header once more, before the rest is read
    by_hash = watched(store, lambda: store.get(store.resolve("m500@1")))
    assert not any(path.startswith("blobs/") and "." in path and store.resolve("m500@1") not in path for path in by_hash[0])
    assert by_hash[1] - idle < 2 * size + 200
    store.add(module(1), name="new")
    added = watched(store, lambda: store.add(module(2), name="new"))
    assert all(path.startswith((".lock", "names/new", "blobs")) for path in added[0])


def test_find(store: Store) -> None:
    def put(name: str, languages: tuple[str, ...], **changes: Any) -> None:
        card = Card(languages=languages, task=changes.pop("task", "topic"), base=changes.pop("base", "tiny"))
        store.add(module(name=name, card=card, roles=changes.pop("roles", {}), **changes))

    put("swh", ("swh",))
    put("swa", ("swa",), task="ner")
    put("arb", ("arb",))
    put("arz", ("arz",))
    put("kab", ("kab-Latn",), base="other")
    put("both", ("pt-BR", "deu"))
    put("role", (), roles={"language": "yor"})
    put("old", ("iw",))  # a code that is not used any more

    def found(**asked: Any) -> set[str]:
        return {name.partition("@")[0] for entry in store.find(**asked) for name in entry.names}

    assert found(language="sw") == found(language="swh") == found(language="swa-Latn") == {"swh", "swa"}
    assert found(language="swh", task="ner") == {"swa"}
    assert found(language="ara") == {"arb", "arz"} and found(language="arb") == {"arb"} and found(language="arz") == {"arz"}
    assert found(language="kab") == found(language="kab-Latn") == {"kab"} and found(language="kab-Tfng") == set()
    assert found(language="por") == {"both"} and found(language="pt-PT") == set() and found(language="de") == {"both"}
    assert found(language="yo") == {"role"} and found(language="iw") == found(language="heb") == {"old"}
    assert found(base="other") == {"kab"} and len(found(base="bert")) == 8
    assert len(found(method="lora")) == 8 and found(method="pfeiffer") == set()
    for wrong in ("gibberishx", "zzq", "xqz", ""):
        with pytest.raises(UsageError, match="not a registered language"):
            store.find(language=wrong)


def test_gc_keeps_what_is_reached_and_what_is_young(store: Store) -> None:
    lang = module(0, name="lang")
    shared = store.add(lang)
    task = store.add(module(1, name="task", requires=(lang.digest,)))
    loose = store.add(module(2, name="loose"))
    store.remove("lang")
    store.remove("loose@1")
    assert store.gc().removed == ()  # all are young
    age(store)
    assert store.gc(dry_run=True).removed == (loose,) and len(store.entries()) == 3
    done = store.gc()
    assert done.removed == (loose,) and done.kept == 2 and done.freed > 0
    assert store.get(shared).digest == lang.digest and store.verify() == []
    store.remove("task")
    assert set(store.gc().removed) == {shared, task} and store.entries() == [] and store.names() == {}


def test_adding_again_renews_the_grace_period(store: Store) -> None:
    sha256 = store.add(module())
    age(store)
    store.add(module())
    store.remove("swh")
    assert store.gc().removed == () and store.get(sha256).digest == module().digest


def test_gc_refuses_when_a_kept_module_cannot_be_read(store: Store) -> None:
    store.add(module(0, name="kept"))
    loose = store.add(module(1, name="loose"))
    store.remove("loose")
    age(store)
    blob = store.path / "blobs" / f"{store.resolve('kept')}.safetensors"
    blob.write_bytes(blob.read_bytes()[:50])
    with pytest.raises(StoreError, match="nothing was removed"):
        store.gc(grace=0)
    assert store.get(loose).digest == module(1, name="loose").digest


def test_a_wrong_hash_is_refused_and_mended_by_adding_again(store: Store) -> None:
    sha256, other = store.add(module(0)), store.add(module(1))
    blobs = store.path / "blobs"
    (blobs / f"{sha256}.safetensors").write_bytes((blobs / f"{other}.safetensors").read_bytes())  # a whole module, but another
    with pytest.raises(ModuleError, match="add the module again"):
        store.get("swh@1")
    assert len(store.verify()) == 1 and len(store.verify("swh@1")) == 1 and store.verify("swh@2") == []
    store.add(module(0), version="1")
    assert store.verify() == [] and store.get("swh@1").digest == module(0).digest


def test_verify_finds_missing_blobs_and_requirements(store: Store) -> None:
    with pytest.raises(StoreError, match="--allow-missing"):
        store.add(module(0, requires=("ab" * 32,)))
    assert store.names() == {}
    sha256 = store.add(module(0, requires=("ab" * 32,)), allow_missing=True)
    assert ["requires digest" in problem for problem in store.verify()] == [True]
    assert len(store.verify("swh")) == 1
    (store.path / "blobs" / f"{sha256}.safetensors").unlink()
    assert ["not there" in problem for problem in store.verify()] == [True]
    assert [bool(entry.problem) for entry in store.entries()] == [True]


@pytest.mark.parametrize("name", ["../up", "/abs", "a/../b", "a\\b", "a\0b", "..", "", "x" * 300, "a@b", "\u202eevil", "ŋ" * 60])
def test_hostile_names_are_refused(store: Store, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        store.add(module(), name=name)
    with pytest.raises(IntarsiaError):
        store.get(name)
    with pytest.raises(IntarsiaError):
        store.remove(name)
    assert not store.path.exists() and list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_any_name_that_is_taken_stays_inside_and_comes_back(store: Store, name: str) -> None:
    try:
        sha256 = store.add(module(), name=name)
    except UsageError:
        return
    inside = {path.parent.name for path in (store.path / "names").glob("*/1")}
    assert len(inside) == len(list((store.path / "names").iterdir())) and all(part.isascii() and "." not in part for part in inside)
    (kept,) = store.names()
    assert store.resolve(f"{kept}@1") == sha256 == store.resolve(f"{name}@1")
    store.remove(kept)


@pytest.mark.parametrize("name", ["con", "CON", "aux.txt", "com1", "nul", "name.", "a:b", "a*b?", "x y", "-rf", "~", "$HOME", "%41", "ŋ", "n\u0303", "a/b/c"])
def test_names_that_a_file_system_would_take_amiss(store: Store, name: str) -> None:
    """Devices of Windows, trailing dots, colons, wildcards, options, escapes: kept, under a file name of plain letters."""
    sha256 = store.add(module(), name=name)
    (folder,) = (store.path / "names").iterdir()
    assert re.fullmatch(r"([a-z0-9_-]|%[0-9A-F]{2})+", folder.name) and folder.name not in ("con", "aux", "com1", "nul")
    assert store.names() == {unicodedata.normalize("NFC", name): {"1": sha256}} and store.resolve(name) == sha256


@pytest.mark.parametrize("label", ["con", "nul", "com1", "lpt9", "aux.x", "a.", "1."])
def test_labels_that_windows_would_take_amiss_are_refused(store: Store, label: str) -> None:
    store.add(module())
    with pytest.raises(UsageError):
        store.tag("swh", label)
    with pytest.raises(UsageError):
        store.add(module(1), version=label)


def test_twins_of_other_normal_forms_are_one_name(store: Store) -> None:
    store.add(module(0), name="n\u0303o")
    assert store.add(module(0), name="\u00f1o") == store.resolve("n\u0303o") and len(store.names()) == 1


def test_a_store_behind_a_symbolic_link_is_a_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    store.path.symlink_to(tmp_path / "real")
    store.add(module())
    assert Store(tmp_path / "real").get("swh").digest == store.get("swh").digest == module().digest and store.verify() == []


def test_a_store_that_may_not_be_written_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(module())

    def refused(path: Any, flags: int, *more: Any, real: Any = os.open, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refused)
    assert store.get("swh").digest == module().digest and store.verify() == [] and len(store.find(language="sw")) == 1
    for work in (lambda: store.add(module(1)), lambda: store.remove("swh"), lambda: store.gc(), lambda: store.tag("swh", "best")):
        with pytest.raises(StoreError, match=re.escape(str(store.path))):
            work()


def test_a_full_disk_leaves_the_store_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(module(), tags=("best",))
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"no space left; the file needs .* bytes, the disk has"):
        store.add(module(1), tags=("best",))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def test_names_that_differ_in_case_stay_apart(store: Store) -> None:
    store.add(module(0), name="NER")
    store.add(module(1), name="ner")
    assert len({path.name.lower() for path in (store.path / "names").iterdir()}) == 2


def test_symbolic_links_inside_are_refused(store: Store, tmp_path: Path) -> None:
    sha256 = store.add(module())
    blob, pointer = store.path / "blobs" / f"{sha256}.safetensors", store.path / "names" / "swh" / "1"
    for path in (blob, pointer, store.path / "names" / "swh", store.path / "blobs", store.path / "names"):
        away = tmp_path / "away"
        path.rename(away)
        path.symlink_to(away)
        with pytest.raises(StoreError, match="symbolic link"):
            store.get("swh@1")
        with pytest.raises(StoreError, match="symbolic link"):
            store.add(module(), version="1")
        path.unlink()
        away.rename(path)
    assert store.verify() == []


def test_damaged_pointers_are_refused(store: Store) -> None:
    store.add(module())
    pointer = store.path / "names" / "swh" / "1"
    for text in ("", "../../etc/passwd\n", "A" * 64 + "\n", "ab" * 32, "ab" * 32 + "\nx"):
        pointer.write_text(text)
        with pytest.raises(StoreError, match="damaged"):
            store.get("swh")
        with pytest.raises(StoreError, match="damaged"):
            store.gc(grace=0)


def test_no_module_is_kept_from_a_damaged_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save(module(), path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModuleError):
        store.add(path)
    assert not store.path.exists()


def writer(store: Store, seeds: Iterable[int]) -> int:
    """A process (a fork) that adds modules and moves a tag; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for seed in seeds:
                Store(store.path).add(module(seed), name="swh", tags=("best",))
            code = 0
        finally:
            os._exit(code)
    return pid


def test_two_writers_a_reader_and_gc_at_once(store: Store, tmp_path: Path) -> None:
    """Writers that add, one that pulls from elsewhere, `gc` without grace, and a reader that must never miss anything."""
    far = Store(tmp_path / "far")
    needed = module(200, name="needed")
    far.add(needed)
    for seed in range(4):
        far.add(module(201 + seed, name="far", requires=(needed.digest,)))
    writers = [writer(store, range(8)), writer(store, range(100, 108)), puller(store, far)]
    codes: dict[int, int] = {}
    while len(codes) < 3:
        codes.update({pid: code for each in writers if each not in codes for pid, code in [os.waitpid(each, os.WNOHANG)] if pid})
        for name in store.names():
            store.get(name)
            store.get(f"{name}@1")
        store.gc(grace=0) if store.path.exists() else None
    assert list(codes.values()) == [0, 0, 0]
    labels = store.names()["swh"]
    versions = {label: sha256 for label, sha256 in labels.items() if label != "best"}
    assert len(versions) == len(set(versions.values())) == 16  # none was lost, none shares a number
    assert {store.get(sha256).digest for sha256 in versions.values()} == {module(s).digest for s in (*range(8), *range(100, 108))}
    assert store.names()["far"] == far.names()["far"]
    store.gc(grace=0)
    assert store.verify() == []


def puller(store: Store, far: Store) -> int:
    """A process that pulls everything, again where `gc` without grace was faster than the names; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for _ in range(200):
                with contextlib.suppress(StoreError):
                    pull(Store(store.path), FolderRemote(far.path), ["far@1", "far@2", "far@3", "far@4"])
                    code = 0
                    break
        finally:
            os._exit(code)
    return pid


def test_a_killed_writer_leaves_old_or_new(store: Store) -> None:
    store.add(module(), tags=("best",))
    for round_ in range(12):
        pid = writer(store, itertools.count(1000 * (1 + round_)))
        time.sleep(0.02 + 0.007 * round_)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert store.verify() == []
        labels = store.names()["swh"]
        assert labels["best"] in labels.values() and store.get("swh@best").digest
        store.add(module(7 + round_))  # the dead writer's lock is free
    known = {path.name for path in store.path.iterdir()}
    assert known <= {"blobs", "names", ".lock"}


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
def test_a_writer_killed_at_every_step_leaves_old_or_new(store: Store, call: str) -> None:
    old = store.add(module(0), tags=("best",))
    new = hashlib.sha256(dumps(module(1, name="new"))).hexdigest()
    finished = False
    for step in itertools.count():
        pid = os.fork()
        if pid == 0:
            kill_at(call, step)
            store.add(module(1, name="new"), name="swh", version="2", tags=("best",))
            store.add(module(1, name="new"), name="new")
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            finished = True
        assert store.verify() == []
        labels = store.names()["swh"]
        assert labels["1"] == old and labels["best"] in (old, labels.get("2")) and labels.get("2") in (None, new)
        if finished:
            break
        if "2" in labels:
            store.tag("swh@1", "best")
            store.remove("swh@2")
        if "new" in store.names():
            store.remove("new")
        store.gc(grace=0)
        assert [entry.sha256 for entry in store.entries()] == [old]
        assert {path.name for path in store.path.rglob("*")} == {".lock", "blobs", "names", f"{old}.safetensors", "swh", "1", "best"}
    assert step > 0 and store.resolve("swh@best") == new


def kill_at(call: str, step: int) -> None:
    """Make this process kill itself before the given call of a function of `os`."""
    real, count = getattr(os, call), itertools.count()

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(os, call, counted)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps functions of its own
    if hasattr(accessor, call):
        setattr(accessor, call, staticmethod(counted))
