"""One optimiser step on the same rows gives the same update, whatever batch x accumulation x processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import make, worker

KINDS = list(make.KINDS)


def assert_same_update(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and expected
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The update of one step of 16 rows in one batch, and that of two steps over 17 rows."""
    found = {kind: worker.update(kind, batch_size=16) for kind in KINDS}
    return {**found, "rest": worker.update("tag", batch_size=16, rows=17)}


@pytest.mark.parametrize(("kind", "accumulation"), [*((kind, 4) for kind in KINDS), ("tag", 3), ("tag", 16)])
def test_accumulation_changes_nothing(whole: dict[str, Any], kind: str, accumulation: int) -> None:
    assert_same_update(worker.update(kind, batch_size=16, accumulation=accumulation), whole[kind])


def test_a_last_step_of_one_row_counts_as_one_row(whole: dict[str, Any]) -> None:
    assert_same_update(worker.update("tag", batch_size=16, accumulation=4, rows=17), whole["rest"])


def test_two_processes_change_nothing(whole: dict[str, Any], tmp_path: Path) -> None:
    jobs: dict[str, Any] = {kind: {"kind": kind, "batch_size": 16} for kind in KINDS}
    jobs["rest"] = {"kind": "tag", "batch_size": 16, "accumulation": 3, "rows": 17}
    worker.launch(2, "updates", str(tmp_path / "out"), json.dumps(jobs))
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in (0, 1))
    for name in jobs:
        assert_same_update(first[name], whole[name])
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in first[name].items())


def test_the_mean_of_batch_means_would_be_noticed(whole: dict[str, Any]) -> None:
    """The rows differ in their number of terms, so that dividing piece by piece gives another update."""
    from intarsia.train.order import pieces, steps

    task = make.KINDS["tag"][0]()
    features = task.features(make.table(16))
    (rows,) = steps([len(f["input_ids"]) for f in features], 16, 0, 0)
    counts = {sum(task.terms(task.collate([features[i]])) for i in piece) for piece in pieces(rows, 1, 4)[0]}
    assert len(counts) > 1
