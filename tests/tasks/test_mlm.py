"""Masked language modelling: which pieces are hidden, and the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.patches import LanguageModelHead
from intarsia.tasks import build
from intarsia.tasks.mlm import choose
from tests import zoo
from tests.tasks import toys

TOKENIZER = toys.wordpiece()
LONG = "the cat sat on a mat and it was fat " * 5


def make(**options: Any) -> Any:
    return build("mlm", TOKENIZER, settings=options)


def feature(task: Any, text: str = LONG, row: int = 0) -> dict[str, Any]:
    return {**task.features([{"text": text}])[0], "row": row}


@pytest.mark.parametrize(
    "family", ["bert", "xlm-roberta", "distilbert", "modernbert", "electra", "albert", "deberta-v2"]
)
def test_the_loss_is_that_of_transformers(family: str) -> None:
    model, _ = zoo.make(family)
    tokenizer = toys.unigram(48)
    table = Table.of({"text": ["the ab cd", "a b c d e f", "x", ""]})
    task = build("mlm", tokenizer, table=table, model=model, settings={"rate": 0.4})
    batch = task.collate(task.features(table))
    outputs = model(**{key: batch[key] for key in task.keys}, labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == int((batch["labels"] != -100).sum()) > 0
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-5, atol=0)


def test_masks_are_a_function_of_seed_epoch_row_and_window() -> None:
    task = make(rate=0.5)
    task.epoch = 3
    one = task.masked(feature(task))
    other = make(rate=0.5)
    other.epoch = 0
    other.collate([feature(other, row=i) for i in range(5)])  # whatever was drawn before
    other.epoch = 3
    assert other.masked(feature(other)) == one
    different = [make(rate=0.5, seed=1), make(rate=0.5), make(rate=0.5)]
    different[0].epoch, different[1].epoch = 3, 4
    assert all(t.masked(feature(t)) != one for t in different)
    assert task.masked(feature(task, row=1)) != one
    assert task.masked({**feature(task), "window": 1}) != one


def test_masks_do_not_depend_on_the_batch() -> None:
    task = make(rate=0.3)
    rows = [feature(task, text, row) for row, text in enumerate(["the cat", LONG, "a b c d"])]
    whole = task.collate(rows)
    for i, row in enumerate(rows):
        alone = task.collate([row])
        width = alone["input_ids"].shape[1]
        assert whole["input_ids"][i, :width].tolist() == alone["input_ids"][0].tolist()
        assert whole["labels"][i, :width].tolist() == alone["labels"][0].tolist()


def test_random_state_of_others_is_left_alone() -> None:
    task = make()
    before, numbers = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    task.collate([feature(task)])
    assert torch.equal(before, torch.random.get_rng_state()) and (numbers == np.random.get_state()[1]).all()


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abc .ሰ", max_size=60), st.floats(0.01, 1), st.booleans(), st.integers(0, 5))
def test_special_tokens_are_never_hidden_nor_put_in(text: str, rate: float, whole: bool, epoch: int) -> None:
    task = make(rate=rate, random=0.5, hidden=0.5, whole_words=whole)
    task.epoch = epoch
    special = set(TOKENIZER.all_special_ids)
    for one in task.features([{"text": text}]):
        ids, labels = task.masked(one)
        ordinary = [i for i in one["input_ids"] if i not in special]
        hidden = [(was, now, label) for was, now, label in zip(one["input_ids"], ids, labels) if label != -100]
        assert len(hidden) <= len(ordinary) and (len(hidden) > 0) == bool(ordinary)
        for was, now, label in hidden:
            assert label == was and was not in special and (now == TOKENIZER.mask_token_id or now not in special)
        assert all(was == now for was, now, label in zip(one["input_ids"], ids, labels) if label == -100)


def test_eighty_ten_ten() -> None:
    task = make()
    total = masked = kept = 0
    one = feature(task)
    for epoch in range(800):
        task.epoch = epoch
        ids, labels = task.masked(one)
        pairs = [(i, label) for i, label in zip(ids, labels) if label != -100]
        total += len(pairs)
        masked += sum(i == TOKENIZER.mask_token_id for i, _ in pairs)
        kept += sum(i == label for i, label in pairs)
    ordinary = sum(g >= 0 for g in one["group"])
    assert total == 800 * round(0.15 * ordinary)
    assert masked / total == pytest.approx(0.8, abs=0.02)
    assert kept / total == pytest.approx(0.1 + 0.1 / 55, abs=0.02)


def test_every_piece_is_hidden_sometimes() -> None:
    task = make()
    one = feature(task)
    seen = np.zeros(len(one["input_ids"]))
    for epoch in range(200):
        task.epoch = epoch
        seen += np.array(task.masked(one)[1]) != -100
    ordinary = np.array(one["group"]) >= 0
    assert (seen[ordinary] > 0).all() and not seen[~ordinary].any()


def test_whole_words_are_hidden_together() -> None:
    task = make(whole_words=True, rate=0.3)
    one = feature(task)
    group = np.array(one["group"])
    for epoch in range(50):
        task.epoch = epoch
        hidden = np.array(task.masked(one)[1]) != -100
        for word in set(group[group >= 0].tolist()):
            assert len(set(hidden[group == word].tolist())) == 1
        assert 0 < hidden.sum() <= round(0.3 * (group >= 0).sum())


def test_one_long_word_is_hidden_piecewise() -> None:
    group = np.zeros(20, dtype=np.int64)
    assert len(choose(group, 0.15, np.random.default_rng(0))) == 3
    assert len(choose(np.full(4, -1), 0.15, np.random.default_rng(0))) == 0


def test_long_texts_are_cut_into_windows_without_loss() -> None:
    task = make(max_length=20, prefix="the. ")
    features = task.features([{"text": LONG}, {"text": "a"}, {"text": ""}])
    start = len(task.frame.before)
    body = [i for f in features if f["row"] == 0 for i in f["input_ids"][start:-1]]
    assert body == TOKENIZER(LONG, add_special_tokens=False)["input_ids"]
    assert task.counts["split_rows"] == 1 and task.counts["rows"] == 3
    assert all(g == -1 for f in features for g in f["group"][:start])


def test_evaluation_sums_windows_and_scores() -> None:
    model, _ = zoo.make("bert")
    table = Table.of({"text": [LONG, "a b", ""]})
    task = build("mlm", TOKENIZER, model=model, settings={"max_length": 20})
    features = task.features(table)
    batch = task.collate(features)
    with torch.no_grad():
        outputs = task.outputs(model, batch)
    predictions = task.finish(task.predict(outputs, batch), table)
    loss, count = task.loss(outputs, batch)
    assert sum(p.scores["terms"] for p in predictions) == int(count)
    assert sum(p.scores["loss"] for p in predictions) == pytest.approx(float(loss), rel=1e-5)
    scores = task.score(predictions, table)
    assert scores["perplexity"].value == pytest.approx(float((loss / count).exp()), rel=1e-5)
    hits = (outputs.logits.argmax(-1) == batch["labels"]) & (batch["labels"] != -100)
    assert scores["masked_accuracy"].value == pytest.approx(float(hits.sum() / count))
    assert task.higher_is_better is False and make(metric="masked_accuracy").higher_is_better is True
    with pytest.raises(DataError, match="can be hidden"):
        task.score([p for p in predictions if p.row == 2], table)


def test_a_batch_without_anything_to_hide_has_zero_loss_and_a_gradient() -> None:
    model, _ = zoo.make("bert")
    task = build("mlm", TOKENIZER, model=model)
    batch = task.collate(task.features([{"text": ""}]))
    loss, count = task.loss(task.outputs(model, batch), batch)
    loss.backward()
    assert loss.item() == 0 and int(count) == task.terms(batch) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_heads() -> None:
    assert make().head is None and make().model_head == "masked-lm"
    assert isinstance(make(lm_head="new").head, LanguageModelHead) and make(lm_head="new").model_head == "none"


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no mask token"):
        build("mlm", toys.bytelevel())
    with pytest.raises(UsageError, match="rate"):
        make(rate=0.0)
    with pytest.raises(UsageError, match="shares"):
        make(hidden=0.8, random=0.4)
