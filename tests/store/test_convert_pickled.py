"""Pickles: what asks for anything but tensors does nothing and is refused by name, and so is an archive that torch would not write."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import ModuleError, StoreError
from intarsia.store.convert.pickle_child import flat
from intarsia.store.convert.pickled import check_archive, read_pickled
from tests.shared import shared

pytestmark = pytest.mark.filterwarnings("ignore:.*is a pickle")


class Runs:
    """Unpickled, it calls something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.what = (call, arguments)

    def __reduce__(self) -> Any:
        return self.what


def archive(path: Path, program: bytes, extra: dict[str, bytes] | None = None) -> Path:
    """What torch.save writes, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for name, data in {"a/data.pkl": program, "a/version": b"3\n", "a/byteorder": b"little", **(extra or {})}.items():
            out.writestr(name, data)
    return path


def test_tensors_come_back(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": wide, "same": wide, "turned": wide.T, "half": wide.bfloat16(), "whole": torch.tensor([3])}, tmp_path / "x.bin")
    with pytest.warns(UserWarning, match="is a pickle"):
        found = read_pickled(tmp_path / "x.bin")
    assert set(found) == {("a",), ("same",), ("turned",), ("half",), ("whole",)}
    assert torch.equal(found["turned",], wide.T) and found["half",].dtype is torch.bfloat16


def test_sample_of_adapterhub() -> None:
    path = shared("fixtures/adapterhub/bert/prefix_tuning/pytorch_adapter.bin")
    want = torch.load(path, weights_only=True)
    found = read_pickled(path)
    assert {name[0] for name in found} == want.keys() and all(torch.equal(found[key,], tensor) for key, tensor in want.items())


@pytest.mark.parametrize("kind", ["os.system", "exec", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("eval", "open", "getattr"))])
def test_code_never_runs(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    calls: dict[str, Any] = {
        "os.system": Runs(os.system, f"touch {canary}"), "exec": Runs(exec, f"open({str(canary)!r}, 'w').close()"),
        "eval": Runs(eval, f"open({str(canary)!r}, 'w')"), "open": Runs(open, str(canary), "w"), "getattr": Runs(getattr, torch.ones(1), "data"),
    }  # fmt: skip
    torch.save({"a": torch.ones(2), "b": calls[kind]}, tmp_path / "x.bin")
    with pytest.raises(ModuleError, match=r"was not read: it asks for [\w.]+, and only tensors are read"):
        read_pickled(tmp_path / "x.bin")
    assert not canary.exists()
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert kind == "getattr" or canary.exists(), "the file does what the loader keeps it from doing"


@pytest.mark.parametrize(("value", "message"), [
    ({"a": "text"}, "a: a str"), ({"a": {"b": {"c": {"d": {"e": torch.ones(1)}}}}}, "a/b/c/d: a dict"), ({1: torch.ones(1)}, "no string"),
    ({"a": torch.ones(2, 2).to_sparse()}, "layout"),
])  # fmt: skip
def test_what_is_no_tensor_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat(value, (), {})


def test_a_tensor_larger_than_its_file_allows(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.bin")
    with pytest.raises(ModuleError, match="more than the"):
        read_pickled(tmp_path / "x.bin")


def test_a_program_without_end_is_stopped(tmp_path: Path) -> None:
    """Each step doubles a list: more than any memory."""
    program = b"\x80\x02]q\x00" + b"".join(b"(h" + bytes([i]) + b"h" + bytes([i]) + b"lq" + bytes([i + 1]) for i in range(40)) + b"."
    with pytest.raises(ModuleError, match="was not read"):
        read_pickled(archive(tmp_path / "x.bin", program), seconds=5)


@pytest.mark.parametrize(("extra", "message"), [
    ({"a/../../evil": b"x"}, "none that torch writes"), ({"/etc/evil": b"x"}, "none that torch writes"), ({"a/data/../x": b"x"}, "none that torch writes"),
    ({"a/data\\..\\x": b"x"}, "none that torch writes"), ({"b/data/0": b"x"}, "2 folders"), ({"a/code/run.py": b"x"}, "none that torch writes"),
    ({"../data/0": b"x"}, "none that torch writes"),
])  # fmt: skip
def test_entries_that_climb_or_do_not_belong(extra: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=message):
        check_archive(archive(tmp_path / "x.bin", pickle.dumps({}, 2), extra))


def test_links_compression_and_doubles(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/data/0")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name, message in (("link", "is a link"), ("packed", "compressed"), ("twice", "one name")):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out.writestr("a/data.pkl", pickle.dumps({}, 2))
            if name == "link":
                out.writestr(link, "/etc/passwd")
            else:
                out.writestr("a/data/0", b"0" * 100_000, zipfile.ZIP_DEFLATED if name == "packed" else zipfile.ZIP_STORED)
            if name == "twice":
                out.writestr("a/data/0", b"1")
        with pytest.raises(ModuleError, match=message):
            check_archive(path)


def test_what_is_no_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("old.bin", "empty.bin"):
        with pytest.raises(ModuleError, match="no zip archive"):
            read_pickled(tmp_path / name)
    with pytest.raises(StoreError, match="no such file"):
        read_pickled(tmp_path / "none.bin")


def test_truncation(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(200)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "y.bin").write_bytes(data[:length])
        with pytest.raises(ModuleError):
            check_archive(tmp_path / "y.bin")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    read_pickled(tmp_path / "x.bin")
    assert not list((tmp_path / "tmp").iterdir())
    shutil.rmtree(tmp_path / "tmp")
