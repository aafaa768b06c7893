"""The states below the first trained block are computed once, and the training is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import SiteError
from intarsia.host import Host, shortcut
from intarsia.methods import build
from intarsia.train import Recipe, train
from intarsia.train import trunk as trunks
from intarsia.train.states import States, bytes_per_token
from intarsia.train.trunk import Trunk, Without, trunk
from tests import zoo
from tests.train import make

RECIPE = Recipe(max_steps=12, batch_size=8, learning_rate=1e-2, log_every=4)


def upper(kind: str, method: str = "lora", layers: str = "1", **settings: Any) -> tuple[Host, Any]:
    return make.host(kind, method, layers=layers, **settings)


@pytest.mark.parametrize("name", zoo.TEXT)
def test_the_parts_of_a_model_give_what_the_whole_gives(name: str) -> None:
    model, batch = zoo.make(name)
    host = Host(model)
    keys, parts = set(model.state_dict()), list(model.modules())
    try:
        path, count = shortcut.blocks(host)
    except SiteError:
        assert model.config.is_encoder_decoder or name == "albert"
        return
    with torch.no_grad():
        whole = model(**batch)[0]
        for k in range(1, count + 1):
            below = shortcut.Upto(model, path, k)
            try:
                below.model(**batch)
            except SiteError:
                assert name == "bloom"
                return
            assert below.states is not None
            above = shortcut.Beyond(model, path, k, below.behind)
            above.put(below.states)
            assert torch.equal(above.model(**batch)[0], whole)
    assert set(model.state_dict()) == keys and list(model.modules()) == parts
    host.close()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["lora", "pfeiffer", "prefix", "head"])
@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_training_is_the_same(kind: str, method: str, accumulation: int) -> None:
    found = {}
    for how in ("off", "fp32"):
        host, task = upper(kind, method) if method != "head" else make.host(kind, "head")
        result = train(host, "m", task, make.table(), recipe=replace(RECIPE, trunk=how, accumulation=accumulation))
        found[how] = result.module.tensors
        host.close()
    for name, tensor in found["off"].items():
        torch.testing.assert_close(found["fp32"][name], tensor, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the shorter model was asked."""
    asked: list[int] = []
    before = Trunk.model

    def model(self: Trunk, batch: Any, examples: Any) -> Any:
        found = before(self, batch, examples)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(Trunk, "model", model)
    return asked


def test_it_is_used_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from intarsia.train.record import read_run

    asked = counted(monkeypatch)
    host, task = upper("classify")
    train(host, "m", task, make.table(), recipe=RECIPE, run_dir=tmp_path / "run")
    assert len(asked) == 1 + RECIPE.max_steps and all(asked)  # the proof, and every step
    facts = read_run(tmp_path / "run")
    assert facts is not None and facts["trunk"]["blocks_left_out"] == 1 and facts["trunk"]["in"] == "memory"


@pytest.mark.parametrize(
    ("kind", "settings", "recipe", "reason"),
    [
        ("classify", {}, {"trunk": "off"}, "switched off"),
        ("classify", {}, {"max_steps": 5}, "less than twice"),
        ("classify", {"layers": None}, {}, "first block"),
        ("classify", {"base_dropout": True}, {}, "dropout"),
        ("mlm", {}, {}, "anew"),
        ("seq2seq", {}, {}, "two stacks"),
        ("classify", {}, {"precision": "bf16"}, "fp32"),
    ],
)
def test_where_it_does_not_hold_it_is_not_used(kind: str, settings: Any, recipe: Any, reason: str) -> None:
    given = {"layers": "1", **settings}
    if given["layers"] is None:
        del given["layers"]
    host, task = make.host(kind, "lora", **given)
    found = trunk(host, "m", task, task.features(make.table()), _ref(), replace(RECIPE, **recipe), recipe.get("max_steps", 12))
    assert isinstance(found, Without) and reason in found.reason
    host.close()


def _ref() -> Any:
    from intarsia.compose import Ref

    return Ref("m")


