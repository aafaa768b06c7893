"""Expressions over modules: `Ref`, `Seq`, `Mix`.

    run(h)    = h + change(h)
    Ref(m)    the module's patches at this site, one after the other
    Seq(a, b) b sees what a left behind; Seq() is the base
    Mix(w_i e_i)   h + sum of w_i * change_i(h): all members see the same h; weights need not sum to one
    Mix(e_i, router="r")       the weights are what the module r makes of the call, of h and of the changes
    Mix(..., space="phi")      the members' tensors are mixed, and what comes out runs once

Operators: `a >> b` is Seq, `a + b`, `a - b`, `0.5 * a` build a Mix.  The text form is in `text.py`.

An expression knows nothing of models: it is evaluated at a site against an `At`, which gives the deltas of a module
there and the arithmetic of the site's values (`algebra.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from intarsia.compose.algebra import Algebra
from intarsia.errors import CompositionError

Space = Literal["out", "phi"]
SPACES: tuple[Space, ...] = ("out", "phi")
"""What a mixture mixes: the members' changes, or their tensors (factors), which then run as one module."""


class At(Protocol):
    """What an expression needs to be evaluated at one site."""

    algebra: Algebra

    def deltas(self, name: str) -> Sequence[Any]:
        """The deltas of a module at this site, in patch order; empty if it has none here."""

    def change(self, delta: Any, h: Any) -> Any:
        """The change one delta makes."""

    def routed(self, mix: Mix, h: Any) -> Any:
        """The change of a mixture that has a router or mixes tensors."""


class Expr:
    """Base class: the operators, and what every node answers."""

    __slots__ = ()

    def change(self, h: Any, at: At) -> Any:
        """The change of `h` at this site, or None if no member has anything here."""
        raise NotImplementedError

    def children(self) -> tuple[Expr, ...]:
        return ()

    def refs(self) -> Iterator[Ref]:
        """All module references, left to right, repeats included."""
        for child in self.children():
            yield from child.refs()

    def run(self, h: Any, at: At) -> Any:
        """The value of the site after this expression."""
        change = self.change(h, at)
        return h if change is None else at.algebra.join(h, change)

    def __rshift__(self, other: Expr | str) -> Expr:
        parts = (*_parts(self, Seq), *_parts(expr(other), Seq))
        return parts[0] if len(parts) == 1 else Seq(parts)

    def __rrshift__(self, other: str) -> Expr:
        return expr(other) >> self

    def __add__(self, other: Expr | str) -> Mix:
        return _sum(self, expr(other), 1.0)

    def __radd__(self, other: str) -> Mix:
        return expr(other) + self

    def __sub__(self, other: Expr | str) -> Mix:
        return _sum(self, expr(other), -1.0)

    def __rsub__(self, other: str) -> Mix:
        return expr(other) - self

    def __mul__(self, weight: float) -> Mix:
        return Mix(tuple(p for p, _ in _terms(self)), tuple(float(weight) * w for _, w in _terms(self)))

    def __rmul__(self, weight: float) -> Mix:
        return self * weight

    def __neg__(self) -> Mix:
        return self * -1.0

    def __truediv__(self, weight: float) -> Mix:
        return self * (1.0 / weight)

    def __str__(self) -> str:
        from intarsia.compose.text import show

        return show(self)


@dataclass(frozen=True, slots=True)
class Ref(Expr):
    """One module by name."""

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise CompositionError(f"a module reference needs a name, found {self.name!r}")

    def refs(self) -> Iterator[Ref]:
        yield self

    def change(self, h: Any, at: At) -> Any:
        total, value = None, h
        for delta in at.deltas(self.name):
            step = at.change(delta, value)
            value = at.algebra.join(value, step)
            total = step if total is None else at.algebra.plus(total, step)
        return total


@dataclass(frozen=True, slots=True)
class Seq(Expr):
    """Members in order; `Seq(())` is the base itself."""

    parts: tuple[Expr, ...] = ()

    def children(self) -> tuple[Expr, ...]:
        return self.parts

    def change(self, h: Any, at: At) -> Any:
        total, value = None, h
        for part in self.parts:
            step = part.change(value, at)
            if step is not None:
                value = at.algebra.join(value, step)
                total = step if total is None else at.algebra.plus(total, step)
        return total


