"""Modules that decide which weights of the base count (supermasks, lottery tickets) do not combine with others at these weights.

What they give at a parameter stands for it: half of a mask, or a mask of what another module left, is neither's.  At other sites
they combine like any module, and rows of a batch may have one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.compose.algebra import Algebra, Terms
from intarsia.compose.expr import Expr, Mix
from intarsia.errors import CompositionError


@dataclass(frozen=True, slots=True)
class Whole:
    """Stands for the change of one parameter: by one module, or of several together."""

    names: tuple[str, ...]
    mask: str | None = None


def together(site: str, parts: Sequence[Whole]) -> Whole:
    """Several changes as one; refused if one of them is a mask."""
    found = tuple(dict.fromkeys(name for part in parts for name in part.names))
    mask = next((part.mask for part in parts if part.mask is not None), None)
    if mask is not None and len(parts) > 1:
        others = [name for name in found if name != mask] or [mask]
        raise CompositionError(
            f"{mask!r} decides which weights count at {site}, and {', '.join(map(repr, others))} would change them too: a mask has no sum with other "
            f"changes; run them apart (a row of the batch each), or write {mask!r} into a copy of the base (intarsia fold) and train the other there"
        )
    return Whole(found, mask)


class MaskedAt:
    """One parameter, and who changes it there: the arithmetic of these stand-ins is its own."""

    algebra: Algebra

    def __init__(self, site: str, values: Mapping[str, Whole]) -> None:
        self.site = site
        self.values = values
        self.algebra = self

    def deltas(self, name: str) -> Sequence[Whole]:
        return (self.values[name],) if name in self.values else ()

    def change(self, delta: Whole, h: Any) -> Whole:
        return delta

    def join(self, h: Whole | None, change: Whole) -> Whole:
        return change if h is None else together(self.site, (h, change))

    plus = join

    def mix(self, terms: Terms, members: int) -> Whole | None:
        return self._weighed([change for _, change in terms], all(weight == 1.0 for weight, _ in terms))

    def routed(self, mix: Mix, h: Any) -> Whole | None:
        return self._weighed([change for part in mix.parts if (change := part.change(h, self)) is not None], False)

    def _weighed(self, changes: Sequence[Whole], ones: bool) -> Whole | None:
        if not changes:
            return None
        whole = together(self.site, changes)
        if whole.mask is not None and not ones:
            raise CompositionError(
                f"{whole.mask!r} decides which weights count at {self.site}, and a part of a mask is none: it has no weight but 1; run it alone, or "
                "change another module's weight"
            )
        return whole


def check_masks(e: Expr, masks: Mapping[str, frozenset[str]], touched: Mapping[str, frozenset[str]]) -> None:
    """Refuse an expression in which a mask meets another change of its parameters, or is weighed.

    Args:
        masks: parameters that a module masks, of those that do.
        touched: sites that a module changes.
    """
    for site in sorted({site for sites in masks.values() for site in sites}):
        values = {n: Whole((n,), n if site in masks.get(n, ()) else None) for n, sites in touched.items() if site in sites}
        e.run(None, MaskedAt(site, values))
