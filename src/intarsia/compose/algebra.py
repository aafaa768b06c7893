"""The arithmetic of the values that sites hold: `join`, `plus`, `mix`.

| values | sites | join(h, c) | mix |
|---|---|---|---|
| tensors | activations, weights | h + c | sum of w * c |
| blocks | attention memory, token sequence | h and c one after the other | weighted sum, equal lengths only |
| logits | heads | c takes the place of h | weighted mean over members that have a head |

A member that has nothing at a site contributes nothing there; for blocks, whose absence is not a zero vector, this is
legal only if all weights of contributing members are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from intarsia.errors import CompositionError

Terms = Sequence[tuple[float, Any]]


class Algebra(Protocol):
    """Arithmetic of one kind of value."""

    def join(self, h: Any, change: Any) -> Any: ...
    def plus(self, a: Any, b: Any) -> Any: ...
    def mix(self, terms: Terms, members: int) -> Any: ...


class _Tensors:
    """Activations and weights: a vector space."""

    def join(self, h: Any, change: Any) -> Any:
        return h + change

    plus = join

    def mix(self, terms: Terms, members: int) -> Any:
        total = None
        for weight, change in terms:
            scaled = change if weight == 1.0 else change * weight
            total = scaled if total is None else total + scaled
        return total


class _Blocks:
    """Tuples of blocks: concatenation."""

    def join(self, h: Any, change: Any) -> Any:
        return (*h, *change)

    plus = join

    def mix(self, terms: Terms, members: int) -> Any:
        if not terms:
            return None
        if all(w == 1.0 for w, _ in terms) and len(terms) == 1:
            return terms[0][1]
        lengths = [tuple(b.length for b in change) for _, change in terms]
        if len(terms) < members or len(set(lengths)) > 1:
            raise CompositionError(
                f"a weighted mixture of prefixes or prompts needs members of equal length, found {lengths} and "
                f"{members - len(terms)} member(s) without one; use `a >> b` to put them one after the other"
            )
        mixed = []
        for blocks in zip(*(change for _, change in terms)):
            parts = [b.scaled(w) for (w, _), b in zip(terms, blocks)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            mixed.append(total)
        return tuple(mixed)


class _Logits:
    """Heads: at most one speaks, or several with the same labels are averaged."""

    def join(self, h: Any, change: Any) -> Any:
        if h is not None:
            raise CompositionError(
                "two modules of this expression have a head; name the one that answers: using(..., head='name')"
            )
        return change

    plus = join

    def mix(self, terms: Terms, members: int) -> Any:
        if not terms:
            return None
        if len(terms) == 1:
            return terms[0][1]
        total = sum(w for w, _ in terms)
        if total == 0:
            raise CompositionError("the weights of the heads sum to zero, so their mean does not exist")
        return sum(c * (w / total) for w, c in terms)


TENSORS: Algebra = _Tensors()
BLOCKS: Algebra = _Blocks()
LOGITS: Algebra = _Logits()