@dataclass(frozen=True, slots=True)
class Mix(Expr):
    """Weighted sum of the members' changes (or, in `phi`, of their tensors).

    Attributes:
        weights: one number per member; empty under a router.
        router: name of the module that gives the weights.
        top: keep only so many of the largest weights, whatever the router itself keeps.
    """

    parts: tuple[Expr, ...]
    weights: tuple[float, ...] = ()
    router: str | None = None
    space: Space = "out"
    top: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise CompositionError("a mixture needs at least one member")
        if self.space not in SPACES:
            raise CompositionError(f"a mixture is of {' or '.join(SPACES)}, found space={self.space!r}")
        if self.router is not None:
            self._check_routed()
        elif len(self.parts) != len(self.weights):
            raise CompositionError(f"a mixture of {len(self.parts)} members has {len(self.weights)} weights")
        elif self.top is not None:
            raise CompositionError("top= keeps the largest of a router's weights; this mixture has fixed ones")
        for weight in self.weights:
            if not -1e6 < weight < 1e6:
                raise CompositionError(f"weight {weight} is not a number between -1e6 and 1e6")

    def _check_routed(self) -> None:
        if not isinstance(self.router, str) or not self.router:
            raise CompositionError(f"a router is a module's name, found {self.router!r}")
        if self.weights:
            raise CompositionError(f"the weights of this mixture come from router {self.router!r}, and {len(self.weights)} more are given")
        if self.router in {ref.name for part in self.parts for ref in part.refs()}:
            raise CompositionError(f"{self.router!r} cannot be the router and a member of the same mixture")
        if self.top is not None and not 1 <= self.top <= len(self.parts):
            raise CompositionError(f"top={self.top} of {len(self.parts)} members")

    @property
    def plain(self) -> bool:
        """Whether it is a sum with fixed weights, which other sums may be merged into."""
        return self.router is None and self.space == "out"

    def children(self) -> tuple[Expr, ...]:
        return self.parts

    def refs(self) -> Iterator[Ref]:
        for part in self.parts:
            yield from part.refs()
        if self.router is not None:
            yield Ref(self.router)

    def change(self, h: Any, at: At) -> Any:
        if not self.plain:
            return at.routed(self, h)
        changes = [(w, part.change(h, at)) for part, w in zip(self.parts, self.weights)]
        return at.algebra.mix([(w, c) for w, c in changes if c is not None], len(changes))


def _parts(e: Expr, kind: type) -> tuple[Expr, ...]:
    return e.children() if isinstance(e, kind) else (e,)


def _terms(e: Expr) -> tuple[tuple[Expr, float], ...]:
    return tuple(zip(e.parts, e.weights)) if isinstance(e, Mix) and e.plain else ((e, 1.0),)


def _sum(a: Expr, b: Expr, sign: float) -> Mix:
    terms = (*_terms(a), *((p, sign * w) for p, w in _terms(b)))
    return Mix(tuple(p for p, _ in terms), tuple(w for _, w in terms))


def average(*members: Expr | str) -> Mix:
    """Equal weights that sum to one: `average(a, a)` is `a`."""
    if not members:
        raise CompositionError("average() needs at least one member")
    first, *others = (expr(m) * (1.0 / len(members)) for m in members)
    for other in others:
        first = first + other
    return first


def fuse(*members: Expr | str, router: str, top: int | None = None, space: Space = "out") -> Mix:
    """A mixture whose weights a router gives: `fuse("mnli", "qqp", router="f")`."""
    return Mix(tuple(expr(m) for m in members), (), router, space, top)


def phi(mixture: Expr | str) -> Mix:
    """A sum of modules with its weights on their tensors: `phi("0.5*a + 0.5*b")` is one module with averaged tensors."""
    sum_ = expr(mixture)
    return Mix(tuple(p for p, _ in _terms(sum_)), tuple(w for _, w in _terms(sum_)), None, "phi")


def expr(value: Expr | str) -> Expr:
    """An expression from its text, or the expression itself."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        from intarsia.compose.text import parse

        return parse(value)
    raise CompositionError(f"expected an expression or its text, found {type(value).__name__} {value!r}")


@lru_cache(maxsize=4096)
def names(e: Expr) -> frozenset[str]:
    """Names of all modules an expression refers to."""
    return frozenset(ref.name for ref in e.refs())
