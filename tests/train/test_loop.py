"""A whole training: what it changes, what it leaves alone, what it writes down, when it stops."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from intarsia.errors import CompositionError, DataError, TrainingError, UsageError
from intarsia.methods import build
from intarsia.modules import NOT_EVALUATED, load
from intarsia.patches import Head
from intarsia.train import Recipe, train
from intarsia.train.frozen import Frozen, sha256
from tests.train import make
from tests.train.test_resume import Notes

SHORT = Recipe(max_steps=3, batch_size=8, learning_rate=1e-2)


def everything(host: Any) -> dict[str, str]:
    return {key: sha256(tensor) for key, tensor in host.model.state_dict().items()}


def test_it_learns() -> None:
    host, task = make.host("classify")
    result = train(host, "m", task, make.table(96), make.table(48, seed=1), recipe=Recipe(epochs=8, batch_size=16, learning_rate=2e-2))
    assert result.metrics["accuracy"]["value"] > 0.9 and result.steps == 48 and not result.warnings
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", ["lora", "bitfit", "houlsby", "full", "head", "prefix"])
def test_all_and_only_the_module_changes(method: str) -> None:
    host, task = make.host("classify", method, base_dropout=True)
    host.add("other", build("lora"))
    before, flags = everything(host), {n: p.requires_grad for n, p in host.model.named_parameters()}
    training = [m.training for m in host.model.modules()]
    mine = {key for key, tensor in host.model.state_dict(keep_vars=True).items() if any(tensor is t for t in host.tensors("m").values())}
    start = {key: tensor.detach().clone() for key, tensor in host.tensors("m").items()}
    train(host, "m", task, make.table(24), recipe=SHORT)
    after = everything(host)
    assert {key for key in before if before[key] != after[key]} <= mine and before.keys() == after.keys()
    changed = {key for key, tensor in host.tensors("m").items() if not torch.equal(tensor, start[key])}
    assert changed >= host.parameters("m").keys() - _without_gradient(host)
    assert {n: p.requires_grad for n, p in host.model.named_parameters()} == flags
    assert [m.training for m in host.model.modules()] == training
    assert all(p.grad is None for p in host.model.parameters())


def _without_gradient(host: Any) -> set[str]:
    """A key's bias shifts all scores of a query alike, and the pooler is not read: their gradients are rounding noise or none."""
    return {key for key in host.parameters("m") if ".k.bias" in key or key.startswith("pooler")}


def test_a_change_of_the_base_is_noticed() -> None:
    class Vandal(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            host.model.embeddings.word_embeddings.weight.data[7, 3] += 1e-7

    host, task = make.host("classify")
    with pytest.raises(TrainingError, match=r"training changed 1 tensors that must stay.*word_embeddings\.weight"):
        train(host, "m", task, make.table(24), recipe=SHORT, callbacks=[Vandal()])


def test_every_byte_counts() -> None:
    host, _ = make.host("classify")
    frozen = Frozen(host, "m")
    frozen.verify()
    weight = host.model.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(math.inf))
    with pytest.raises(TrainingError, match=r"layer\.1\.output\.dense\.weight"):
        frozen.verify()


def test_the_same_seed_gives_the_same_module_and_another_does_not() -> None:
    def digest(seed: int, noise: int) -> str:
        torch.manual_seed(noise)
        host, task = make.host("classify", base_dropout=True)
        return train(host, "m", task, make.table(24), recipe=replace(SHORT, seed=seed)).module.digest

    assert digest(0, noise=1) == digest(0, noise=2) != digest(1, noise=1)


def test_random_states_of_the_caller_are_given_back() -> None:
    host, task = make.host("classify", base_dropout=True)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[index]
    train(host, "m", task, make.table(24), make.table(8), recipe=SHORT)
    after = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_evaluating_changes_nothing() -> None:
    def digest(**more: Any) -> str:
        host, task = make.host("classify", base_dropout=True)
        dev = make.table(8) if more else None
        return train(host, "m", task, make.table(24), dev, recipe=replace(SHORT, select_best=False, **more)).module.digest

    assert digest() == digest(eval_every=1)


