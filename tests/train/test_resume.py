"""Going on after an interruption gives the module of the uninterrupted run, bit by bit, or is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from intarsia.errors import TrainingError
from intarsia.train import Interrupted, Recipe, train
from intarsia.train import checkpoint as checkpoints
from intarsia.train.loop import Result
from tests.train import make

#: two epochs of three steps, the third one smaller, dropout in the base, two pieces per step
RECIPE = Recipe(epochs=2, batch_size=16, accumulation=2, learning_rate=1e-2, save_every=1, eval_every=2)
ROWS, STEPS = 40, 6


class SignalAfter(TrainerCallback):
    """A signal while a step is being computed."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step = step
        self.number = number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def run(folder: Path | None, kind: str = "classify", recipe: Recipe = RECIPE, rows: int = ROWS, **more: Any) -> Result:
    host, task = make.host(kind, base_dropout=True)
    dev = None if kind == "mlm" else make.table(20, seed=1)
    return train(host, "m", task, make.table(rows), dev, recipe=recipe, run_dir=folder, **more)


def interrupted(folder: Path, step: int, **more: Any) -> None:
    with pytest.raises(Interrupted) as caught:
        run(folder, callbacks=[SignalAfter(step)], **more)
    assert caught.value.exit_code == 130 and f"--resume {folder}" in str(caught.value) and f"step {step} " in str(caught.value)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Result]:
    return {kind: run(None, kind) for kind in ("classify", "mlm")}


@pytest.fixture
def stopped(stopped_at_four: Path, tmp_path: Path) -> Path:
    """A copy of a run that was interrupted after step 4."""
    shutil.copytree(stopped_at_four, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def stopped_at_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted(folder, 4)
    return folder


@pytest.mark.parametrize(("kind", "step"), [("classify", 1), ("classify", 3), ("classify", 5), ("mlm", 2)])
def test_resume_is_exact(uninterrupted: dict[str, Result], tmp_path: Path, kind: str, step: int) -> None:
    interrupted(tmp_path, step, kind=kind)
    result = run(tmp_path, kind, resume=True)
    expected = uninterrupted[kind]
    assert result.module.digest == expected.module.digest
    assert result.metrics == expected.metrics and result.best_step == expected.best_step and result.steps == STEPS
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [strip(e) for e in lines if "dev" in e] == [strip(e) for e in expected.history if "dev" in e]


def strip(entry: Any) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "seconds"}


def test_going_on_with_other_random_states_would_be_noticed(
    uninterrupted: dict[str, Result], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intarsia.train.trainer.rng.restore", lambda saved: None)
    assert run(stopped, resume=True).module.digest != uninterrupted["classify"].module.digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "tag", "mlm", "seq2seq"])
def test_resume_after_every_step_and_twice(tmp_path: Path, kind: str) -> None:
    expected = run(None, kind).module.digest
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        interrupted(folder, step, kind=kind)
        if step + 1 < STEPS:
            interrupted(folder, step + 1, kind=kind, resume=True)
        assert run(folder, kind, resume=True).module.digest == expected


def test_a_killed_run_goes_on_from_its_last_checkpoint(uninterrupted: dict[str, Result], tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Killed()])
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["status"] == "failed"
    assert run(tmp_path, resume=True).module.digest == uninterrupted["classify"].module.digest


def test_only_the_newest_checkpoints_are_kept(stopped: Path) -> None:
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.pt", "scheduler.pt", "rng-0.pt", "trainer_state.json", "run_state.json"])
@pytest.mark.parametrize("harm", ["missing", "flipped", "cut"])
def test_a_missing_or_changed_file_is_refused_by_name(stopped: Path, name: str, harm: str) -> None:
    file = checkpoints.folder(stopped, 4) / name
    data = bytearray(file.read_bytes())
    file.unlink()
    if harm == "flipped":
        data[len(data) // 2] ^= 1
    if harm != "missing":
        file.write_bytes(data[:-1] if harm == "cut" else data)
    with pytest.raises(TrainingError, match=rf"{name} (is missing|was changed)"):
        checkpoints.latest(stopped)


def test_resuming_refuses_before_anything_changes(stopped: Path) -> None:
    (checkpoints.folder(stopped, 4) / "optimizer.pt").unlink()
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=r"optimizer\.pt is missing"):
        run(stopped, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == before and not (stopped / "run.lock").exists()


def test_an_incomplete_last_checkpoint_is_passed_over(uninterrupted: dict[str, Result], stopped: Path) -> None:
    (checkpoints.folder(stopped, 4) / "manifest.json").unlink()
    found, passed = checkpoints.latest(stopped)
    assert found.step == 3 and [path.name for path in passed] == ["step-000004"]
    notes = Notes()
    assert run(stopped, resume=True, progress=notes).module.digest == uninterrupted["classify"].module.digest
    assert any("step-000004 is incomplete" in note and "step-000003" in note for note in notes.texts)


def test_without_a_complete_checkpoint_nothing_can_be_resumed(stopped: Path) -> None:
    for step in (3, 4):
        (checkpoints.folder(stopped, step) / "manifest.json").unlink()
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        run(stopped, resume=True)


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pickle-was-executed",)


def test_pickled_code_is_not_run_even_with_a_matching_manifest(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stopped)
    path = checkpoints.folder(stopped, 4)
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    torch.save({"state": Canary()}, path / "optimizer.pt")
    (path / "manifest.json").unlink()
    checkpoints.complete(path, 4, manifest["plan"])
    with pytest.raises(TrainingError, match=r"optimizer\.pt: not a file of tensors and plain values"):
        run(stopped, resume=True)
    assert not (stopped / "pickle-was-executed").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": replace(RECIPE, batch_size=8)}, "recipe.batch_size was 16, is 8"),
        ({"rows": 41}, "train was"),
    ],
)
def test_another_training_cannot_go_on_from_a_checkpoint(stopped: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingError, match="cannot go on as asked") as caught:
        run(stopped, resume=True, **change)
    assert named in str(caught.value)


def test_a_used_directory_is_refused_without_resume_and_an_unused_one_with(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds a run already"):
        run(stopped)
    with pytest.raises(TrainingError, match="holds no run"):
        run(tmp_path / "new", resume=True)


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.module == first.module and again.metrics == first.metrics and again.history == first.history
    assert not (tmp_path / "checkpoints").exists()


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.texts.append(f"{what} {done}/{total}")

    def update(self, done: int, values: Any = None) -> None:
        pass

    def note(self, text: str) -> None:
        self.texts.append(text)

    def stop(self) -> None:
        pass
