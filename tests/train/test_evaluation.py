"""Predictions come in row order, whatever the batches; nothing of the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from intarsia.errors import CompositionError, DataError
from intarsia.methods import build
from intarsia.train import evaluate, predict
from intarsia.train.run import collapsed
from intarsia.train.task import Prediction
from tests.train import make
from tests.train.test_resume import Notes


def moved_host() -> tuple[Any, Any]:
    host, task = make.host("classify")
    with torch.no_grad():
        for seed, parameter in enumerate(host.parameters("m").values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return host, task


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_change_no_answer(size: int) -> None:
    host, task = moved_host()
    data = make.table(20)
    found = predict(host, "m", task, data, batch_size=size)
    assert [p.row for p in found] == list(range(20))
    with torch.no_grad(), host.using("m") as model:
        for prediction, feature in zip(found, task.features(data)):
            logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0]
            assert prediction.value == make.LABELS[int(logits.argmax())]
    assert len({p.value for p in found}) > 1


def test_evaluation_gives_predictions_scores_and_the_mean_loss() -> None:
    host, task = moved_host()
    data = make.table(20)
    found = evaluate(host, "m", task, data, batch_size=6)
    assert found.predictions == predict(host, "m", task, data)
    assert found.scores == task.score(found.predictions, data)
    with torch.no_grad(), host.using("m") as model:
        losses = [
            F.cross_entropy(model(input_ids=torch.tensor([f["input_ids"]])).logits, torch.tensor([f["labels"]])) for f in task.features(data)
        ]
    assert found.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_modes_are_given_back_and_dropout_is_off() -> None:
    host, task = make.host("classify", base_dropout=True)
    host.model.train()
    host.model.encoder.layer[0].eval()
    before = [module.training for module in host.model.modules()]
    data = make.table(12)
    assert evaluate(host, "m", task, data).loss == evaluate(host, "m", task, data).loss
    assert [module.training for module in host.model.modules()] == before
    assert all(parameter.grad is None for parameter in host.model.parameters())


def test_masks_are_the_same_in_every_evaluation() -> None:
    host, task = make.host("mlm")
    task.epoch = 3
    data = make.table(12)
    assert evaluate(host, "m", task, data).loss == evaluate(host, "m", task, data).loss
    assert {epoch for epoch, _ in task.collated} == {None} and task.epoch == 3


def test_the_head_that_answers_can_be_named() -> None:
    host, task = moved_host()
    host.add("second", build("lora").with_head(task.head))
    data = make.table(12)
    with pytest.raises(CompositionError):
        predict(host, "base", task, data, head="m")
    assert [p.value for p in predict(host, "second >> m", task, data, head="m")] == [p.value for p in predict(host, "m", task, data)]


def test_progress_and_nothing_to_do() -> None:
    host, task = moved_host()
    notes = Notes()
    predict(host, "m", task, make.table(20), batch_size=8, progress=notes)
    assert notes.texts == ["predict 0/3"]

    class Nothing(make.Classify):
        def features(self, table: Any) -> Any:
            return []

    with pytest.raises(DataError, match="no examples: the table has 20 rows"):
        predict(host, "m", Nothing(), make.table(20))


@pytest.mark.parametrize(
    ("values", "labels", "only"),
    [
        (["a"] * 10, ("a", "b"), "a"),
        (["a"] * 9, ("a", "b"), None),
        (["a"] * 10, ("a",), None),
        (["a"] * 10, None, None),
        (["a"] * 9 + ["b"], ("a", "b"), None),
        ([["O", "O"]] * 5, ("O", "B"), "O"),
        ([["O", "O"]] * 5 + [["B"]], ("O", "B"), None),
        ([[]] * 10, ("O", "B"), None),
    ],
)
def test_collapse(values: list[Any], labels: tuple[str, ...] | None, only: str | None) -> None:
    assert collapsed([Prediction(i, value) for i, value in enumerate(values)], labels) == only
