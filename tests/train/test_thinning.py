"""Methods that choose entries while they train: exact numbers, what stays, and the same after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import SpecError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.methods.regrow import Regrow, RegrowByMomenta
from intarsia.methods.thinning import L0, Project, Prune
from intarsia.patches.masks import HardConcreteFactor, gate, largest, open_chance
from intarsia.patches.sparse import SparseFactor
from intarsia.train import Interrupted, Recipe, train
from intarsia.train.loop import Result
from intarsia.train.rates import optimiser_groups
from tests.train import make
from tests.train.test_resume import SignalAfter

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=1e-3, weight_decay=0.1, save_every=1, select_best=False)
METHODS: dict[str, dict[str, Any]] = {
    "s2ft": {"share": 0.2},
    "supermask": {"keep": 0.8},
    "spiel": {"density": 0.05, "every": 3, "window": 2, "rate": 0.5},
    "diff_pruning": {"density": 0.01, "l0": 1e-5},
    "lottery": {"rounds": 3, "share": 0.2},
}
MA = {"density": 0.05, "every": 3, "rate": 0.5, "by": "momenta"}


def run(method: str, folder: Path | None = None, recipe: Recipe = RECIPE, settings: dict[str, Any] | None = None, **more: Any) -> tuple[Host, Result]:
    host, task = make.host("classify", method, **(METHODS[method] if settings is None else settings))
    return host, train(host, "m", task, make.table(24), recipe=recipe, run_dir=folder, **more)


def parts(host: Host, leaf: str) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in host.tensors("m").items() if name.endswith(f".{leaf}") and "/head" not in name}


@pytest.mark.parametrize("method", ["spiel", "diff_pruning", "lottery"])
def test_an_interruption_changes_nothing(method: str, tmp_path: Path) -> None:
    whole = run(method)[1]
    for step in (5, 8):  # the second one goes on with the run that the first interrupted
        with pytest.raises(Interrupted):
            run(method, tmp_path, callbacks=[SignalAfter(step)], resume=step == 8)
    assert run(method, tmp_path, resume=True)[1].module.digest == whole.module.digest


def rate_lines(method: str, **settings: Any) -> list[float]:
    result = run(method, recipe=replace(RECIPE, log_every=1), settings=METHODS[method] | settings)[1]
    return [line["learning_rate"] for line in result.history if "learning_rate" in line]


def test_rounds_and_stages_have_a_schedule_each() -> None:
    """Lottery tickets are trained in every round as in the first, differences at fixed places five times as fast as before."""
    found = rate_lines("lottery")
    assert found[:4] == pytest.approx(found[4:8]) and found[:4] == pytest.approx(found[8:]) and found[0] > found[3]
    late = rate_lines("lottery", late=2)
    assert late[0] == pytest.approx(found[0]) and late[4] < late[0], "a rewound round goes on from the step it is rewound to"
    found = rate_lines("diff_pruning")
    assert found[6:] == pytest.approx([5 * rate for rate in found[:6]])


def test_a_mask_keeps_exactly_its_share_and_passes_the_gradient_through() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False], "ties go to the first"
    host, result = run("supermask")
    masks = [t for name, t in result.module.tensors.items() if name.endswith("mask")]
    assert masks and all(m.dtype == torch.bool and int(m.sum()) == -(-m.numel() * 8 // 10) for m in masks)
    factor = next(m for f in host.forms("m").values() for m in f.modules() if hasattr(m, "scores"))
    weight, outer = torch.randn(factor.scores.shape), torch.randn(factor.scores.shape)
    (weight * factor.materialise() * outer).sum().backward()
    torch.testing.assert_close(factor.scores.grad, outer * weight * factor.scores.sign())


def test_s2ft_changes_its_columns_only() -> None:
    host, _ = run("s2ft")
    changed = 0
    for name, form in host.forms("m").items():
        if not name.endswith("/delta"):
            continue
        value = form.factor.materialise()
        columns = (value != 0).any(0).nonzero()[:, 0]
        unit = 8 if ".attn." in name else 1  # a head
        assert columns.tolist() == form.factor.index.tolist() and len(columns) == unit * max(1, int(0.2 * (value.shape[1] // unit)))
        changed += 1
    assert changed


def test_spiel_keeps_its_number_of_entries_and_moves_them() -> None:
    host, task = make.host("classify", "spiel", **METHODS["spiel"])
    before = parts(host, "index")
    seen: list[set[str]] = []
    real = Regrow._exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Regrow, "_exchange", lambda self, *rest: (seen.append(set(rest[-1])), real(self, *rest)))
        train(host, "m", task, make.table(24), recipe=RECIPE)
    assert seen and all(keys == {"step", "exp_avg", "exp_avg_sq"} for keys in seen), "rules see the optimiser's state"
    after = parts(host, "index")
    assert before and all(len(after[k]) == len(before[k]) == len(after[k].unique()) for k in before)
    assert all(bool((t[1:] > t[:-1]).all()) for t in after.values())
    assert all(not torch.equal(before[k], after[k]) for k in before), "the first choice exchanges all"


@pytest.mark.parametrize("change", [{"accumulation": 4}, {"gradient_checkpointing": True}], ids=["pieces", "checkpointing"])
def test_spiel_grows_the_same_entries_however_a_step_is_computed(change: dict[str, Any]) -> None:
    """Gradients differ by rounding only, so all but a few entries at the border of the choice are the same."""
    recipe = replace(RECIPE, max_steps=4)
    whole, other = (parts(run("spiel", recipe=r)[0], "index") for r in (recipe, replace(recipe, **change)))
    same = sum(int(torch.isin(other[k], whole[k]).sum()) for k in whole)
    assert same > 0.98 * sum(len(t) for t in whole.values())


def test_spiel_grows_where_gradients_are_largest_and_seeds_the_moments() -> None:
    """One window by hand: the rule against the formulas."""
    host, _ = make.host("classify", "spiel", density=0.05, every=2, window=2)
    rule = Regrow(2, 2, 0.5)
    forms = {k: f for k, f in host.forms("m").items() if k.endswith("/delta")}
    name, form = next(iter(forms.items()))
    factor, memory = form.factor, {}
    count, old = len(factor.index), factor.index.long().clone()
    states = {f.factor.values: {"step": torch.tensor(2.0), "exp_avg": torch.ones_like(f.factor.values), "exp_avg_sq": torch.ones_like(f.factor.values)} for f in forms.values()}
    drawn = [torch.randn(factor.shape) for _ in range(2)]
    for step, g in enumerate(drawn, 1):
        rule.begin(step, forms, memory)
        (factor.materialise() * g).sum().backward()
        rule.after_step(step, 100, forms, memory, states)
    size = drawn[0].flatten().abs()
    size[old] = -1
    expected = size.topk(count).indices.sort().values
    assert factor.index.tolist() == expected.tolist() and not bool(factor.values.any()) and not [k for k in memory if k.startswith(name)]
    mean = torch.stack([g.flatten()[expected] for g in drawn]).mean(0)
    torch.testing.assert_close(states[factor.values]["exp_avg"], mean * (1 - 0.9**2))
    squares = torch.stack([g.flatten()[expected].square() for g in drawn]).mean(0)
    torch.testing.assert_close(states[factor.values]["exp_avg_sq"], squares * (1 - 0.999**2))


def test_spiel_by_momenta_takes_no_dense_gradient_and_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseFactor, "collect", lambda *a: pytest.fail("no gradient of a whole tensor is asked for"))
    host, _ = make.host("classify", "spiel", **MA)
    before = parts(host, "index")
    host, result = run("spiel", settings=MA)
    after = parts(host, "index")
    assert before and all(len(after[k]) == len(before[k]) and not torch.equal(before[k], after[k]) for k in before)
    assert all(bool((t[1:] > t[:-1]).all()) for t in after.values())
    with pytest.raises(Interrupted):
        run("spiel", tmp_path, settings=MA, callbacks=[SignalAfter(5)])
    assert run("spiel", tmp_path, settings=MA, resume=True)[1].module.digest == result.module.digest


def test_sm3_accumulators_and_what_they_choose() -> None:
    """Three steps by hand: sums per row and column, and the entries whose row and column are largest."""
    host, _ = make.host("classify", "spiel", **MA)
    forms = {k: f for k, f in host.forms("m").items() if k.endswith("/delta")}
    name, form = next(iter(forms.items()))
    factor, rule, memory = form.factor, RegrowByMomenta(3, 0.5), {}
    out, width = factor.shape
    rows, columns = [0.0] * out, [0.0] * width
    old, count = factor.index.long().clone(), len(factor.index)
    states = {f.factor.values: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(f.factor.values), "exp_avg_sq": torch.ones_like(f.factor.values)} for f in forms.values()}
    torch.manual_seed(0)
    for step in (1, 2, 3):
        for f in forms.values():
            f.factor.values.grad = torch.randn(len(f.factor.values))
        sums = [min(rows[i // width], columns[i % width]) + float(g) ** 2 for i, g in zip(old.tolist(), factor.values.grad)]
        for i, s in zip(old.tolist(), sums):
            rows[i // width] = max(rows[i // width], s)
            columns[i % width] = max(columns[i % width], s)
        rule.after_step(step, 100, forms, memory, states)
    torch.testing.assert_close(memory[f"{name}.rows"], torch.tensor(rows))
    torch.testing.assert_close(memory[f"{name}.columns"], torch.tensor(columns))
    estimate = torch.tensor(rows)[:, None] * torch.tensor(columns)
    estimate.view(-1)[old] = -1
    expected = estimate.flatten().topk(count).indices.sort().values
    assert factor.index.tolist() == expected.tolist() and not bool(factor.values.any())
    second = torch.minimum(torch.tensor(rows)[expected // width], torch.tensor(columns)[expected % width]) / 3
    torch.testing.assert_close(states[factor.values]["exp_avg_sq"], second * (1 - 0.999**3))
    assert not bool(states[factor.values]["exp_avg"].any())


def test_gates_have_their_closed_forms() -> None:
    """Chances of being open, by drawing; the table of the paper's settings."""
    torch.manual_seed(0)
    for alpha, chance in ((5.0, 0.9933), (0.0, 0.5), (-2.0, 0.1192)):
        z = gate(torch.full((200_000,), alpha), torch.rand(200_000))
        expected = float(open_chance(torch.tensor(alpha)))
        assert abs(expected - chance) < 1e-3 and abs(float((z > 0).float().mean()) - expected) < 4e-3
    assert abs(float((gate(torch.zeros(200_000), torch.rand(200_000)) == 1).float().mean()) - 1 / 6) < 4e-3