# -- what is given back ------------------------------------------------------------------------------------------------


class Scripted(make.Classify):
    """A task whose dev metric is what a test wants it to be."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def score(self, predictions: Any, table: Any) -> dict[str, Any]:
        return {"accuracy": make.Score(self.values.pop(0), 0.0, 1.0, len(predictions))}


class Snapshots(TrainerCallback):
    """The module's tensors after each step."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seen[state.global_step] = {key: tensor.detach().clone() for key, tensor in self.host.tensors("m").items()}


def scripted(values: tuple[float, ...], recipe: Recipe) -> tuple[Any, Snapshots, Any]:
    host, _ = make.host("classify")
    snapshots = Snapshots(host)
    result = train(host, "m", Scripted(*values), make.table(24), make.table(8), recipe=recipe, callbacks=[snapshots])
    return result, snapshots, host


@pytest.mark.parametrize(
    ("values", "best"), [((0.1, 0.5, 0.3), 2), ((0.5, 0.5, 0.4), 1), ((math.nan, 0.2, math.nan), 2), ((0.1, 0.2, 0.3), 3)]
)
def test_the_best_tensors_are_given_back(values: tuple[float, ...], best: int) -> None:
    result, snapshots, host = scripted(values, replace(SHORT, eval_every=1))
    assert result.best_step == best and result.metrics["accuracy"] == {"value": values[best - 1], "low": 0.0, "high": 1.0, "n": 8}
    for key, tensor in snapshots.seen[best].items():
        assert torch.equal(result.module.tensors[key], tensor) and torch.equal(host.tensors("m")[key], tensor)


def test_the_last_ones_if_asked_for_or_if_no_metric_is_defined() -> None:
    for values, recipe in (((0.3, 0.2, 0.1), replace(SHORT, eval_every=1, select_best=False)), ((math.nan,) * 3, replace(SHORT, eval_every=1))):
        result, snapshots, _ = scripted(values, recipe)
        assert result.best_step == 3
        assert all(torch.equal(result.module.tensors[key], tensor) for key, tensor in snapshots.seen[3].items())


def test_lower_may_be_better() -> None:
    class Loss(Scripted):
        higher_is_better = False

    host, _ = make.host("classify")
    assert train(host, "m", Loss(0.3, 0.1, 0.2), make.table(24), make.table(8), recipe=replace(SHORT, eval_every=1)).best_step == 2


def test_training_stops_early() -> None:
    result, _, _ = scripted((0.1, 0.3, 0.2, 0.3, 9.9), replace(SHORT, eval_every=1, patience=2, max_steps=50))
    assert result.steps == 4 and result.best_step == 2


def test_a_plain_form_is_given_where_the_method_says_so() -> None:
    host, task = make.host("classify", "prefix", reparameterise=8, length=3)
    result = train(host, "m", task, make.table(24), recipe=SHORT)
    fresh, _ = make.host("classify")
    fresh.insert(result.module, name="plain")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), host.using("m") as a:
        first = a(input_ids=ids).logits
    with torch.no_grad(), fresh.using("plain") as b:
        second = b(input_ids=ids).logits
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert not any("tied" in key for key in result.module.tensors)


# -- an expression -----------------------------------------------------------------------------------------------------


