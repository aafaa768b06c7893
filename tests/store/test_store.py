"""The store: what is added comes back, versions stay, names are no paths, and nobody ever sees a torn module."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError
from intarsia.modules import Card, Module, dumps, load, save
from intarsia.store.store import Store
from tests.modules import make


def module(seed: int = 0, **changes: Any) -> Module:
    return make.module(seed, **{"requires": (), **changes})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def age(store: Store, seconds: float = 9000.0) -> None:
    """Make every blob older than the grace period."""
    for blob in (store.path / "blobs").iterdir():
        os.utime(blob, (time.time() - seconds,) * 2)


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


def test_loading_opens_only_its_own_files(store: Store) -> None:
    for seed in range(5):
        store.add(module(seed), name=f"m{seed}")
    opened: list[str] = []
    listening = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening[0] and event == "open" and str(arguments[0]).startswith(str(store.path)):
            opened.append(os.path.relpath(str(arguments[0]), store.path))

    sys.addaudithook(hook)
    store.get("m3@1")
    listening[0] = False
    assert set(opened) == {"names/m3/1", f"blobs/{store.resolve('m3')}.safetensors"}


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

    def found(**asked: Any) -> set[str]:
        return {name.partition("@")[0] for entry in store.find(**asked) for name in entry.names}

    assert found(language="sw") == found(language="swh") == found(language="swa-Latn") == {"swh", "swa"}
    assert found(language="swh", task="ner") == {"swa"}
    assert found(language="ara") == {"arb", "arz"} and found(language="arb") == {"arb"} and found(language="arz") == {"arz"}
    assert found(language="kab") == found(language="kab-Latn") == {"kab"} and found(language="kab-Tfng") == set()
    assert found(language="por") == {"both"} and found(language="pt-PT") == set() and found(language="de") == {"both"}
    assert found(language="yo") == {"role"}
    assert found(base="other") == {"kab"} and len(found(base="bert")) == 7
    assert len(found(method="lora")) == 7 and found(method="pfeiffer") == set()
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


def test_two_writers_a_reader_and_gc_at_once(store: Store) -> None:
    writers = [writer(store, range(8)), writer(store, range(100, 108))]
    codes: dict[int, int] = {}
    while len(codes) < 2:
        codes.update({pid: code for each in writers if each not in codes for pid, code in [os.waitpid(each, os.WNOHANG)] if pid})
        if "swh" in store.names():
            store.get("swh")
            store.get("swh@1")
            store.gc(grace=0)
    assert list(codes.values()) == [0, 0]
    labels = store.names()["swh"]
    versions = {label: sha256 for label, sha256 in labels.items() if label != "best"}
    assert len(versions) == len(set(versions.values())) == 16  # none was lost, none shares a number
    assert {store.get(sha256).digest for sha256 in versions.values()} == {module(s).digest for s in (*range(8), *range(100, 108))}
    assert store.verify() == []


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
