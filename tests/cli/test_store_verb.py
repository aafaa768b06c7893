"""`store`: the verbs on a small module, their JSON, and one line for what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.modules import load, save
from tests.cli.run import Here
from tests.modules import make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "swh.safetensors"
    save(make.module(requires=()), path)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTARSIA_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def test_the_way_of_a_module(cli: Here, file: Path, tmp_path: Path, place: Path) -> None:
    added = cli("store", "add", str(file), "--tag", "best", "--json").ok().json
    assert added["names"] == ["swh@1", "swh@best"] and added["store"] == str(place)
    (row,) = cli("store", "ls", "--lang", "sw", "--method", "lora", "--json").ok().json
    assert row["sha256"] == added["sha256"] and row["languages"] == ["swh"] and row["size"] == file.stat().st_size
    assert cli("store", "ls", "--lang", "kab", "--json").ok().json == []
    assert "swh@best" in cli("store", "ls").ok().out
    assert cli("store", "show", "swh@best", "--json").ok().json["digest"] == load(file).digest
    assert added["sha256"] in cli("store", "show", added["sha256"][:8]).ok().out
    assert cli("store", "tag", "swh", "good", "--json").ok().json["tag"] == "swh@good"
    assert cli("store", "verify", "--json").ok().json == {"problems": []}
    out = tmp_path / "out.safetensors"
    cli("store", "export", "swh@good", str(out)).ok()
    assert out.read_bytes() == file.read_bytes()
    assert cli("store", "rm", "swh", "--json").ok().json == {"removed": ["swh@best", "swh@good", "swh@1"]}
    assert cli("store", "gc", "--json").ok().json["removed"] == []
    assert cli("store", "gc", "--grace", "0", "--dry-run", "--json").ok().json["removed"] == [added["sha256"]]
    assert cli("store", "gc", "--grace", "0", "--json").ok().json["removed"] == [added["sha256"]]
    assert "no modules" in cli("store", "ls").ok().out


def test_another_folder(cli: Here, file: Path, tmp_path: Path, place: Path) -> None:
    cli("store", "add", str(file), "--store", str(tmp_path / "other")).ok()
    assert not place.exists() and len(cli("store", "ls", "--store", str(tmp_path / "other"), "--json").ok().json) == 1


def test_errors_are_one_line(cli: Here, file: Path, place: Path, tmp_path: Path) -> None:
    cli("store", "rm", "swh").error(5)
    cli("store", "add", str(tmp_path / "nothing")).error(5)
    cli("store", "add", str(file), "--name", "../up").error(2)
    added = cli("store", "add", str(file), "--json").ok().json
    assert "no 'swh@7'" in cli("store", "show", "swh@7").error(5)
    assert "not a registered language" in cli("store", "ls", "--lang", "zzq").error(2)
    cli("store", "export", "swh", str(file)).error(5)
    cli("store", "gc", "--grace", "-1").error(2)
    blob = place / "blobs" / f"{added['sha256']}.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    assert "1 problem" in cli("store", "verify").error(4)
    listed = cli("store", "ls", "--json").ok()
    assert listed.json[0]["problem"] and "warning: " in listed.err
