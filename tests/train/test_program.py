"""Programs: entries chosen exactly, the base never written to, and the same module whenever a run was interrupted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.compose import expr
from intarsia.errors import ModuleError, TrainingError
from intarsia.host import Host
from intarsia.methods.program import WarmUp
from intarsia.modules import load
from intarsia.patches.sparse import SparseFactor, best, shares
from intarsia.train import Interrupted, Recipe, train
from intarsia.train.loop import Result
from intarsia.train.program import replaced, sparse_factors, squares
from tests.train import make
from tests.train.test_resume import SignalAfter

RECIPE = Recipe(max_steps=8, batch_size=8, learning_rate=1e-2, weight_decay=0.1, save_every=1, select_best=False)
SETTINGS: dict[str, dict[str, Any]] = {
    "fish": {"density": 0.02, "rows": 12},
    "child_tuning_d": {"density": 0.1, "rows": 12, "batch_size": 4},
    "lt_sft": {"density": 0.05, "share": 0.5, "l1": 0.1},
    "rosa": {"rank": 2, "density": 0.05, "rows": 12, "warmup": 2},
}


def run(method: str, folder: Path | None = None, **more: Any) -> tuple[Host, Result]:
    host, task = make.host("classify", method, **SETTINGS[method])
    return host, train(host, "m", task, make.table(24), recipe=RECIPE, run_dir=folder, **more)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.floats(0.001, 1.0))
def test_shares_are_exact(sizes: list[int], density: float) -> None:
    found = shares(sizes, density)
    assert sum(found) == int(density * sum(sizes) + 1e-9)
    assert all(abs(part - density * size) <= 1 and part <= size for part, size in zip(found, sizes))


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_the_best_are_exactly_k_and_ties_go_by_order(scores: list[list[int]], data: st.DataObject) -> None:
    flat = [s for row in scores for s in row]
    k = data.draw(st.integers(0, len(flat)))
    found = best({str(i): torch.tensor(row) for i, row in enumerate(scores)}, k)
    at, chosen = 0, []
    for i, row in enumerate(scores):
        assert found[str(i)].tolist() == sorted(found[str(i)].tolist())
        chosen += [at + j for j in found[str(i)].tolist()]
        at += len(row)
    assert chosen == sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k])


@pytest.mark.parametrize("method", list(SETTINGS))
def test_only_chosen_entries_change_and_their_number_is_exact(method: str) -> None:
    """With momentum and weight decay on, and the base as it was."""
    host, _ = make.host("classify", method, **SETTINGS[method])
    fresh = {key: f.index.clone() for key, f in sparse_factors(host, "m").items()}
    total = sum(len(index) for index in fresh.values()) - (host.count(head_patch_only()) if method == "fish" else 0)
    host, _ = run(method)
    factors = sparse_factors(host, "m")
    assert sum(len(f.index) for f in factors.values()) == total
    assert any(len(f.index) != len(fresh[key]) or not torch.equal(f.index, fresh[key]) for key, f in factors.items()), "something was chosen"
    assert any(bool(f.values.any()) for f in factors.values())
    if method == "rosa":
        assert all(len(f.index) == len(fresh[key]) for key, f in factors.items())
    else:
        plain, bare = host.fold("m", drop_head=True).state_dict(), host.model.state_dict()
        changed = sum(int((plain[key] != bare[key]).sum()) for key in plain)
        assert 0 < changed <= total
    assert host.names == ("m",)


@pytest.mark.parametrize("method", ["fish", "lt_sft"])
def test_stored_with_its_own_numbers_of_entries(method: str, tmp_path: Path) -> None:
    _, result = run(method, tmp_path / "run")
    other, _ = make.host("classify", "lora")
    other.insert(load(tmp_path / "run" / "module.safetensors"), name="again")
    assert other.extract("again").digest == result.module.digest
    assert not (tmp_path / "run" / "explore").exists()


@pytest.mark.parametrize(("method", "step", "phase"), [("fish", 3, 2), ("rosa", 1, 1), ("rosa", 3, 2), ("lt_sft", 2, 1), ("lt_sft", 3, 1), ("lt_sft", 3, 2)])
def test_an_interruption_in_any_phase_changes_nothing(method: str, step: int, phase: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase 1 is the exploring run where there is one; else the training itself."""
    whole = run(method)[1].module.digest
    if phase == 1:
        from intarsia.train import program

        real = program.choose

        def stopped(host: Any, name: str, task: Any, features: Any, expression: Any, seed: int, explore: Any) -> Any:
            inner = train.__globals__["train"]
            monkeypatch.setitem(train.__globals__, "train", lambda *a, **k: inner(*a, **k, callbacks=[SignalAfter(step)]))
            try:
                return real(host, name, task, features, expression, seed, explore)
            finally:
                monkeypatch.setitem(train.__globals__, "train", inner)

        monkeypatch.setitem(train.__globals__, "choose", stopped)
        with pytest.raises(Interrupted, match="exploring"):
            run(method, tmp_path)
        monkeypatch.setitem(train.__globals__, "choose", real)
    else:
        with pytest.raises(Interrupted):
            run(method, tmp_path, callbacks=[SignalAfter(step)])
    assert run(method, tmp_path, resume=True)[1].module.digest == whole


