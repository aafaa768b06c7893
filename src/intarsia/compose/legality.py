"""What an expression may not do, decided from specifications before any forward: heads that contradict, mixtures of
prefixes of unequal length, masks (`masking.py`).  The same arithmetic (`algebra.py`) is run on stand-ins that know only length and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.compose.algebra import BLOCKS, LOGITS, Algebra
from intarsia.compose.expr import Expr, Mix, Ref, Seq, names
from intarsia.compose.masking import check_masks
from intarsia.errors import CompositionError, listing, nearest


@dataclass(frozen=True, slots=True)
class Carried:
    """What a module has at one site.

    Attributes:
        port: of the site.
        template: forms and ops there; equal ones have the same tensors.
        tied: its tensors are not all its own.
    """

    port: str
    template: object = None
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Weighs:
    """What a router is for.

    Attributes:
        parts: the members it was made for, as text, in order.
        sites: where it gives weights.
        reads_changes: it looks at the members' changes.
        rows: its weights depend on what comes, row by row.
        keys: of the call's context, that say which weights count.
        parameters: it weighs changes of parameters too.
        tokens: its weights differ between the tokens of a row.
    """

    parts: tuple[str, ...]
    sites: frozenset[str]
    reads_changes: bool = True
    rows: bool = True
    keys: frozenset[str] = frozenset()
    parameters: bool = False
    tokens: bool = True


@dataclass(frozen=True, slots=True)
class Traits:
    """What legality needs to know of a module.

    Attributes:
        labels: label names of its head, None if it has none.
        blocks: lengths of what it puts in front of a sequence or a memory, by site name.
        invertible: it changes the input embeddings, and the output embedding needs the inverse.
        unembeds: it has a language-model head.
        sites: what it changes where; heads are not among them.
        weighs: it is a router.
        masks: parameters of which it decides what counts.
    """

    labels: tuple[str, ...] | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)
    invertible: bool = False
    unembeds: bool = False
    sites: Mapping[str, Carried] = field(default_factory=dict)
    weighs: Weighs | None = None
    masks: frozenset[str] = frozenset()


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
    """A site whose deltas are stand-ins."""

    def __init__(self, algebra: Algebra, values: Mapping[str, Any]) -> None:
        self.algebra = algebra
        self.values = values

    def deltas(self, name: str) -> Sequence[Any]:
        return (self.values[name],) if name in self.values else ()

    def change(self, delta: Any, h: Any) -> Any:
        return delta

    def routed(self, mix: Mix, h: Any) -> Any:
        found = [change for part in mix.parts if (change := part.change(h, self)) is not None]
        if self.algebra is BLOCKS:
            if found and (mix.router is not None or len({sum(b.length for b in change) for change in found}) > 1):
                raise CompositionError(f"{mix} mixes prefixes or prompts, which stand one after the other: put them outside, `a >> fuse(...)`, or use fixed weights")
            return found[0] if found else None
        if mix.router is not None and mix.router in self.values:
            return self.values[mix.router]
        if len(found) > 1:
            raise CompositionError(
                f"{len(found)} members of {mix} have a head ({listing([f.owner for f in found])}) and its router has none; name the one that answers: "
                f"using(..., head={found[0].owner!r}) (--head)"
            )
        return found[0] if found else None


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
    if (unembeds and all(known[n].labels is None for n in names(e))) or any(known[n].unembeds for n in names(e)):
        _check_inverse(e, known)
    _check_routes(e, known)
    masks = {n: known[n].masks for n in names(e) if known[n].masks}
    if masks:
        check_masks(e, masks, {n: frozenset(known[n].sites) for n in names(e)})
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


def _check_routes(e: Expr, known: Mapping[str, Traits]) -> None:
    """Routers stand where routers belong, with the members they were made for, and have weights wherever one is needed."""
    if isinstance(e, Ref) and known[e.name].weighs is not None:
        members = ", ".join(known[e.name].weighs.parts)  # type: ignore[union-attr]
        raise CompositionError(f"{e.name!r} is a router, it changes nothing by itself; write fuse({members}; router={e.name})")
    if isinstance(e, Mix):
        if e.space == "phi":
            _check_tensors(e, known)
        if e.router is not None:
            _check_router(e, e.router, known)
    for child in e.children():
        _check_routes(child, known)


def _check_router(e: Mix, name: str, known: Mapping[str, Traits]) -> None:
    weighs = known[name].weighs
    if weighs is None:
        raise CompositionError(f"{name!r} is no router, so it gives no weights; routers here: {listing(n for n, t in known.items() if t.weighs is not None) or 'none'}")
    parts = tuple(str(part) for part in e.parts)
    if parts != weighs.parts:
        raise CompositionError(
            f"router {name!r} was made for the members {', '.join(weighs.parts)} in this order, and here are {', '.join(parts)}; "
            f"write fuse({', '.join(weighs.parts)}; router={name}), or make another router for these"
        )
    if e.space == "phi" and weighs.reads_changes:
        raise CompositionError(f"router {name!r} looks at what its members change, and in space=phi their tensors are mixed before; use space=out")
    if e.space == "phi" and weighs.tokens:
        raise CompositionError(
            f"router {name!r} weighs each token, and in space=phi a row runs one module; use space=out, or a router by example, task or model"
        )
    for member in sorted({ref.name for part in e.parts for ref in part.refs()}):
        for site, carried in known[member].sites.items():
            if carried.port not in ("mem", "seq") and site not in weighs.sites and known[member].weighs is None:
                raise CompositionError(
                    f"member {member!r} changes {site} (port {carried.port}), and router {name!r} has no weights there; make it for these members: "
                    f"host.router({name!r}, ..., over={str(e.parts[0])!r}, ...) (intarsia train --method ... --expr)"
                )
            if carried.port == "weight" and weighs.rows and e.space == "out":
                raise CompositionError(
                    f"member {member!r} changes the parameter {site}, and router {name!r} weighs each input anew; use a router whose weights are the same for a "
                    "whole call (by model or task), or members that change activations"
                )


def _check_tensors(e: Mix, known: Mapping[str, Traits]) -> None:
    """Tensors are mixed where members are of the same kind."""
    members = []
    for part in e.parts:
        if not isinstance(part, Ref):
            raise CompositionError(f"{part} is no single module, and phi mixes the tensors of modules; mix their changes instead (space=out)")
        members.append(part.name)
    first = known[members[0]].sites
    for name in members:
        sites = known[name].sites
        for site in {**first, **sites}:
            a, b = first.get(site), sites.get(site)
            if a is None or b is None or a.template != b.template:
                raise CompositionError(
                    f"{members[0]!r} and {name!r} are not of the same kind at {site}, so there is no mean of their tensors; mix their changes instead (space=out)"
                )
            if b.tied:
                raise CompositionError(f"{name!r} shares tensors between sites, and those have no weights of a site; mix changes instead (space=out)")
