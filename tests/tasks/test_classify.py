"""Sequence classification and regression: losses equal those of transformers, decoding, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from intarsia.data import Table
from intarsia.errors import CompositionError, DataError, ModuleError
from intarsia.tasks import build
from tests import zoo
from tests.tasks import toys

TEXTS = ["ab cd", "a", "the cat sat on it", ""]
LABELS = ["x", "y", "z", "x"]


def bert(labels: int, **more: Any) -> Any:
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(zoo.config("bert", num_labels=labels, **more)).eval()
    zoo.perturb_(model)
    return model


def batch_of(task: Any, table: Any) -> dict[str, Any]:
    found: dict[str, Any] = task.collate(task.features(table))
    return found


def inputs(task: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {key: batch[key] for key in task.keys}


def test_single_label_loss_is_that_of_transformers() -> None:
    table = Table.of({"text": TEXTS, "label": LABELS})
    task = build("classify", toys.wordpiece(), table=table)
    model, batch = bert(3, problem_type="single_label_classification"), batch_of(task, table)
    outputs = model(**inputs(task, batch), labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == 4
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-6, atol=0)


def test_multi_label_loss_is_that_of_transformers() -> None:
    table = Table.of({"text": TEXTS, "label": ["x,y", "", "z", " y , z "]})
    task = build("classify", toys.wordpiece(), table=table, settings={"problem": "multi"})
    assert task.labels.names == ("x", "y", "z")
    model, batch = bert(3, problem_type="multi_label_classification"), batch_of(task, table)
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]]
    outputs = model(**inputs(task, batch), labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == 12
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-6, atol=0)


def test_regression_loss_is_that_of_transformers() -> None:
    table = Table.of({"text": TEXTS, "value": ["1.5", "-2", "1e1", "0"]})
    task = build("regress", toys.wordpiece(), table=table)
    model, batch = bert(1, problem_type="regression"), batch_of(task, table)
    outputs = model(**inputs(task, batch), labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == 4
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-6, atol=0)


def test_label_smoothing_is_that_of_the_trainer() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    table = Table.of({"text": TEXTS, "label": LABELS})
    task = build("classify", toys.wordpiece(), table=table, settings={"label_smoothing": 0.1})
    model, batch = bert(3), batch_of(task, table)
    outputs = model(**inputs(task, batch))
    loss, count = task.loss(outputs, batch)
    smoothed = LabelSmoother(0.1)(outputs, batch["labels"])
    torch.testing.assert_close(loss / count, smoothed, rtol=1e-6, atol=0)
    # what is reported of an evaluation is not smoothed
    plain = build("classify", toys.wordpiece(), table=table).loss(outputs, batch)[0].item()
    assert sum(p.scores["loss"] for p in task.predict(outputs, batch)) == pytest.approx(plain, rel=1e-6)


def test_label_smoothing_of_several_labels_moves_every_target_towards_one_half() -> None:
    task = build("classify", toys.wordpiece(), labels=["x", "y"], settings={"problem": "multi", "label_smoothing": 0.2})
    batch = batch_of(task, [{"text": "a", "label": "x"}])
    logits = torch.tensor([[1.5, -0.5]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[0.9, 0.1]]), reduction="sum")
    torch.testing.assert_close(task.loss({"logits": logits}, batch)[0], expected)


def test_losses_are_fp32_under_bf16() -> None:
    table = Table.of({"text": TEXTS, "label": LABELS})
    task = build("classify", toys.wordpiece(), table=table)
    batch = batch_of(task, table)
    logits = torch.randn(4, 3).bfloat16()
    loss, _ = task.loss({"logits": logits}, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss({"logits": logits.float()}, batch)[0], rtol=0, atol=0)


def test_predictions_are_names_with_probabilities() -> None:
    task = build("classify", toys.wordpiece(), labels=["no", "yes"])
    batch = batch_of(task, [{"text": "a"}, {"text": "b"}])
    assert "labels" not in batch
    first, second = task.predict({"logits": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}, batch)
    assert (first.value, second.value) == ("no", "yes") and first.scores == {}
    assert first.probabilities == pytest.approx({"no": 0.880797, "yes": 0.119203})


def test_several_labels_from_a_threshold() -> None:
    task = build("classify", toys.wordpiece(), labels=["a", "b", "c"], settings={"problem": "multi", "threshold": 0.6})
    batch = batch_of(task, [{"text": "x"}])
    (found,) = task.predict({"logits": torch.tensor([[1.0, 0.2, 3.0]])}, batch)
    assert found.value == ["a", "c"]


def test_each_row_is_read_with_its_own_names() -> None:
    """Heads of different sizes come as a tuple, of one size but other labels as a tensor with names."""
    from intarsia.data import LabelMap

    task = build("classify", toys.wordpiece(), labels=["no", "yes"])
    batch = batch_of(task, [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    batch["names"] = [None, LabelMap(("x", "y", "z")), LabelMap(("yes", "no"))]
    logits = (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert [p.value for p in task.predict({"logits": logits}, batch)] == ["yes", "z", "no"]
    with pytest.raises(ModuleError, match="2 outputs came for 3 labels"):
        task.predict({"logits": (logits[0], logits[0], logits[0])}, batch)
    with pytest.raises(CompositionError, match="different label sets"):
        task.loss({"logits": logits}, {**batch, "labels": torch.zeros(3, dtype=torch.long)})


def test_no_logits_is_said() -> None:
    task = build("classify", toys.wordpiece(), labels=["no", "yes"])
    with pytest.raises(CompositionError, match="no logits"):
        task.predict(SimpleNamespace(last_hidden_state=None), batch_of(task, [{"text": "a"}]))


def test_an_unseen_label_is_refused_with_the_difference() -> None:
    train = Table.of({"text": ["a", "b"], "label": ["sports", "travel"]})
    dev = Table.of({"text": ["a", "b"], "label": ["sports", "Travel"]})
    task = build("classify", toys.wordpiece(), table=train)
    with pytest.raises(
        DataError, match=r"<memory> row 2: .*'Travel' \(1x\); did you mean 'travel'.*not here: 'travel'"
    ):
        task.features(dev)
    assert len(task.features(dev, labelled=False)) == 2


def test_labels_that_look_like_numbers_stay_names() -> None:
    table = Table.of({"text": ["a", "b", "c"], "label": ["1", "0", "007"]})
    task = build("classify", toys.wordpiece(), table=table)
    assert set(task.labels) == {"0", "1", "007"} and task.head.labels == task.labels.names
    predictions = task.predict({"logits": torch.eye(3)}, batch_of(task, table))
    assert all(isinstance(p.value, str) for p in predictions)


def test_the_order_of_labels_does_not_depend_on_the_rows() -> None:
    one = Table.of({"text": ["a", "b"], "label": ["y", "x"]})
    two = Table.of({"text": ["b", "a"], "label": ["x", "y"]})
    assert (
        build("classify", toys.wordpiece(), table=one).labels == build("classify", toys.wordpiece(), table=two).labels
    )


def test_training_without_labels_is_refused() -> None:
    task = build("classify", toys.wordpiece(), labels=["a", "b"])
    batch = batch_of(task, [{"text": "x"}])
    with pytest.raises(DataError, match="no labels to learn from; the table needs 'label'"):
        task.terms(batch)
    with pytest.raises(DataError, match="no labels to learn from"):
        task.loss({"logits": torch.zeros(1, 2)}, batch)


def test_one_class_only_is_refused_as_training_data_but_not_by_name() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        build("classify", toys.wordpiece(), table=Table.of({"text": ["a"], "label": ["x"]}))
    task = build("classify", toys.wordpiece(), labels=["x"])
    batch = batch_of(task, Table.of({"text": ["a"], "label": ["x"]}))
    loss, count = task.loss({"logits": torch.zeros(1, 1)}, batch)
    assert float(loss) == 0 and int(count) == 1


def test_a_pair_without_its_column_is_refused() -> None:
    task = build("classify", toys.wordpiece(), labels=["a", "b"], columns={"text": "premise", "pair": "hypothesis"})
    with pytest.raises(DataError, match="no column 'hypothesis'"):
        task.features([{"premise": "a"}])
    (feature,) = task.features([{"premise": "a", "hypothesis": "b"}])
    assert feature["input_ids"] == toys.wordpiece()("a", "b")["input_ids"]


def test_the_prefix_stands_before_the_text() -> None:
    task = build("classify", toys.wordpiece(), labels=["a", "b"], settings={"prefix": "query. "})
    assert task.features([{"text": "ab"}])[0]["input_ids"] == toys.wordpiece()("query. ab")["input_ids"]


def test_padding_on_either_side() -> None:
    rows = [{"text": "ab"}, {"text": "a"}]
    right = batch_of(build("classify", toys.wordpiece(), labels=["a", "b"]), rows)
    left = batch_of(build("classify", toys.wordpiece(), labels=["a", "b"], settings={"padding": "left"}), rows)
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert left["input_ids"].tolist()[1] == [0, 1, 5, 2]
    assert (
        batch_of(build("classify", toys.bytelevel(), labels=["a", "b"]), [{"text": "ab the"}, {"text": ""}])[
            "attention_mask"
        ][1].sum()
        == 1
    )