def head_patch_only() -> Any:
    return make.host("classify", "head")[0].method("m")


def test_a_head_is_among_the_entries_of_fish() -> None:
    """k counts the head (as released), and a head larger than k is refused."""
    host, result = run("fish")
    k = int(0.02 * sum(math.prod(f.shape) for f in sparse_factors(host, "m").values()) + 1e-9)
    assert sum(p.numel() for p in host.parameters("m").values()) == k == result.module.card.cost.trainable
    host, task = make.host("classify", "fish", density=1e-3, rows=4)
    with pytest.raises(TrainingError, match="raise density"):
        train(host, "m", task, make.table(8), recipe=RECIPE)


def test_a_warm_up_is_a_part_of_the_steps_and_what_the_probe_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The low-rank part is trained, then probed beside, then forgotten: entries differ from those of the untouched model's gradients."""
    from intarsia.train import program

    seen: list[str] = []
    real = program.squares
    monkeypatch.setattr(program, "squares", lambda h, t, answers, *rest: (seen.append(f"{answers} {rest[2]} {sorted(h.names)}"), real(h, t, answers, *rest))[1])
    _, result = run("rosa")
    assert seen == ["m-warm m-warm >> m-twin ['m', 'm-twin', 'm-warm']"]
    assert result.steps == 6, "two of the eight went into the warm-up"
    settings = SETTINGS["rosa"] | {"warmup": 0}
    host, task = make.host("classify", "rosa", **settings)
    cold = train(host, "m", task, make.table(24), recipe=RECIPE)
    assert cold.steps == 8 and host.names == ("m",)
    index = {k: t for k, t in result.module.tensors.items() if k.endswith(".index")}
    assert index and any(not torch.equal(t, cold.module.tensors[k]) for k, t in index.items())
    assert [WarmUp(64, 0.25).steps_of(n) for n in (2, 100, 1000)] == [1, 25, 64]


def test_squares_are_the_means_of_squared_gradients() -> None:
    """Against gradients with regard to the base's own weights, one example at a time."""
    from intarsia.methods.program import Probe
    from intarsia.train.program import _twin

    host, task = make.host("classify", "fish", density=0.1)
    features = task.features(make.table(5))
    with _twin(host, "m", whole=False) as twin:
        found = squares(host, twin, "m", task, features, expr(f"m >> {twin}"), Probe(rows=5), 0)
    key = "0.attn.q.weight/delta"
    weight = host.model.get_parameter(next(n for n, _ in host.model.named_parameters() if n.endswith("layer.0.attention.self.query.weight")))
    host.model.eval()
    total = torch.zeros_like(weight)
    weight.requires_grad_(True)
    for feature in features:
        batch = task.collate([feature])
        with host.using("m") as model:
            loss, terms = task.loss(model(**{k: batch[k] for k in task.keys}), batch)
        total += torch.autograd.grad(loss / terms, weight)[0].square()
    weight.requires_grad_(False)
    torch.testing.assert_close(found[key], total / 5, atol=1e-8, rtol=1e-4)


def test_stored_positions_are_checked() -> None:
    factor = SparseFactor((3, 4), torch.tensor([1, 5], dtype=torch.int32), torch.nn.Parameter(torch.zeros(2)), None)  # type: ignore[arg-type]
    for index in ([5, 1], [1, 1], [-1, 2], [3, 12], [[1, 2]], [1.0, 2.0], [1, 2, 3]):
        with pytest.raises(ModuleError):
            factor.adopt({"index": torch.tensor(index), "values": torch.zeros(2)})
    factor.adopt({"index": torch.tensor([0, 3, 11]), "values": torch.ones(3)})
    assert factor.materialise().shape == (3, 4) and len(factor.values) == 3


def test_a_module_is_replaced_in_an_expression() -> None:
    assert str(replaced(expr("swh >> (0.5*m + 0.5*b) >> m"), "m", "t")) == str(expr("swh >> (0.5*t + 0.5*b) >> t"))