def test_a_ladder_reads_all_blocks() -> None:
    host, task = make.host("classify", "lst")
    found = trunk(host, "m", task, task.features(make.table()), _ref(), RECIPE, 12)
    assert isinstance(found, Without) and "all blocks" in found.reason


def test_frozen_modules_below_are_part_of_it() -> None:
    found = {}
    for how in ("off", "fp32"):
        host, task = upper("classify")
        host.add("below", build("lora"), seed=3)
        for p in host.parameters("below").values():
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
        result = train(host, "m", task, make.table(), recipe=replace(RECIPE, trunk=how), expression="below >> m")
        found[how] = result.module.tensors
        host.close()
    for name, tensor in found["off"].items():
        torch.testing.assert_close(found["fp32"][name], tensor, atol=2e-5, rtol=1e-4)


def test_a_soft_prompt_below_is_refused() -> None:
    host, task = upper("classify")
    host.add("p", build("prompt"))
    found = trunk(host, "m", task, task.features(make.table()), _expr("p >> m"), RECIPE, 12)
    assert isinstance(found, Without) and "longer" in found.reason
    host.close()


def _expr(text: str) -> Any:
    from intarsia.compose import expr

    return expr(text)


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
def test_a_large_table_lies_in_a_file(kept: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trunks, "MEMORY", 0)
    host, task = upper("classify")
    features = task.features(make.table())
    recipe = replace(RECIPE, trunk=kept)
    first = trunk(host, "m", task, features, _ref(), recipe, 12, folder=tmp_path)
    assert isinstance(first, Trunk) and first.states.path is not None
    assert first.states.path.stat().st_size == len(first.table.ids) * bytes_per_token(zoo.WIDTH, kept)
    again = trunk(host, "m", task, features, _ref(), recipe, 12, folder=tmp_path)  # after an interruption
    assert isinstance(again, Trunk) and again.states.complete and torch.equal(again.states.get(torch.arange(5)), first.states.get(torch.arange(5)))
    again.close(keep=True)
    assert first.states.path.exists()
    again.close()
    assert not list(tmp_path.iterdir())
    host.close()


def test_no_room_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "MEMORY", 0)
    monkeypatch.setattr(trunks, "DISK", 10)
    host, task = upper("classify")
    found = trunk(host, "m", task, task.features(make.table()), _ref(), RECIPE, 12)
    assert isinstance(found, Without) and "GiB" in found.reason
    host.close()


@pytest.mark.parametrize(("kept", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_states_come_back(kept: Any, error: float) -> None:
    states = States(10, 16, kept)
    values = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    states.put(torch.arange(10).flip(0), values)
    largest = values.abs().amax(-1, keepdim=True)
    assert bool(((states.get(torch.arange(10).flip(0)) - values).abs() <= error * largest + 1e-12).all())


def test_another_text_runs_as_always() -> None:
    host, task = upper("classify")
    features = task.features(make.table())
    found = trunk(host, "m", task, features, _ref(), RECIPE, 12)
    assert isinstance(found, Trunk)
    batch = task.collate([features[0]])
    assert found.model(batch, [0]) is not None
    batch["input_ids"] = batch["input_ids"] + 1
    assert found.model(batch, [0]) is None and found.whole == 1
    host.close()


def test_batches_that_ran_as_always_are_told(tmp_path: Path) -> None:
    from intarsia.train.record import read_run

    class Later(make.Classify):
        """Other tokens from the third epoch on: two epochs are not enough to see it beforehand."""

        def collate(self, features: Any) -> Any:
            later = self.epoch is not None and self.epoch >= 2
            return super().collate([{**f, "input_ids": [i + 1 for i in f["input_ids"]]} for f in features] if later else features)

    host, _ = upper("classify")
    train(host, "m", Later(), make.table(), recipe=RECIPE, run_dir=tmp_path / "run")
    facts = read_run(tmp_path / "run")
    assert facts is not None and facts["trunk"]["whole_batches"] == 2  # steps 11 and 12 of five an epoch