def test_one_module_of_an_expression_is_trained_on_top_of_the_others() -> None:
    host, task = make.host("classify")
    host.add("swh", build("pfeiffer", width=4))
    with torch.no_grad():
        for parameter in host.parameters("swh").values():
            parameter.add_(0.3)
    language = host.extract("swh")
    result = train(host, "m", task, make.table(24), recipe=SHORT, expression="swh >> m")
    assert host.extract("swh").digest == language.digest and result.module.requires == (language.digest,)
    alone, task = make.host("classify")
    assert train(alone, "m", task, make.table(24), recipe=SHORT).module.digest != result.module.digest


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    host, task = make.host("classify")
    host.add("swh", build("lora"))
    host.add("labels", build("lora").with_head(Head(("x", "y", "z"))))
    mlm = make.Masked()
    data, folder = make.table(8), tmp_path / "run"
    for error, words, arguments in (
        (UsageError, "does not name the module 'm'", ("m", task, "swh")),
        (CompositionError, "no module 'swa'", ("m", task, "swa >> m")),
        (CompositionError, "no module 'n'", ("n", task, None)),
        (UsageError, "needs a head and module 'swh' has none", ("swh", task, None)),
        (UsageError, "answered by the base's own head", ("m", mlm, None)),
        (UsageError, "are not those of module 'labels'", ("labels", task, None)),
    ):
        with pytest.raises(error, match=words):
            train(host, arguments[0], arguments[1], data, expression=arguments[2], run_dir=folder)
    with pytest.raises(UsageError, match="needs the run directory"):
        train(host, "m", task, data, resume=True)
    assert not folder.exists()


def test_no_examples_are_an_error() -> None:
    class Nothing(make.Classify):
        def features(self, table: Any) -> Any:
            return []

    host, _ = make.host("classify")
    with pytest.raises(DataError, match="no training examples: the table has 8 rows"):
        train(host, "m", Nothing(), make.table(8))


# -- trouble -----------------------------------------------------------------------------------------------------------


