"""Two ways to do the same work, timed in turns in one process.

Both are checked to give the same answer before any time is taken.  A round runs each once, in an order that turns from round to
round; what counts is the median over the rounds of the ratio of the two *in the same round*, with its range.  The clock is the
process's CPU time, which the other work of a machine does not enter; wall time is written down beside it.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import TrainingError

Unit = Literal["time", "bytes"]


@dataclass
class Pair:
    """The work of a case, built.

    Attributes:
        ours, theirs: do the work once; for bytes they give the number.
        error: largest relative difference of the two answers.
        signal: the same of an answer that is wrong on purpose (without modules), which shows that `error` could have been seen.
        bound: what no implementation can do without, timed as a third way.
        allowed: the error that is still equal.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    error: float
    signal: float = float("inf")
    bound: Callable[[], Any] | None = None
    allowed: float = 1e-4


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: what it is called on the command line.
        work: what is done, in words.
        against: what the other side is.
        target: the ratio ours / theirs that we want to be at or below.
        make: builds the pair.
        unit: `time`, or `bytes` for a number that both sides give.
        rounds: how often.
    """

    name: str
    work: str
    against: str
    target: float
    make: Callable[[], contextlib.AbstractContextManager[Pair]]
    unit: Unit = "time"
    rounds: int = 7


def measure(case: Case, rounds: int | None = None) -> dict[str, Any]:
    """One line of results.

    Raises:
        TrainingError: the two sides do not give the same answer.
    """
    with case.make() as pair:
        if not pair.error <= pair.allowed:
            raise TrainingError(f"bench speed {case.name}: the answers of the two sides differ by {pair.error:.1e}; nothing was timed")
        if not pair.signal > 10 * pair.error:
            raise TrainingError(f"bench speed {case.name}: the check would not see a missing module ({pair.signal:.1e}); nothing was timed")
        facts = {"case": case.name, "unit": case.unit, "error": pair.error, "target": case.target}
        if case.unit == "bytes":
            ours, theirs = float(pair.ours()), float(pair.theirs())
            return {**facts, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "low": ours / theirs, "high": ours / theirs, "rounds": 1}
        return {**facts, **_times(pair, rounds or case.rounds)}


def _times(pair: Pair, rounds: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], Any]] = {"theirs": pair.theirs, "ours": pair.ours}
    if pair.bound is not None:
        ways["bound"] = pair.bound
    for run in ways.values():
        run()
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            gc.collect()
            with _no_collection():
                from_wall, from_cpu = time.perf_counter(), time.process_time()
                ways[name]()
                cpu[name].append(time.process_time() - from_cpu)
                wall[name].append(time.perf_counter() - from_wall)
    ratios = [a / b for a, b in zip(cpu["ours"], cpu["theirs"])]
    found: dict[str, Any] = {
        "ours": statistics.median(cpu["ours"]), "theirs": statistics.median(cpu["theirs"]), "ratio": statistics.median(ratios),
        "low": min(ratios), "high": max(ratios), "rounds": rounds,
        "wall_ratio": statistics.median(a / b for a, b in zip(wall["ours"], wall["theirs"])), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if "bound" in cpu:
        found["bound"] = statistics.median(a / b for a, b in zip(cpu["bound"], cpu["theirs"]))
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
