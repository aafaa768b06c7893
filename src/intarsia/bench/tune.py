"""`bench learn --tune`: learning rates for short trainings, chosen on dev data alone, and the file `rates.csv` that keeps them.

Each method that is tried learns at its own rate and at multiples of it (one seed, one task); the best on dev data counts, the
own rate where nothing is better by `GAIN`.  Methods that are alike share the multiple of one of them (`ALIKE`).  Head-only has the
same chance as the others.  What is not here: the test set, which plays no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.bench.jobs import Job, Results, source
from intarsia.methods import METHODS

TIMES = (1.0, 3.0, 10.0)
"""Multiples of a method's own rate that are tried, one after the other."""
MORE: dict[str, tuple[float, ...]] = {
    "full": (1, 3), "head": (1, 3, 10, 1 / 3), "hyperformer_pp": (1, 1 / 3, 1 / 10), "perfect": (1, 3, 10, 30, 100), "prompt": (1, 3), "said": (1, 1 / 3, 1 / 10),
}  # fmt: skip
"""Where they are others."""
SEED: dict[str, int] = {"hyperformer_pp": 1, "said": 1}
"""Where it is not seed 0: methods whose own rate is too high, which shows in this seed only."""
GAIN = 0.005
"""What another rate must bring over the own one: less is noise on some hundred dev examples."""
FALL = 0.01
"""A method that has lost this much against its best is not tried at still higher rates."""
ALIKE: dict[str, tuple[str, ...]] = {
    "adapter_lowrank": ("compacter", "phm_adapter"),
    "boft": ("oft",),
    "child_tuning_d": ("child_tuning_f",),
    "hyperformer_pp": ("hyperformer",),
    "lora": ("dora", "rslora"),
    "loreft": ("direft", "noreft"),
    "pfeiffer": ("adapterdrop", "houlsby"),
}
"""Methods that take over the multiple that was found for another."""


def own(method: str) -> float:
    """The learning rate a method comes with."""
    return METHODS[method].build().policy.learning_rate


def trials(
    methods: Sequence[str], results: Results, task: str, base: str | None = None, examples: int | None = None, steps: int | None = None
) -> Iterator[Job]:
    """The jobs: of every method its own rate first, then higher ones until it learns less; what is None is the task's own.

    Args:
        results: where the scores are found of what was tried before.
    """
    about = source(task)
    base, examples, steps = base or about.base, examples or about.examples, steps or about.steps
    for method in methods:
        best, limit = 0.0, math.inf
        for times in MORE.get(method, TIMES):
            if times > limit:
                continue
            job = Job(task, base, method, SEED.get(method, 0), examples, steps, None if times == 1 else rounded(own(method) * times))
            yield job
            score = next((float(str(x["score"])) for x in results.read() if Job.of(x) == job and "score" in x), 0.0)
            if score < best - FALL:
                limit = times
            best = max(best, score)


def rounded(rate: float) -> float:
    """Two digits: a rate that one can write down."""
    return float(f"{rate:.1e}")


def scores_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[float | None, float]]:
    """Scores by method and rate, of the seed that counts for the method."""
    scores: dict[str, dict[float | None, float]] = {}
    for line in lines:
        if "score" in line and line.get("seed", 0) == SEED.get(line["method"], 0):
            scores.setdefault(line["method"], {})[line["rate"]] = float(line["score"])
    return scores


def chosen(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Method -> (rate, how it was found), for those that learn more at another rate than at their own."""
    scores = scores_of(lines)
    found: dict[str, tuple[float, str]] = {}
    for method, tried in sorted(scores.items()):
        if None not in tried:
            continue
        best = max(tried, key=lambda rate: tried[rate])
        if best is None or tried[best] < tried[None] + GAIN:
            continue
        shown = "; ".join(f"{own(method) if rate is None else rate:g}: {score:.3f}" for rate, score in tried.items())
        found[method] = best, f"dev {shown}"
        times = best / own(method)
        for other in ALIKE.get(method, ()):
            if other not in scores:
                found[other] = rounded(own(other) * times), f"its own {own(other):g} times {times:.2g}, as {method}"
    return dict(sorted(found.items()))


def write(lines: Sequence[Mapping[str, Any]], path: Path) -> dict[str, tuple[float, str]]:
    """Write `rates.csv`; gives what it says."""
    found = chosen(lines)
    text = [
        "# Learning rates for 100 steps of 16 examples, where the method's own (its paper's, for longer trainings) learns less.",
        "# Written by `intarsia bench learn --tune` from dev data of SST-2; see src/intarsia/bench/tune.py.",
        "method,rate,how",
        *(f"{method},{rate:g},{how}" for method, (rate, how) in found.items()),
    ]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return found