@pytest.mark.parametrize("official", [False, True])
def test_the_l0_penalty_multiplies_or_adds(official: bool) -> None:
    host, _ = make.host("classify", "diff_pruning", official=official, l0=1.0)
    expected = 0.0
    for form in host.forms("m").values():
        if isinstance(getattr(form, "factor", None), HardConcreteFactor):
            own, group, n = float(open_chance(torch.tensor(5.0))), float(open_chance(torch.tensor(5.0))), form.factor.value.numel()
            expected += n * own + group if official else n * own * group
    assert float(L0(1.0, official).loss(list(host.forms("m").values())).detach()) == pytest.approx(expected, rel=1e-4)


def test_a_projection_keeps_exactly_its_share_and_then_trains_it() -> None:
    host, result = run("diff_pruning")
    sizes = {k: t.numel() for k, t in parts(host, "kept").items()}
    count = int(0.01 * sum(sizes.values()) + 1e-9)
    assert sum(int(t.sum()) for t in parts(host, "kept").values()) == count
    stored = [t for k, t in result.module.tensors.items() if k.endswith(".values")]
    assert sum(t.numel() for t in stored) == count and not [k for k in result.module.tensors if "alpha" in k]
    again, _ = make.host("classify", "head")
    again.insert(result.module, name="plain")
    for name, form in host.forms("m").items():
        if name.endswith("/delta"):
            torch.testing.assert_close(again.forms("plain")[name].factor.materialise(), form.factor.materialise(), atol=0, rtol=0)
    assert Project(0.01).settled(12) == 6


