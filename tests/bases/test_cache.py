"""The cache of converted bases: appears at once, survives killed and concurrent builders, notices damage."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from intarsia.bases import BASES
from intarsia.bases import cache as cache_module
from intarsia.bases.cache import cache_root, ensure, entry_path, problem
from intarsia.bases.resolve import resolve
from intarsia.bases.rows import EmbeddedBase
from intarsia.errors import BaseError

from . import fakes

FACTS = {"base": "x", "converter_version": 1}


def build(out: Path) -> None:
    (out / "a.txt").write_text("one")
    (out / "b.txt").write_text("two")


def find(name: str, **options: bool) -> Path:
    return resolve(name, **{"allow_network": False, "verify": False, **options}, revision=None).folder


def left_over(entry: Path) -> list[str]:
    return [path.name for path in entry.parent.iterdir() if path.name.startswith(cache_module.BUILDING)]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("INTARSIA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "intarsia"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "intarsia"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "intarsia"
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_no_home_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTARSIA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BaseError, match="set INTARSIA_CACHE"):
        cache_root()


def test_an_entry_is_built_once_and_sealed(cache: Path) -> None:
    entry = entry_path("x", "1", 1)
    assert ensure(entry, FACTS, build) == []
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["files"]["a.txt"] == {
        "size": 3,
        "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
    }
    assert problem(entry, FACTS, thorough=True) is None

    def never(out: Path) -> None:
        raise AssertionError("built twice")

    assert ensure(entry, FACTS, never, verify=True) == []
    assert left_over(entry) == []


def test_a_failing_builder_leaves_nothing(cache: Path) -> None:
    entry = entry_path("x", "1", 1)

    def fail(out: Path) -> None:
        build(out)
        raise BaseError("the source is damaged")

    with pytest.raises(BaseError, match="the source is damaged"):
        ensure(entry, FACTS, fail)
    assert not entry.exists()
    assert left_over(entry) == []


@pytest.mark.parametrize(
    ("damage", "message", "thorough"),
    [
        (lambda entry: (entry / "a.txt").write_text("three"), "a.txt has 5 bytes, 3 were written", False),
        (lambda entry: (entry / "a.txt").unlink(), "a.txt is missing", False),
        (lambda entry: (entry / "manifest.json").unlink(), "it has no manifest.json", False),
        (lambda entry: (entry / "manifest.json").write_text("{"), "manifest.json cannot be read", False),
        (lambda entry: (entry / "manifest.json").write_text("[1]"), "manifest.json cannot be read", False),
        (lambda entry: (entry / "manifest.json").write_text("[" * 100_000), "manifest.json cannot be read", False),
        (lambda entry: (entry / "manifest.json").write_text(" " * 2_000_000), "is larger than", False),
        (lambda entry: (entry / "a.txt").write_text("eno"), "a.txt has another content", True),
    ],
)
def test_damage_is_found_reported_and_repaired(damage, message, thorough, cache: Path, caplog) -> None:
    entry = entry_path("x", "1", 1)
    ensure(entry, FACTS, build)
    damage(entry)
    if thorough:
        assert problem(entry, FACTS) is None  # the cheap check cannot see it
    assert message in str(problem(entry, FACTS, thorough=thorough))
    with pytest.raises(BaseError, match="is damaged"):
        ensure(entry, FACTS, None, verify=thorough)
    with caplog.at_level(logging.WARNING, "intarsia.bases"):
        done = ensure(entry, FACTS, build, verify=thorough)
    assert len(done) == 1 and "was built again" in done[0]
    assert len(caplog.records) == 1
    assert problem(entry, FACTS, thorough=True) is None
    assert left_over(entry) == []


def test_a_manifest_cannot_point_outside(cache: Path) -> None:
    entry = entry_path("x", "1", 1)
    ensure(entry, FACTS, build)
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = {"size": 0, "sha256": ""}
    (entry / "manifest.json").write_text(json.dumps(manifest))
    assert "is missing" in str(problem(entry, FACTS))


def test_another_converter_is_another_entry(tiny: EmbeddedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find("tiny-e5")
    monkeypatch.setitem(BASES._items, "tiny-e5", replace(tiny, converter_version=2))
    assert find("tiny-e5") != first
    assert first.is_dir()


def test_a_new_package_version_is_converted_anew(tiny: EmbeddedBase, tmp_path: Path) -> None:
    first = find("tiny-e5")
    fakes.install(tmp_path / "site", version="2.0", seed=7)
    found = resolve("tiny-e5", allow_network=False, revision=None, verify=False)
    assert found.folder != first
    assert "tiny_e5_pkg 2.0 is installed, 1.0 was tested" in found.notes
    assert (found.folder / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_the_copy_outlives_the_package(tiny: EmbeddedBase, tmp_path: Path) -> None:
    first = find("tiny-e5")
    (tmp_path / "site").rename(tmp_path / "gone")
    assert tiny.locate() is None
    assert find("tiny-e5", verify=True) == first
    (first / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseError, match=r"model\.safetensors has 0 bytes"):
        find("tiny-e5")


def test_a_file_that_is_not_the_tested_one_is_refused(tiny: EmbeddedBase) -> None:
    source = tiny.locate()
    assert source is not None
    source.write_bytes(fakes.e5s1(seed=5)[0])
    with pytest.raises(BaseError, match=r"SHA-256 differs.*--force-reinstall"):
        find("tiny-e5")


def test_a_cache_that_cannot_be_written(tiny: EmbeddedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseError, match=r"cannot write the cache.*set INTARSIA_CACHE"):
        find("tiny-e5")


def test_a_full_disk_is_an_error_and_leaves_nothing(tiny: EmbeddedBase, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from safetensors import SafetensorError

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("intarsia.bases.folder.save_file", full)
    with pytest.raises(BaseError, match="No space left on device"):
        find("tiny-e5")
    assert not list(cache.rglob("config.json"))


# two processes ----------------------------------------------------------------------------------------------------

WORKER = textwrap.dedent(
    """
    import os, sys, time
    from contextlib import nullcontext
    from dataclasses import replace
    from pathlib import Path
    site, go, lock, pause = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "lock", float(sys.argv[4])
    sys.path[:0] = [site, sys.argv[5]]
    from tests.bases import fakes
    from intarsia.bases import BASES, cache, me5
    from intarsia.bases.resolve import resolve
    import importlib, hashlib
    row = fakes.EmbeddedBase(**eval(sys.argv[6]))
    BASES.add(row.name, row)
    if not lock:
        cache.FileLock = lambda *a, **k: nullcontext()
    convert = me5.convert
    def slow(source, out):
        print("building", flush=True)
        convert(source, out)
        time.sleep(pause)
    me5.convert = slow
    print("ready", flush=True)
    while not go.exists():
        time.sleep(0.005)
    found = resolve(row.name, allow_network=False, revision=None, verify=True)
    print(hashlib.sha256((found.folder / "model.safetensors").read_bytes()).hexdigest(), flush=True)
    """
)


def start(row: EmbeddedBase, tmp_path: Path, *, lock: bool, pause: float) -> subprocess.Popen[str]:
    fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "site"), str(tmp_path / "go"), "lock" if lock else "no lock",
               str(pause), str(Path(__file__).parents[2]), repr(fields)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("lock", [True, False], ids=["with locks", "where locks do not work"])
def test_two_processes_build_at_once(lock: bool, tiny: EmbeddedBase, tmp_path: Path) -> None:
    workers = [start(tiny, tmp_path, lock=lock, pause=0.3) for _ in range(2)]
    (tmp_path / "go").touch()
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum(output.count("building") for output in outputs) == (1 if lock else 2)
    entry = find("tiny-e5", verify=True)
    assert [path.name for path in entry.parent.iterdir() if not path.name.endswith(".lock")] == [entry.name]


def test_a_killed_builder_leaves_no_entry_and_is_cleaned_up_after(tiny: EmbeddedBase, tmp_path: Path) -> None:
    worker = start(tiny, tmp_path, lock=True, pause=60)
    (tmp_path / "go").touch()
    assert worker.stdout is not None and worker.stdout.readline() == "building\n"
    entry = entry_path(tiny.name, "1.0", 1)
    deadline = time.monotonic() + 30
    while not any((entry.parent / name / "model.safetensors").exists() for name in left_over(entry)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait(30)
    worker.stdout.close()
    assert not entry.exists()
    assert len(left_over(entry)) == 1
    assert find("tiny-e5") == entry
    left = left_over(entry)
    assert len(left) == 1  # it could belong to a builder that is alive; an hour later it cannot
    os.utime(entry.parent / left[0], (time.time() - 3601,) * 2)
    assert find("tiny-e5") == entry
    assert left_over(entry) == []


def test_waiting_for_ever_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_path("x", "1", 1)
    entry.parent.mkdir(parents=True)
    monkeypatch.setattr(cache_module, "WAIT_SECONDS", 0.1)
    with cache_module.FileLock(entry.parent / f".{entry.name}.lock"):
        lock = cache_module.FileLock
        # a second lock object of the same process counts as another holder
        with pytest.raises(BaseError, match="another process has been building"), nullcontext(lock):
            ensure(entry, FACTS, build)
