"""Dependency trees: whether heads form one, and the best one that scores allow (Chu & Liu 1965, Edmonds 1967).

A tree of n words is a list of n heads: 0 for the root, else the number of a word, counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Scores = Any  # an array [n, n + 1]: row i scores the heads of word i + 1


def cycle(heads: Sequence[int]) -> tuple[int, ...]:
    """Words on a cycle, in order; empty if every word leads to the root."""
    done: set[int] = set()
    for start in range(1, len(heads) + 1):
        path: list[int] = []
        at = start
        while at and at not in done:
            if at in path:
                return tuple(path[path.index(at) :])
            path.append(at)
            at = heads[at - 1]
        done.update(path)
    return ()


def best_tree(scores: Scores) -> list[int]:
    """Heads of the tree with the largest sum of scores among those with exactly one child of the root.

    Args:
        scores: [n, n + 1], finite; a word as its own head does not count.

    The edges from the root lose more than all others could gain, so the best tree has as few of them as possible: one.
    """
    count = len(scores)
    values = np.full((count + 1, count + 1), -np.inf)
    values[1:] = np.asarray(scores, dtype=np.float64)
    spread = values[1:].max() - values[1:].min()
    values[1:, 0] -= 1.0 + count * spread
    np.fill_diagonal(values, -np.inf)
    return [int(head) for head in _arborescence(values)[1:]]


def _arborescence(values: Scores) -> Scores:
    """Best head of every node but node 0, whose entry is 0; `values[i, j]` scores j as the head of i."""
    heads = values.argmax(1)
    heads[0] = 0
    ring = np.array(cycle(heads[1:].tolist()), dtype=int)
    if not len(ring):
        return heads
    kept = np.setdiff1d(np.arange(len(values)), ring)
    own = values[ring, heads[ring]]
    inside = values[np.ix_(kept, ring)]  # a node of the ring as head of one outside
    enter = values[np.ix_(ring, kept)] - own[:, None]  # what a head from outside costs the ring
    small = np.full((len(kept) + 1, len(kept) + 1), -np.inf)
    small[:-1, :-1] = values[np.ix_(kept, kept)]
    small[:-1, -1] = inside.max(1)
    small[0] = -np.inf
    small[-1, :-1] = enter.max(0)
    solved = _arborescence(small)
    found = heads.copy()
    for i, node in enumerate(kept[1:], 1):
        head = solved[i]
        found[node] = ring[inside[i].argmax()] if head == len(kept) else kept[head]
    broken = enter[:, solved[-1]].argmax()
    found[ring[broken]] = kept[solved[-1]]
    found[0] = 0
    return found
