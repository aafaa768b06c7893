"""The tasks of `intarsia.tasks` under this trainer: equal updates, exact resume, and a module that knows its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia import tasks
from intarsia.data import Table
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import load
from intarsia.train import Interrupted, Recipe, train
from tests import zoo
from tests.tasks import toys
from tests.train.make import NO_DROPOUT
from tests.train.test_resume import SignalAfter
from tests.train.test_step import assert_same_update

WORDS = ("ab", "cat", "on", "the", "mat", "zebra", "dog", "fox", "jumps", "over")
SENTENCES = [" ".join(WORDS[(i * j + i) % 10] for j in range(1, 2 + i % 6)) for i in range(16)]
TOPICS = Table.of({"text": SENTENCES, "label": [("news", "sport", "travel")[len(s) % 3] for s in SENTENCES]})
TAGS = Table.of({"tokens": [s.split() for s in SENTENCES], "tags": [["B-PER" if "a" in w else "O" for w in s.split()] for s in SENTENCES]})
PAIRS = Table.of({"source": SENTENCES, "target": [s[::-1] for s in SENTENCES]})
GPT2 = {"vocab_size": 300, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

#: task -> its settings, tokenizer, table, family, whether the base comes without its head, settings of the model
CASES: Mapping[str, tuple[str, Mapping[str, Any], Any, Table, str, bool, Mapping[str, Any]]] = {
    "classify": ("classify", {"dropout": 0.0}, toys.wordpiece(), TOPICS, "bert", True, NO_DROPOUT["bert"]),
    "tag": ("tag", {"dropout": 0.0}, toys.wordpiece(), TAGS, "bert", True, NO_DROPOUT["bert"]),
    "mlm": ("mlm", {}, toys.wordpiece(), TOPICS, "bert", False, NO_DROPOUT["bert"]),
    "mlm-new-head": ("mlm", {"lm_head": "new"}, toys.wordpiece(), TOPICS, "bert", True, NO_DROPOUT["bert"]),
    "clm": ("clm", {"text": "text"}, toys.bytelevel(), TOPICS, "gpt2", False, GPT2),
    "seq2seq": (
        "seq2seq", {"source_language": "eng_Latn", "target_language": "swh_Latn", "generate": False}, toys.nllb(), PAIRS, "m2m_100", False,
        NO_DROPOUT["m2m_100"],
    ),
}  # fmt: skip


def made(case: str) -> tuple[Host, Any, Table]:
    name, settings, tokenizer, table, family, headless, model_settings = CASES[case]
    model, _ = zoo.make(family, headless=headless, **model_settings)
    task = tasks.build(name, tokenizer, table=table, settings=settings, model=model)
    host = Host(model)
    method = build("lora", rank=2)
    host.add("m", method if task.head is None else method.with_head(task.head))
    return host, task, table


def update(case: str, accumulation: int) -> dict[str, torch.Tensor]:
    host, task, table = made(case)
    start = {key: tensor.detach().clone() for key, tensor in host.tensors("m").items()}
    recipe = Recipe(learning_rate=0.3, head_learning_rate=0.3, optimiser="sgd", clip=None, warmup=0.0, epochs=1, accumulation=accumulation)
    result = train(host, "m", task, table, recipe=recipe)
    return {key: tensor - start[key] for key, tensor in result.module.tensors.items() if not torch.equal(tensor, start[key])}


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case: str) -> None:
    assert_same_update(update(case, 4), update(case, 1))


@pytest.mark.parametrize("case", ["mlm", "seq2seq"])
def test_resume_is_exact(case: str, tmp_path: Path) -> None:
    def run(**more: Any) -> Any:
        host, task, table = made(case)
        return train(host, "m", task, table, recipe=Recipe(epochs=2, batch_size=6, learning_rate=1e-2), **more)

    with pytest.raises(Interrupted):
        run(run_dir=tmp_path, callbacks=[SignalAfter(4)])
    assert run(run_dir=tmp_path, resume=True).module.digest == run().module.digest


@pytest.mark.parametrize("case", CASES)
def test_the_module_is_evaluated_from_its_file_alone(case: str, tmp_path: Path) -> None:
    host, task, table = made(case)
    dev = table[:8]
    result = train(host, "m", task, table, dev, recipe=Recipe(max_steps=2, learning_rate=1e-2), run_dir=tmp_path)
    fresh, _, _ = made(case)
    fresh.insert(load(tmp_path / "module.safetensors"), name="stored")
    again = tasks.from_module(result.module, CASES[case][2], model=fresh.model)
    found = tasks.evaluate(fresh, "stored", again, dev, batch_size=64).metrics
    assert found.keys() == result.metrics.keys()
    for metric, score in found.items():
        expected = result.metrics[metric]
        assert (score.value, score.low, score.high, score.size) == pytest.approx(tuple(expected.values()), rel=1e-5)


def test_masks_change_from_epoch_to_epoch_and_not_in_evaluation() -> None:
    host, task, table = made("mlm")
    recipe = Recipe(epochs=3, learning_rate=1e-12, warmup=0.0, schedule="constant", log_every=1)
    history = train(host, "m", task, table, table, recipe=recipe).history
    assert len({round(e["loss"], 4) for e in history if "loss" in e}) == 3
    assert len({round(e["dev_loss"], 4) for e in history if "dev" in e}) == 1


def test_prefixed_settings_reach_the_card() -> None:
    host, _, table = made("classify")
    task = tasks.build("classify", CASES["classify"][2], table=table, settings={"prefix": "query: ", "dropout": 0.0}, model=host.model)
    module = train(host, "m", task, table, recipe=replace(Recipe(), max_steps=1)).module
    assert module.context["task"]["prefix"] == "query: " and module.context["task"]["name"] == "classify"
