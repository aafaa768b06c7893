"""What a policy prescribes is done: once per step, the same in pieces, the same after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.methods import build
from intarsia.methods.gradients import ChildGradients
from intarsia.train import Interrupted, Recipe, train
from intarsia.train.loop import Result
from tests.train import make
from tests.train.test_resume import SignalAfter

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=1e-2, save_every=1, select_best=False)
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 3, "target": 1, "every": 2},
    "adapterdrop": {"robust": True, "lowest": 1, "reduction": 4},
    "child_tuning_f": {"keep": 0.5},
}


def settings(method: str) -> dict[str, Any]:
    known = build(method).settings
    return {key: value for key, value in METHODS[method].items() if key in known}


def run(method: str, folder: Path | None = None, recipe: Recipe = RECIPE, **more: Any) -> tuple[Any, Result]:
    host, task = make.host("classify", method, **settings(method))
    return host, train(host, "m", task, make.table(24), recipe=recipe, run_dir=folder, **more)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_interruption_changes_nothing(method: str, tmp_path: Path) -> None:
    whole = run(method)[1]
    for step in (1, 7):
        with pytest.raises(Interrupted):
            run(method, tmp_path / str(step), callbacks=[SignalAfter(step)])
        assert run(method, tmp_path / str(step), resume=True)[1].module.digest == whole.module.digest


@pytest.mark.parametrize("method", list(METHODS))
def test_pieces_of_a_step_change_nothing(method: str) -> None:
    """A penalty counts once per step, a rule runs once per step."""
    whole, pieces = (run(method, recipe=Recipe(max_steps=3, batch_size=8, accumulation=n, learning_rate=1e-2, select_best=False))[0] for n in (1, 4))
    for name, tensor in whole.tensors("m").items():
        torch.testing.assert_close(pieces.tensors("m")[name], tensor, atol=2e-4, rtol=1e-3)


def test_adalora_ends_within_its_budget() -> None:
    host, _ = run("adalora")
    lambdas = [p for n, p in host.parameters("m").items() if n.endswith("core.value")]
    kept = sum(int((p != 0).sum()) for p in lambdas)
    assert 0 < kept <= len(lambdas) * METHODS["adalora"]["target"] < sum(p.numel() for p in lambdas)


def test_the_penalty_is_part_of_what_is_minimised() -> None:
    """With it P and Q stay nearer to orthogonal than without."""
    host, task = make.host("classify", "adalora", rank=3, orthogonality=10.0)
    before = float(host.penalty("m").detach())
    train(host, "m", task, make.table(24), recipe=RECIPE)
    plain, task = make.host("classify", "adalora", rank=3, orthogonality=0.0)
    train(plain, "m", task, make.table(24), recipe=RECIPE)
    skewed = [float(sum(t for f in h.forms("m").values() for c in f.modules() if hasattr(c, "skewness") for t in c.skewness()).detach()) for h in (host, plain)]
    assert float(host.penalty("m").detach()) < before and skewed[0] < skewed[1]


def test_layers_are_left_out_of_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    host, task = make.host("classify", "adapterdrop", **settings("adapterdrop"))
    real = host.using

    def using(expression: Any, **more: Any) -> Any:
        if torch.is_grad_enabled() and "drop_layers" in more:
            seen.append(more["drop_layers"])
        return real(expression, **more)

    monkeypatch.setattr(host, "using", using)
    train(host, "m", task, make.table(24), recipe=RECIPE)
    assert set(seen) == {0, 1} and len(seen) == 12


def test_child_gradients_keep_their_mean_and_spare_the_head() -> None:
    grads = []
    for step in range(200):
        parameters = {"0.attn.q/delta.value": torch.nn.Parameter(torch.zeros(50)), "logits/head.weight": torch.nn.Parameter(torch.zeros(4))}
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        ChildGradients(0.25).before_step(step, 7, parameters)
        body, head = (p.grad for p in parameters.values())
        assert set(body.unique().tolist()) <= {0.0, 4.0} and torch.equal(head, torch.ones(4))
        grads.append(body)
    assert abs(float(torch.stack(grads).mean()) - 1.0) < 0.06
    assert not torch.equal(grads[0], grads[1])
