"""The order of examples is a pure function, and covers every example once however it is cut up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import TrainingError
from intarsia.train.batches import Loader
from intarsia.train.order import POOL, Pieces, pieces, steps
from tests.train import make

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(sizes, st.integers(1, 20), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_each_example_once_per_epoch_in_full_steps(lengths: list[int], size: int, seed: int, epoch: int, grouped: bool) -> None:
    found = steps(lengths, size, seed, epoch, grouped)
    assert sorted(i for step in found for i in step) == list(range(len(lengths)))
    assert [len(step) for step in found] == [size] * (len(lengths) // size) + [len(lengths) % size] * (len(lengths) % size > 0)
    assert steps(lengths, size, seed, epoch, grouped) == found


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(i for s in steps([1] * 50, 8, seed, epoch) for i in s) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_grouping_saves_padding() -> None:
    lengths = [(i * 37) % 101 + 1 for i in range(POOL * 8 * 2)]

    def padding(grouped: bool) -> int:
        return sum(max(lengths[i] for i in step) * len(step) - sum(lengths[i] for i in step) for step in steps(lengths, 8, 0, 0, grouped))

    assert padding(True) * 5 < padding(False)


@given(st.lists(st.integers(), min_size=1, max_size=64, unique=True), st.integers(1, 4), st.integers(1, 6))
def test_pieces_share_a_step_fairly(examples: list[int], world: int, accumulation: int) -> None:
    found = pieces(examples, world, accumulation)
    assert len(found) == world and len({len(rank) for rank in found}) == 1 and len(found[0]) <= accumulation
    flat = [piece for rank in found for piece in rank]
    assert sorted(i for piece in flat for i in piece) == sorted(examples)
    assert max(map(len, flat)) - min(map(len, flat)) <= 1
    if len(examples) >= world * accumulation:
        assert len(found[0]) == accumulation and all(flat)


@settings(max_examples=60)
@given(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_processes_see_what_one_would(lengths: list[int], world: int, accumulation: int, factor: int) -> None:
    batch = world * accumulation * factor
    plans = [Pieces(lengths, batch, accumulation, 3, True, rank, world) for rank in range(world)]
    for plan in plans:
        plan.set_epoch(2)
    micros = [list(plan) for plan in plans]
    assert all(len(found) == len(plan) for found, plan in zip(micros, plans)) and len({len(found) for found in micros}) == 1
    seen = Counter(item.index for found in micros for micro in found for item in micro if item.counts)
    assert seen == Counter(range(len(lengths)))
    assert all(item.epoch == 2 for found in micros for micro in found for item in micro) and all(micro for found in micros for micro in found)


def test_too_many_pieces_are_refused() -> None:
    with pytest.raises(TrainingError, match="cannot be cut into 3 processes x 2 pieces"):
        Pieces([1] * 20, 5, 2, 0, True, 0, 3)


def test_the_task_learns_the_epoch_while_training_only() -> None:
    task = make.Masked()
    features = task.features(make.table(6))
    loader = Loader(task, features, Pieces([1] * 6, 3, 1, 0, True))

    def epoch(number: int) -> list[Any]:
        loader.set_epoch(number)
        return [micro.batch["labels"].tolist() for micro in loader]

    assert epoch(0) == epoch(0) != epoch(1)
    assert {seen for seen, _ in task.collated} == {0, 1} and task.epoch is None


def test_counting_and_company() -> None:
    task = make.Tag()
    features = task.features(make.table(5))
    micros = [list(Loader(task, features, Pieces([1] * 5, 4, 1, 0, True, rank, 2))) for rank in (0, 1)]
    assert [m.counts for m in micros[0]] == [True, True] and [m.counts for m in micros[1]] == [True, False]
    company = micros[1][1]
    assert company.terms == 0 and company.rows == micros[0][1].rows
    assert sum(m.terms for found in micros for m in found) == sum(task.terms(task.collate([f])) for f in features)
