"""What an expression may not do, decided from specifications before any forward: heads that contradict, mixtures of
prefixes of unequal length.  The same arithmetic (`algebra.py`) is run on stand-ins that know only length and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.compose.algebra import BLOCKS, LOGITS, Algebra
from intarsia.compose.expr import Expr, names
from intarsia.errors import CompositionError, listing, nearest


@dataclass(frozen=True, slots=True)
class Traits:
    """What legality needs to know of a module.

    Attributes:
        labels: label names of its head, None if it has none.
        blocks: lengths of what it puts in front of a sequence or a memory, by site name.
    """

    labels: tuple[str, ...] | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Block:
    length: int

    def scaled(self, weight: float) -> _Block:
        return self

    def __add__(self, other: _Block) -> _Block:
        return self


@dataclass(frozen=True, slots=True)
class _Labels:
    """Stands for logits: may be added to logits over the same labels only."""

    owner: str
    labels: tuple[str, ...]

    def __mul__(self, weight: float) -> _Labels:
        return self

    def __radd__(self, other: Any) -> _Labels:
        return self

    def __add__(self, other: _Labels) -> _Labels:
        if self.labels != other.labels:
            raise CompositionError(
                f"the heads of {self.owner!r} and {other.owner!r} cannot be averaged, their labels differ: "
                f"{listing(self.labels, 4)} against {listing(other.labels, 4)}; name the one that answers: "
                f"using(..., head={self.owner!r})"
            )
        return self


class _Static:
    def __init__(self, algebra: Algebra, values: Mapping[str, Any]) -> None:
        self.algebra = algebra
        self.values = values

    def deltas(self, name: str) -> Sequence[Any]:
        return (self.values[name],) if name in self.values else ()

    def change(self, delta: Any, h: Any) -> Any:
        return delta


def check(e: Expr, known: Mapping[str, Traits], head: str | None = None) -> None:
    """Refuse an expression that names unknown modules or asks for what has no meaning.

    Raises:
        CompositionError: what is wrong and what to type instead.
    """
    for name in sorted(names(e)):
        if name not in known:
            raise CompositionError(
                f"no module {name!r} on this host{nearest(name, known)} known: {listing(known, 20) or 'none'}"
            )
    if head is not None and (head not in names(e) or known[head].labels is None):
        owners = [n for n in sorted(names(e)) if known[n].labels is not None]
        raise CompositionError(f"head={head!r} is not a module with a head in this expression; with heads: {listing(owners) or 'none'}")
    heads = {n: _Labels(n, t.labels) for n, t in known.items() if t.labels is not None and head in (None, n)}
    e.run(None, _Static(LOGITS, heads))
    for site in sorted({s for n in names(e) for s in known[n].blocks}):
        blocks = {n: (_Block(t.blocks[site]),) for n, t in known.items() if site in t.blocks}
        e.run((), _Static(BLOCKS, blocks))
