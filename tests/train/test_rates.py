"""Learning rates by group: heads apart, vectors and heads without decay, every parameter once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import TrainingError
from intarsia.methods import Group, Policy, build
from intarsia.methods.method import Stage
from intarsia.patches import Head, LanguageModelHead
from intarsia.train import Recipe
from intarsia.train.rates import HEAD_RATE, LM_HEAD_RATE, Rate, factor, groups, optimiser_groups, rates, staged
from tests.train import make

HEAD = Head(("a", "b"))


def test_the_method_says_what_the_recipe_leaves_open() -> None:
    lora, full = build("lora").with_head(HEAD), build("full").with_head(HEAD)
    assert rates(lora, Recipe())[""] == Rate(5e-4, 0.0) and rates(full, Recipe())[""] == Rate(5e-5, 0.01)
    assert rates(full, Recipe(learning_rate=1e-3, weight_decay=0.0))[""] == Rate(1e-3, 0.0)


def test_heads_have_their_own_rate() -> None:
    lora = build("lora")
    assert rates(lora.with_head(HEAD), Recipe(learning_rate=1e-5, weight_decay=0.1))["head"] == Rate(HEAD_RATE, 0.0)
    assert rates(lora.with_head(LanguageModelHead()), Recipe())["head"] == Rate(LM_HEAD_RATE, 0.0)
    assert rates(lora.with_head(HEAD), Recipe(head_learning_rate=1e-2))["head"] == Rate(1e-2, 0.0)


def test_groups_of_a_policy_follow_the_main_rate() -> None:
    policy = Policy(learning_rate=1e-3, decay=0.1, groups=(Group("norm", 10.0, 0.0), Group("fast", 2.0)))
    found = rates(replace(build("houlsby"), policy=policy), Recipe(learning_rate=1e-4))
    assert found["norm"] == Rate(pytest.approx(1e-3), 0.0) and found["fast"] == Rate(pytest.approx(2e-4), 0.1)


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    host, _ = make.host("classify", "houlsby", width=4)
    found = optimiser_groups(host, "m", Recipe(weight_decay=0.1, learning_rate=1e-3))
    given_ids = [id(p) for group in found for p in group["params"]]
    assert sorted(given_ids) == sorted({id(p) for p in host.parameters("m").values()})
    for group in found:
        wanted = 0.0 if group["tag"] == "head" else 0.1
        assert all(group["weight_decay"] == (wanted if p.dim() > 1 else 0.0) for p in group["params"])
    assert {group["tag"]: group["lr"] for group in found} == {"": 1e-3, "norm": 1e-3, "head": HEAD_RATE}


def test_a_parameter_tied_between_tags_is_trained_once() -> None:
    shared = torch.nn.Parameter(torch.zeros(2, 2))
    found = groups({"": {"a": shared}, "head": {"b": shared}}, {"": Rate(1.0, 0.0), "head": Rate(2.0, 0.0)})
    assert [(group["lr"], len(group["params"])) for group in found] == [(1.0, 1)]


def test_nothing_to_train_is_refused() -> None:
    host, _ = make.host("mlm")
    host.add("nothing", build("head"))
    with pytest.raises(TrainingError, match=r"'nothing' \(head\) has no parameters"):
        optimiser_groups(host, "nothing", Recipe())


@given(st.integers(1, 200), st.floats(0, 0.99), st.sampled_from(["linear", "cosine", "constant"]))
def test_no_step_is_wasted_and_rates_rise_then_fall(total: int, share: float, schedule: str) -> None:
    warmup = min(round(share * total), total - 1)
    found = [factor(step, warmup, total, schedule) for step in range(total)]
    assert all(0 < value <= 1 for value in found)
    rising = [b - a for a, b in pairwise(found[: warmup + 1])]
    falling = [b - a for a, b in pairwise(found[warmup:])]
    assert all(d > 0 for d in rising) and all(d == 0 if schedule == "constant" else d < 0 for d in falling)
    assert factor(total, warmup, total, schedule) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_a_schedule_begins_anew_at_every_stage() -> None:
    """Rounds of 10 steps are trained alike; a round that is rewound to step 3 goes on from there; a stage may have its own factor."""
    alone = [factor(step, 1, 10, "linear") for step in range(10)]
    whole = [staged(step, [Stage(10), Stage(20, rate=5.0)], 0.1, 30, "linear") for step in range(30)]
    assert whole == alone + alone + [5 * share for share in alone]
    assert [staged(step, [Stage(10, rate=5.0)], 0.1, 20, "linear", scaled=False) for step in range(20)] == alone + alone
    late = [staged(step, [Stage(10, skip=3)], 0.1, 17, "cosine") for step in range(17)]
    first = [factor(step, 1, 10, "cosine") for step in range(10)]
    assert late == first + first[3:]
    assert [staged(step, [], 0.1, 10, "linear") for step in range(10)] == alone
