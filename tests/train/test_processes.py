"""Two gloo processes on one run directory: one writes, both stop together, both go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intarsia.train import checkpoint as checkpoints
from tests.train import worker

pytestmark = pytest.mark.slow


def answers(texts: list[str]) -> list[dict[str, Any]]:
    """The last line that each process printed."""
    return [json.loads(text.strip().splitlines()[-1]) for text in texts]


def test_two_processes_stop_together_and_resume_exactly(tmp_path: Path) -> None:
    whole = answers(worker.launch(2, "run", str(tmp_path / "whole"), "whole"))
    assert whole[0] == whole[1] and whole[0]["steps"] == 6
    folder = tmp_path / "stopped"
    for text in worker.launch(2, "run", str(folder), "stop", code=143):
        # it came within step 4 and is noticed, in common, at the start of the next
        assert "stopped by a signal after step 5 of 6" in text
    found, _ = checkpoints.latest(folder)
    assert found.step == 5 and {"rng-0.pt", "rng-1.pt"} <= found.files.keys()
    for text in worker.launch(1, "run", str(folder), "resume", code=1):
        assert "world was 2, is 1" in text
    assert answers(worker.launch(2, "run", str(folder), "resume")) == whole
    facts = json.loads((folder / "run.json").read_text("utf-8"))
    assert facts["world"] == 2 and facts["status"] == "finished" and len(facts["resumed"]) == 1


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path: Path) -> None:
    texts = worker.launch(2, "run", str(tmp_path), "poisoned", code=1, timeout=120)
    assert any("the loss is nan at step" in text and "No step was taken" in text for text in texts)
    assert all("TrainingError: the loss is nan" in text or "TrainingError: the gradient is not finite" in text for text in texts)


@pytest.mark.parametrize("method", ["spiel", "diff_pruning", "lottery"])
def test_processes_choose_the_same_entries(method: str) -> None:
    first, second = answers(worker.launch(2, "thin", method))
    assert first == second
