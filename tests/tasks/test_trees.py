"""Trees from scores: against all trees, and what they must look like."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.tasks.trees import best_tree, cycle


def trees(count: int) -> list[tuple[int, ...]]:
    """All trees with one root, by trying every list of heads."""
    found = itertools.product(range(count + 1), repeat=count)
    return [heads for heads in found if heads.count(0) == 1 and not naive_cycle(heads)]


def naive_cycle(heads: tuple[int, ...]) -> bool:
    for word in range(1, len(heads) + 1):
        at = word
        for _ in heads:
            at = heads[at - 1] if at else 0
        if at:
            return True
    return False


def total(scores: np.ndarray, heads: tuple[int, ...] | list[int]) -> float:
    return float(sum(scores[i, head] for i, head in enumerate(heads)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_no_tree_is_better(count: int) -> None:
    known = trees(count)
    assert len(known) == count ** (count - 1)  # Cayley
    draw = np.random.default_rng(count)
    for kind in range(60):
        scores = draw.normal(size=(count, count + 1)) * draw.choice([0.1, 1, 100])
        if kind % 3 == 0:
            scores[:, 0] += 50  # everybody wants to be the root
        if kind % 3 == 1:
            scores = np.round(scores)  # ties
        found = best_tree(scores)
        assert tuple(found) in known
        assert total(scores, found) == pytest.approx(max(total(scores, heads) for heads in known))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_always_a_tree_with_one_root(count: int, seed: int) -> None:
    found = best_tree(np.random.default_rng(seed).normal(size=(count, count + 1)))
    assert found.count(0) == 1 and not naive_cycle(tuple(found)) and not cycle(found)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_tree_gives_itself(count: int, seed: int) -> None:
    draw = random.Random(seed)
    order = draw.sample(range(1, count + 1), count)
    heads = [0] * count
    for place, word in enumerate(order[1:], 1):
        heads[word - 1] = order[draw.randrange(place)]
    scores = np.zeros((count, count + 1))
    scores[np.arange(count), heads] = 1
    assert best_tree(scores) == heads


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=6, max_size=6))
def test_cycles_are_found(heads: list[int]) -> None:
    ring = cycle(heads)
    assert bool(ring) == naive_cycle(tuple(heads))
    assert all(heads[a - 1] == b for a, b in zip(ring, (*ring[1:], *ring[:1])))
