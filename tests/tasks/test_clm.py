"""Causal language modelling: every piece once, completions only, packing, generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.tasks import build
from tests import zoo
from tests.tasks import toys

BYTES = toys.bytelevel()
TEXTS = st.lists(st.text(alphabet="ab the.\n", max_size=40), min_size=1, max_size=5)


def make(tokenizer: Any = BYTES, **options: Any) -> Any:
    return build("clm", tokenizer, settings=options)


def gpt2() -> Any:
    return zoo.make("gpt2", vocab_size=len(BYTES))[0]


def evaluated(task: Any, model: Any, table: Any) -> list[Any]:
    batch = task.collate(task.features(table))
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        if task.writes:
            outputs["texts"] = task.generate(model, batch)
        found: list[Any] = task.finish(task.predict(outputs, batch), table)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2", "opt", "gpt_neox", "bloom"])
@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_that_of_transformers(family: str, pack: bool) -> None:
    model, _ = zoo.make(family, vocab_size=len(BYTES))
    table = Table.of({"text": ["the ab cd", "a", "x" * 30, ""]})
    task = make(pack=pack, max_length=16)
    batch = task.collate(task.features(table))
    outputs = model(**{key: batch[key] for key in task.keys}, labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch)
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-5, atol=0)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(4, 12), st.booleans(), st.booleans(), st.booleans())
def test_every_piece_is_predicted_once(texts: list[str], length: int, pack: bool, start: bool, end: bool) -> None:
    task = make(pack=pack, max_length=length, start=start, end=end)
    features = task.features(Table.of({"text": texts}))
    assert all(len(f["input_ids"]) <= length for f in features)
    learnt: dict[int, list[int]] = {row: [] for row in range(len(texts))}
    for f in features:
        assert f["labels"][0] == -100
        for owner, label, piece in zip(f["owner"], f["labels"], f["input_ids"]):
            assert label in (-100, piece)
            if label != -100:
                learnt[owner].append(label)
    for row, text in enumerate(texts):
        body = [*BYTES(text)["input_ids"], *([0] if end else [])]
        assert learnt[row] == (body if start else body[1:])
    assert task.terms(task.collate(features)) == sum(map(len, learnt.values()))


def test_packed_and_unpacked_statistics_are_those_of_the_rows() -> None:
    """The first row of a pack sees nothing else, so its likelihood is the same; all rows have the same number of terms."""
    table = Table.of({"text": ["the ab", "a b c", "", "the"]})
    model = gpt2()
    plain, packed = (evaluated(make(pack=pack), model, table) for pack in (False, True))
    assert [p.scores["terms"] for p in plain] == [p.scores["terms"] for p in packed]
    assert packed[0].scores["loss"] == pytest.approx(plain[0].scores["loss"], rel=1e-5)
    assert packed[1].scores["loss"] != pytest.approx(plain[1].scores["loss"], rel=1e-5)


def test_likelihoods_are_the_sum_over_pieces() -> None:
    model, text = gpt2(), "the ab"
    (prediction,) = evaluated(make(end=False), model, Table.of({"text": [text]}))
    ids = torch.tensor([[0, *BYTES(text)["input_ids"]]])
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0]
    expected = sum(float(logs[t, ids[0, t + 1]]) for t in range(ids.shape[1] - 1))
    assert prediction.value == pytest.approx(expected, rel=1e-5)
    scores = make(end=False).score([prediction], Table.of({"text": [text]}))
    assert scores["bits_per_character"].value == pytest.approx(-expected / math.log(2) / len(text), rel=1e-5)
    assert scores["perplexity"].value == pytest.approx(math.exp(-expected / (ids.shape[1] - 1)), rel=1e-5)


def test_only_the_completion_is_learnt() -> None:
    task = make(prompt="q", completion="a")
    (feature,) = task.features([{"q": "the", "a": "ab"}])
    prompt, answer = BYTES("the")["input_ids"], BYTES(" ab")["input_ids"]
    assert feature["input_ids"] == [0, *prompt, *answer, 0]
    assert feature["labels"] == [-100] * (1 + len(prompt)) + [*answer, 0]
    assert task.terms(task.collate([feature])) == len(answer) + 1


def test_long_prompts_lose_their_beginning_and_are_counted() -> None:
    task = make(prompt="q", completion="a", max_length=12)
    (feature,) = task.features([{"q": "xyz" * 10, "a": "abc"}])
    assert len(feature["input_ids"]) == 12 and feature["input_ids"][0] == 0 and task.counts["truncated_prompts"] == 1
    answer = [*BYTES(" abc")["input_ids"], 0]
    assert feature["input_ids"][-len(answer) :] == answer
    assert feature["input_ids"][1 : -len(answer)] == BYTES("xyz" * 10)["input_ids"][-(11 - len(answer)) :]
    (feature,) = task.features([{"q": "xyz", "a": "c" * 50}])
    assert len(feature["input_ids"]) == 12 and task.counts["truncated_completions"] == 1


def test_padding_does_not_change_likelihoods() -> None:
    model = gpt2()
    table = Table.of({"text": ["the ab cd the", "a", ""]})
    together = evaluated(make(), model, table)
    alone = [evaluated(make(), model, table.select([i]))[0] for i in range(3)]
    assert [p.value for p in together] == pytest.approx([p.value for p in alone], rel=1e-5)


def test_generation_is_that_of_each_prompt_alone() -> None:
    model = gpt2()
    table = [{"q": "the ab the", "a": "x"}, {"q": "a", "a": "y"}, {"q": "", "a": ""}]
    task = make(prompt="q", completion="a", generate=True, max_new_tokens=6)
    assert task.metric == "chrf"
    model.generation_config.eos_token_id = 0
    predictions = evaluated(task, model, table)
    for row, prediction in zip(table, predictions):
        ids = torch.tensor([[0, *BYTES(row["q"])["input_ids"]]])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        text = BYTES.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.value == text.removeprefix(" ")
        assert prediction.scores["terms"] > 0
    assert set(task.score(predictions, table)) == {"chrf", "bleu", "perplexity", "bits_per_character"}


def test_the_separator_is_no_part_of_a_generated_completion() -> None:
    class Writer:
        def generate(self, input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
            return torch.cat([input_ids, torch.tensor([BYTES(" ab the")["input_ids"]])], 1)

    task = make(prompt="q", completion="a", generate=True)
    assert task.generate(Writer(), task.collate(task.features([{"q": "the"}]))) == ["ab the"]


def test_losses_are_fp32_under_bf16() -> None:
    task = make()
    batch = task.collate(task.features([{"text": "the ab"}]))
    logits = torch.randn(*batch["input_ids"].shape, len(BYTES), generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = task.loss({"logits": logits}, batch)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss({"logits": logits.float()}, batch)[0], rtol=0, atol=0)


def test_tokenizers_that_add_a_start_token_give_it_once() -> None:
    task = make(toys.unigram())
    (feature,) = task.features([{"text": "ab"}])
    assert feature["input_ids"] == toys.unigram()("ab")["input_ids"]  # <s> ab </s>
    assert feature["labels"] == [-100, *feature["input_ids"][1:]]


def test_smoothing_is_of_training_only() -> None:
    model, table = gpt2(), Table.of({"text": ["the ab"]})
    smooth, plain = make(label_smoothing=0.2), make()
    batch = plain.collate(plain.features(table))
    with torch.no_grad():
        outputs = plain.outputs(model, batch)
    assert float(smooth.loss(outputs, batch)[0]) != pytest.approx(float(plain.loss(outputs, batch)[0]))
    assert smooth.predict(outputs, batch)[0].value == plain.predict(outputs, batch)[0].value


def test_refusals() -> None:
    with pytest.raises(UsageError, match="come together"):
        make(prompt="q")
    with pytest.raises(UsageError, match="pack=True is for plain text"):
        make(prompt="q", completion="a", pack=True)
    with pytest.raises(UsageError, match="needs prompts"):
        make(generate=True)
    with pytest.raises(UsageError, match="no room"):
        make(max_length=3)
    task = make(prompt="q", completion="a")
    (prediction,) = evaluated(task, gpt2(), [{"q": "the"}])
    assert prediction.value is None
    with pytest.raises(DataError, match="nothing to predict"):
        task.score([type(prediction)(0, 0.0, None, {"loss": 0.0, "terms": 0.0, "characters": 0.0})], [{"a": ""}])
