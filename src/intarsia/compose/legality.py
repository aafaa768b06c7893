"""What an expression may not do, decided from specifications before any forward: heads that contradict, mixtures of
prefixes of unequal length.  The same arithmetic (`algebra.py`) is run on stand-ins that know only length and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.compose.algebra import BLOCKS, LOGITS, Algebra
from intarsia.compose.expr import Expr, Mix, Ref, Seq, names
from intarsia.errors import CompositionError, listing, nearest


@dataclass(frozen=True, slots=True)
class Traits:
    """What legality needs to know of a module.

    Attributes:
        labels: label names of its head, None if it has none.
        blocks: lengths of what it puts in front of a sequence or a memory, by site name.
        invertible: it changes the input embeddings, and the output embedding needs the inverse.
        unembeds: it has a language-model head.
    """

    labels: tuple[str, ...] | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)
    invertible: bool = False
    unembeds: bool = False


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


def check(e: Expr, known: Mapping[str, Traits], head: str | None = None, unembeds: bool = False) -> None:
    """Refuse an expression that names unknown modules or asks for what has no meaning.

    Args:
        unembeds: the base has a language-model head, and the call wants the inverse of what changes the embeddings.

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
    if unembeds and all(known[n].labels is None for n in names(e)) or any(known[n].unembeds for n in names(e)):
        _check_inverse(e, known)
    heads = {n: _Labels(n, t.labels) for n, t in known.items() if t.labels is not None and head in (None, n)}
    e.run(None, _Static(LOGITS, heads))
    for site in sorted({s for n in names(e) for s in known[n].blocks}):
        blocks = {n: (_Block(t.blocks[site]),) for n, t in known.items() if site in t.blocks}
        e.run((), _Static(BLOCKS, blocks))


def inverse(e: Expr, owners: frozenset[str]) -> Expr | None:
    """The expression back to front, with only what `owners` do; None if that has no exact inverse."""
    if names(e).isdisjoint(owners):
        return Seq(())
    if isinstance(e, Ref):
        return e
    if isinstance(e, Seq):
        parts = [inverse(part, owners) for part in reversed(e.parts)]
        return None if any(part is None for part in parts) else Seq(tuple(p for p in parts if p is not None))
    if isinstance(e, Mix):
        concerned = [(part, weight) for part, weight in zip(e.parts, e.weights) if not names(part).isdisjoint(owners)]
        same = len({part for part, _ in concerned}) == 1 and abs(sum(weight for _, weight in concerned) - 1.0) < 1e-9
        return inverse(concerned[0][0], owners) if same else None
    return None


def _check_inverse(e: Expr, known: Mapping[str, Traits]) -> None:
    owners = frozenset(name for name in names(e) if known[name].invertible)
    if inverse(e, owners) is None:
        raise CompositionError(
            f"{e} mixes what {listing(sorted(owners))} {'does' if len(owners) == 1 else 'do'} to the embeddings, and the output embedding needs an "
            "inverse, which a mixture has not: keep one language, put them one after the other (>>), or leave the inverse out: using(..., forward_only=True)"
        )
