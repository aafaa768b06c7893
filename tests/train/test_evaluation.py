"""Predictions come in row order, whatever the batches; nothing of the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from intarsia.methods import build
from intarsia.train.collapse import only_answer
from intarsia.train.evaluation import Evaluation, evaluate
from intarsia.train.task import Prediction
from tests.train import make


def moved_host() -> tuple[Any, Any]:
    host, task = make.host("classify")
    with torch.no_grad():
        for seed, parameter in enumerate(host.parameters("m").values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return host, task


def run(host: Any, task: Any, expression: str, data: Any, **more: Any) -> Evaluation:
    return evaluate(host, expression, task, data, task.features(data), **more)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_change_no_answer(size: int) -> None:
    host, task = moved_host()
    data = make.table(20)
    found = run(host, task, "m", data, batch_size=size).predictions
    assert [p.row for p in found] == list(range(20))
    with torch.no_grad(), host.using("m") as model:
        for prediction, feature in zip(found, task.features(data)):
            logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0]
            assert prediction.value == make.LABELS[int(logits.argmax())]
    assert len({p.value for p in found}) > 1


def test_scores_and_the_mean_loss() -> None:
    host, task = moved_host()
    data = make.table(20)
    found = run(host, task, "m", data, batch_size=6)
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
    assert run(host, task, "m", data).loss == run(host, task, "m", data).loss
    assert [module.training for module in host.model.modules()] == before
    assert all(parameter.grad is None for parameter in host.model.parameters())


def test_masks_are_the_same_in_every_evaluation() -> None:
    host, task = make.host("mlm")
    task.epoch = 3
    data = make.table(12)
    assert run(host, task, "m", data).loss == run(host, task, "m", data).loss
    assert {epoch for epoch, _ in task.collated} == {None} and task.epoch == 3


def test_the_head_that_answers_can_be_named() -> None:
    host, task = moved_host()
    host.add("second", build("lora").with_head(task.head))
    data = make.table(12)
    alone = run(host, task, "m", data).predictions
    assert run(host, task, "second >> m", data, head="m").predictions == alone
    assert run(host, task, "second >> m", data, head="second").predictions != alone


def test_a_task_may_ask_the_model_in_its_own_way() -> None:
    class Generating(make.Classify):
        def outputs(self, model: Any, batch: Any) -> Any:
            logits = torch.zeros(len(batch["row"]), 3)
            logits[:, 2] = 1.0
            return {"logits": logits}

    host, _ = moved_host()
    assert {p.value for p in run(host, Generating(), "m", make.table(12)).predictions} == {"third"}


@pytest.mark.parametrize(
    ("values", "only"),
    [(["a"] * 10, "a"), (["a"] * 9, None), (["a"] * 9 + ["b"], None), ([["O", "O"]] * 5, "O"), ([["O", "O"]] * 5 + [["B"]], None), ([[]] * 10, None)],
)
def test_collapse(values: list[Any], only: str | None) -> None:
    assert only_answer([Prediction(i, value) for i, value in enumerate(values)]) == only
