"""What an expression does, told before it runs: order per site, sizes, and which laws hold there.

| port | `a >> b` | `a >> b` = `b >> a` | a row of its own |
|---|---|---|---|
| out, in, weight | b sees what a left | all add what does not depend on the site's value, or all multiply by constants | yes |
| mem, seq | one block after the other | not promised | yes; prompts of equal length |
| logits | refused, unless one head is named | - | yes |

Pure: nothing here knows a model; `Carried` says what a module has where (the command line fills it in from a host).
What is not here: refusals (`legality.py`) and folding (the host), whose sentences are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from intarsia.compose.expr import Expr, Mix, Ref, Seq, names

Nature = Literal["adds", "scales", "other"]


@dataclass(frozen=True, slots=True)
class Step:
    """One patch of a module at one site.

    Attributes:
        nature: `adds` a value that does not depend on what the site holds, `scales` it by constants, or anything else.
        trainable: numbers that training changes.
        stored: numbers in the module's file.
    """

    patch: str
    op: str
    form: str
    nature: Nature
    trainable: int = 0
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A site as far as laws go.

    Attributes:
        rows: None if every row of a batch may have its own expression there, else why not.
    """

    name: str
    port: str
    rows: str | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """A module: its steps by site name, and its totals, tied tensors (which belong to no site) included."""

    steps: Mapping[str, tuple[Step, ...]]
    tensors: int = 0
    trainable: int = 0
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Law:
    """Whether something is promised, and why."""

    holds: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SiteExplanation:
    """What happens at one site.

    Attributes:
        order: the expression without the modules that have nothing here.
        steps: (module, step) in the order in which they are written.
        laws: `commute`, `associate` and `rows`.
    """

    site: str
    port: str
    order: str
    steps: tuple[tuple[str, Step], ...]
    laws: Mapping[str, Law]

    @property
    def trainable(self) -> int:
        return sum(step.trainable for step in self._distinct())

    @property
    def stored(self) -> int:
        return sum(step.stored for step in self._distinct())

    def _distinct(self) -> tuple[Step, ...]:
        """A module that comes twice is stored once."""
        return tuple({(name, step.patch): step for name, step in self.steps}.values())


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an expression does.

    Attributes:
        modules: the modules it names.
        unused: modules that were given and are not named.
        heads: those of its modules that have a head, which never becomes part of the base's weights.
        forwards: forward passes of the base per example; every node changes one and the same pass.
        folds: None if all but heads can become part of the base's weights, else why not.
        refusal: None if it may run, else why not and what to type instead.
    """

    expression: str
    sites: tuple[SiteExplanation, ...]
    modules: Mapping[str, Carried]
    unused: tuple[str, ...]
    heads: tuple[str, ...]
    forwards: int
    folds: str | None
    refusal: str | None


def explain(
    e: Expr, carried: Mapping[str, Carried], places: Sequence[Place], *, folds: str | None = None, refusal: str | None = None, head: str | None = None
) -> Explanation:
    """What an expression does with some modules.

    Args:
        carried: every module that the expression names; others are reported as unused.
        places: all sites, in model order.
        folds: why it does not fold, if it does not.
        refusal: why it may not run, if it may not.
        head: the module whose head answers.
    """
    used = {name: module for name, module in carried.items() if name in names(e)}
    sites = []
    for place in places:
        here = {n: m.steps[place.name] for n, m in used.items() if place.name in m.steps and not (place.port == "logits" and head not in (None, n))}
        local = restrict(e, here)
        if local is not None:
            steps = tuple((ref.name, step) for ref in local.refs() for step in here[ref.name])
            sites.append(SiteExplanation(place.name, place.port, str(local), steps, laws(place, here)))
    unused = tuple(name for name in carried if name not in used)
    outputs = {place.name for place in places if place.port == "logits"}
    heads = tuple(name for name, module in used.items() if not outputs.isdisjoint(module.steps))
    return Explanation(str(e), tuple(sites), used, unused, heads, 1, folds, refusal)


def restrict(e: Expr, here: Mapping[str, object]) -> Expr | None:
    """An expression without the modules that have nothing at a site; None if nothing is left."""
    if isinstance(e, Ref):
        return e if e.name in here else None
    kept = [(i, part) for i, child in enumerate(e.children()) if (part := restrict(child, here)) is not None]
    if not kept:
        return None
    if isinstance(e, Mix):
        parts = tuple(part for _, part in kept)
        if e.router is None:
            return replace(e, parts=parts, weights=tuple(e.weights[i] for i, _ in kept))
        return replace(e, parts=parts, top=None if e.top is None else min(e.top, len(parts)))
    return kept[0][1] if len(kept) == 1 else Seq(tuple(part for _, part in kept))


def laws(place: Place, here: Mapping[str, Sequence[Step]]) -> dict[str, Law]:
    """Which laws hold at a site for all modules that have something there."""
    rows = Law(place.rows is None, place.rows or "each row of a batch may have an expression of its own")
    return {"commute": _commute(place, here), "associate": _associate(place, here), "rows": rows}


def _associate(place: Place, here: Mapping[str, Sequence[Step]]) -> Law:
    if place.port == "logits" and len(here) > 1:
        return Law(False, "two heads in a sequence are refused")
    return Law(True, "(a >> b) >> c is a >> (b >> c)")


def _commute(place: Place, here: Mapping[str, Sequence[Step]]) -> Law:
    if len(here) == 1:
        return Law(True, "one module has something here")
    if place.port in ("mem", "seq"):
        return Law(False, "blocks stand one after the other, in the order of the sequence")
    if place.port == "logits":
        return Law(False, "two heads in a sequence are refused")
    natures = {step.nature for steps in here.values() for step in steps}
    if natures == {"adds"}:
        return Law(True, "all add what does not depend on the value here")
    if natures == {"scales"}:
        return Law(True, "all multiply by constants")
    if "other" in natures:
        return Law(False, "a later one reads what an earlier one left")
    return Law(False, "what is added is scaled by a later one")
