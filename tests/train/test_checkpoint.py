"""Checkpoint folders by themselves: complete or not, rotated, verified, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import TrainingError
from intarsia.train import checkpoint as checkpoints
from intarsia.train.checkpoint import MANIFEST, begin, complete, difference, folder, latest, rotate, save_json


def put(run: Path, step: int, whole: bool = True) -> Path:
    path = begin(run, step)
    save_json(path / "run_state.json", {"step": step})
    if whole:
        complete(path, step, {"seed": 0})
    return path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoints.FOLDER).iterdir())


def test_the_newest_complete_one_counts(tmp_path: Path) -> None:
    put(tmp_path, 999_999)
    put(tmp_path, 1_000_000)
    put(tmp_path, 1_000_001, whole=False)
    (tmp_path / checkpoints.FOLDER / "step-notes").mkdir()
    found, passed = latest(tmp_path)
    assert found.step == 1_000_000 and found.run_state() == {"step": 1_000_000} and [p.name for p in passed] == ["step-1000001"]


def test_rotation_keeps_complete_ones_and_what_is_being_written(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2, whole=False)
    put(tmp_path, 3)
    put(tmp_path, 4)
    put(tmp_path, 5, whole=False)
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_what_a_killed_process_left_is_written_anew(tmp_path: Path) -> None:
    (put(tmp_path, 3, whole=False) / "optimizer.pt").write_bytes(b"half")
    put(tmp_path, 3)
    assert latest(tmp_path)[0].files.keys() == {"run_state.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format 1"),
        (lambda m: m["files"].update({"../outside.json": {"bytes": 1, "sha256": ""}}), "malformed list of files"),
        (lambda m: m.pop("files"), "malformed list of files"),
    ],
)
def test_manifests_are_checked(tmp_path: Path, change: Any, message: str) -> None:
    path = put(tmp_path, 1) / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(TrainingError, match=message):
        latest(tmp_path)


def test_a_link_is_not_a_file_of_a_checkpoint(tmp_path: Path) -> None:
    file = put(tmp_path, 1) / "run_state.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(TrainingError, match="is missing"):
        latest(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no complete checkpoint to resume from"):
        latest(tmp_path)
    assert folder(tmp_path, 7).name == "step-000007"


def test_differences_are_named_where_they_are() -> None:
    then = {"recipe": {"seed": 0, "rate": 0.1}, "train": "ab", "old": 1}
    now = {"recipe": {"seed": 1, "rate": 0.1}, "train": "ab", "new": None}
    assert difference(then, now) == ["old was 1, is null", "recipe.seed was 0, is 1"]
    assert difference({"a": (1, 2)}, {"a": [1, 2]}) == [] and difference({"a": 1}, {"a": True}) == ["a was 1, is true"]