def test_gates_learn_at_a_rate_of_their_own() -> None:
    host, _ = make.host("classify", "diff_pruning")
    tagged = host.tagged("m")
    assert {k.rsplit(".", 1)[1] for k in tagged[":gate"]} == {"alpha", "alpha_group"}
    assert not [k for k in tagged[""] if "alpha" in k]


def test_tickets_are_nested_and_rewound_to_the_bit() -> None:
    host, task = make.host("classify", "lottery", **METHODS["lottery"])
    rule = host.method("m").policy.steps[0]
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    real = Prune.after_step

    def watch(self: Prune, step: int, total: int, *rest: Any) -> None:
        real(self, step, total, *rest)
        if step in self.ends(total):
            seen.append((parts(host, "mask"), parts(host, "value")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prune, "after_step", watch)
        train(host, "m", task, make.table(24), recipe=RECIPE)
    assert isinstance(rule, Prune) and len(seen) == 2
    left = sum(m.numel() for m in seen[0][0].values())
    for masks, values in seen:
        left -= int(0.2 * left)
        assert sum(int(m.sum()) for m in masks.values()) == left
        assert all(not bool(v.any()) for v in values.values()), "survivors are the base's own values again"
    assert all(not bool((seen[1][0][k] & ~seen[0][0][k]).any()) for k in seen[0][0])
    for name, form in host.forms("m").items():
        if name.endswith("/ticket"):
            weight = torch.randn(form.mask.shape)
            assert bool(((weight + (form(weight, None) - weight))[~form.mask] == 0).all())


def test_the_best_step_is_one_with_the_final_entries(tmp_path: Path) -> None:
    host, task = make.host("classify", "lottery", **METHODS["lottery"])
    recipe = replace(RECIPE, select_best=True, eval_every=1, save_every=6)
    result = train(host, "m", task, make.table(24), make.table(12), recipe=recipe)
    assert result.best_step >= Prune(3, 0.2).settled(12) == 8


@pytest.mark.parametrize(("method", "settings", "message"), [("lottery", {"rounds": 20}, "20 rounds in 12 steps"), ("spiel", {"every": 20}, "every 20 steps")])
def test_a_training_too_short_for_its_rule_is_refused(method: str, settings: dict[str, Any], message: str) -> None:
    host, task = make.host("classify", method, **settings)
    with pytest.raises(SpecError, match=message):
        train(host, "m", task, make.table(24), recipe=RECIPE)


def test_decay_reaches_chosen_entries_of_matrices_and_no_vector() -> None:
    host, _ = make.host("classify", "fish", density=0.05, rows=4)
    groups = optimiser_groups(host, "m", replace(RECIPE, weight_decay=0.1))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    found = {name: id(p) in decayed for name, p in host.parameters("m").items() if name.endswith(".values")}
    assert {name for name, yes in found.items() if yes} == {n for n in found if n.split("/")[0].endswith(".weight") and ".norm." not in n}
    assert set(found.values()) == {True, False}


def test_unknown_shares_are_refused() -> None:
    for method, settings in (("supermask", {"keep": 0.0}), ("s2ft", {"share": 2.0}), ("lottery", {"rounds": 1}), ("spiel", {"every": 1})):
        with pytest.raises(SpecError, match=r"share|round|window"):
            build(method, **settings)