class Poisoned(make.Classify):
    """The loss of row 5 is not a number."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        total, terms = super().loss(outputs, batch)
        return (total * math.nan if 5 in batch["row"] else total), terms


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path: Path) -> None:
    host, _ = make.host("classify")
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+ \(learning rate 0\.0\d*\); rows .*\b5\b") as caught:
        train(host, "m", Poisoned(), make.table(24), recipe=replace(SHORT, accumulation=8), run_dir=tmp_path)
    assert ": 5. No step was taken" in str(caught.value)
    facts = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert facts["status"] == "failed" and "nan" in facts["error"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in host.tensors("m").values())


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    class Steep(make.Classify):
        def loss(self, outputs: Any, batch: Any) -> Any:
            logits = outputs["logits"]
            return super().loss(outputs, batch)[0] + (logits - logits.detach()).abs().sqrt().sum(), torch.tensor(len(logits))

    host, _ = make.host("classify")
    with pytest.raises(TrainingError, match="the gradient is not finite at step 1"):
        train(host, "m", Steep(), make.table(24), recipe=SHORT)


def test_predictions_that_collapse_to_one_class_are_said() -> None:
    class Constant(make.Classify):
        def value(self, best: torch.Tensor) -> Any:
            return "odd"

    host, _ = make.host("classify")
    notes = Notes()
    with pytest.warns(UserWarning, match=r"all dev predictions of 'm' are 'odd'.*head_learning_rate \(it is 0\.005\)"):
        result = train(host, "m", Constant(), make.table(24), make.table(12), recipe=SHORT, progress=notes)
    assert "collapsed" in result.warnings[0] and result.module.card.warnings == result.warnings
    assert any("all 12 dev predictions are 'odd'" in note for note in notes.texts)


# -- ways to compute ---------------------------------------------------------------------------------------------------


def trained(**more: Any) -> dict[str, torch.Tensor]:
    host, task = make.host("tag", base_dropout=more.pop("noisy", False))
    recipe = replace(SHORT, optimiser="sgd", learning_rate=0.5, head_learning_rate=0.5, **more)
    return dict(train(host, "m", task, make.table(24), recipe=recipe).module.tensors)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, recomputed = trained(), trained(gradient_checkpointing=True)
    for key, tensor in plain.items():
        torch.testing.assert_close(recomputed[key], tensor, rtol=1e-5, atol=1e-7)
    host, task = make.host("tag")
    train(host, "m", task, make.table(8), recipe=replace(SHORT, gradient_checkpointing=True))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in host.model.modules())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], tensor) for key, tensor in b.items())


def test_dropout_of_the_base_can_be_switched_off() -> None:
    quiet = trained()
    assert same(trained(base_dropout=False, noisy=True), quiet) and not same(trained(noisy=True), quiet)


def test_dropout_of_the_module_stays_on_without_that_of_the_base() -> None:
    def digest(rate: float) -> str:
        host, task = make.host("classify", "lora", dropout=rate)
        return str(train(host, "m", task, make.table(24), recipe=replace(SHORT, base_dropout=False)).module.tensors)

    assert digest(0.5) != digest(0.0)


def test_bfloat16_computes_about_the_same() -> None:
    exact, rough = trained(), trained(precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in rough.values())
    assert any(not torch.equal(rough[key], tensor) for key, tensor in exact.items())
    for key, tensor in exact.items():
        torch.testing.assert_close(rough[key], tensor, rtol=0.1, atol=0.05)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_module_knows_how_it_came_about(tmp_path: Path) -> None:
    host, task = make.host("classify")
    data, dev = make.table(24), make.table(12, seed=1)
    result = train(host, "m", task, data, dev, recipe=replace(SHORT, epochs=2), run_dir=tmp_path)
    assert result.path is not None and load(result.path) == result.module
    card = result.module.card
    assert [(d.sha256, d.rows) for d in card.data] == [(data.digest, 24), (dev.digest, 12)]
    assert card.method == "lora" and card.task == "classify" and card.bias_evaluation == NOT_EVALUATED
    assert card.recipe["learning_rate"] == 1e-2 and card.recipe["head_learning_rate"] == 5e-3 and card.recipe["best_step"] == result.best_step
    assert [(m.name, m.split, m.value, m.seeds) for m in card.metrics] == [("accuracy", "dev", result.metrics["accuracy"]["value"], (0,))]
    assert card.cost is not None and card.cost.trainable == sum(p.numel() for p in host.parameters("m").values())
    assert card.cost.seconds is not None and card.cost.seconds > 0
    assert result.module.context == {"task": {"name": "classify"}}


def test_the_record_of_a_run(tmp_path: Path) -> None:
    host, task = make.host("classify")
    result = train(host, "m", task, make.table(24), make.table(12), recipe=SHORT, run_dir=tmp_path, config={"name": "m"})
    facts = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert facts["status"] == "finished" and facts["result"]["digest"] == result.module.digest and facts["world"] == 1
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    assert facts["base"] == host.fingerprint.to_dict() and facts["train"] == make.table(24).digest and facts["config"] == {"name": "m"}
    assert facts["recipe"]["batch_size"] == 8 and facts["rates"]["head"]["learning_rate"] == 5e-3 and facts["machine"]["threads"] >= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines == [dict(entry) for entry in result.history]
    assert [e["step"] for e in lines if "loss" in e] == [1, 3] and [e["step"] for e in lines if "dev" in e] == [3]
    assert {"epoch", "learning_rate", "head_learning_rate", "gradient_norm", "seconds"} <= lines[0].keys()
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob(".*"))


def test_the_learning_rate_in_the_log_is_the_one_used() -> None:
    host, task = make.host("classify")
    recipe = Recipe(max_steps=4, batch_size=8, learning_rate=1e-2, warmup=0.5, log_every=1)
    history = train(host, "m", task, make.table(24), recipe=recipe).history
    assert [entry["learning_rate"] for entry in history] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 5e-3])


def test_curve_is_drawn_with_its_numbers(tmp_path: Path) -> None:
    host, task = make.host("classify")
    train(host, "m", task, make.table(24), make.table(12), recipe=replace(SHORT, eval_every=1), run_dir=tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "curve.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows if r["dev_metric"]] == ["1", "2", "3"] and [r["step"] for r in rows if r["loss"]] == ["1", "3"]
    assert "MPLBACKEND" not in os.environ


def test_the_host_knows_what_training_knows() -> None:
    """`host.extract` after a training gives the result's module: same identity, same card, same task settings."""
    host, task = make.host("classify")
    result = train(host, "m", task, make.table(24), recipe=SHORT)
    again = host.extract("m")
    assert again.digest == result.module.digest and again.card == result.module.card
    assert again.context["task"] == task.settings()
