"""Mixtures with a router, or of tensors, at one site: what `SlotAt` and folding share.

    out     the members' changes, with the weights that the router gives
    phi     the members' tensors, mixed into one module that runs once

What is not here: which mixtures are legal (`compose/legality.py`), and what weights were given (`report.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from intarsia.compose import Expr, Mix, Ref, expr
from intarsia.errors import CompositionError
from intarsia.patches import Delta, RouterForm
from intarsia.sites.address import Site, SiteMap


class Here(Protocol):
    """The part of `compose.At` that is needed."""

    algebra: Any

    def deltas(self, name: str) -> Sequence[Delta]: ...
    def change(self, delta: Delta, h: Any) -> Any: ...


def router_of(mix: Mix, at: Here) -> RouterForm:
    """The router's form at a site."""
    found = [d.form for d in at.deltas(mix.router or "") if isinstance(d.form, RouterForm)]
    if not found:
        raise CompositionError(f"the router {mix.router!r} has nothing at a site where a member of {mix} changes something")
    return found[0]


def answering(mix: Mix, h: Any, at: Any) -> Any:
    """The head of a mixture that is no plain sum: the router's own, else that of the one member that has one."""
    if mix.router is not None and at.deltas(mix.router):
        return Ref(mix.router).change(h, at)
    found = [change for part in mix.parts if (change := part.change(h, at)) is not None]
    if len(found) > 1:
        raise CompositionError(f"{len(found)} members of {mix} have a head and its router has none; name the one that answers: using(..., head='name')")
    return found[0] if found else None


def blended(mix: Mix, h: Any, at: Any) -> Any:
    """The change of one module whose tensors are the members' weighted sum."""
    members = [(i, found) for i, part in enumerate(mix.parts) if (found := at.deltas(part.name))]  # type: ignore[attr-defined]
    if not members:
        return None
    numbers, stacks = [i for i, _ in members], [list(deltas) for _, deltas in members]
    weights = at.weights_of(mix, h, numbers)
    if isinstance(weights, Tensor) and weights.dim() > 1:
        return _by_rows(weights, stacks, h, at)
    return _through(weights, stacks, h, at)


def _through(weights: Any, stacks: list[list[Delta]], h: Any, at: Any) -> Any:
    """One delta after the other, each with mixed tensors; `weights` has a number per member."""
    total, value = None, h
    for deltas in zip(*stacks):
        step = at.with_tensors(deltas[0], mixed(weights, deltas), value)
        value = at.algebra.join(value, step)
        total = step if total is None else at.algebra.plus(total, step)
    return total


def _by_rows(weights: Tensor, stacks: list[list[Delta]], h: Tensor, at: Any) -> Tensor:
    """Rows with equal weights run together."""
    rows = weights.shape[0]
    _, kind = torch.unique(weights.detach(), dim=0, return_inverse=True)
    each = h.shape[0] // rows
    out: Tensor | None = None
    for number in range(int(kind.max()) + 1):
        chosen = (kind == number).nonzero()[:, 0]
        spread = (chosen[:, None] * each + torch.arange(each, device=h.device)).flatten()
        change = _through(weights[chosen[0]], stacks, h[spread], at.of_rows(spread, h.shape[0]))
        out = change.new_zeros(h.shape[0], *change.shape[1:]) if out is None else out
        out = out.index_copy(0, spread, change)
    assert out is not None
    return out


def mixed(weights: Any, deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """The weighted sum of the stored tensors of deltas of the same kind.

    Raises:
        CompositionError: they hold whole numbers that differ (chosen entries), or tensors of other shapes.
    """
    found: dict[str, Tensor] = {}
    for name, first in deltas[0].state_dict(keep_vars=True).items():
        tensors = [delta.state_dict(keep_vars=True)[name] for delta in deltas]
        if any(t.shape != first.shape for t in tensors):
            raise CompositionError(f"{deltas[0].site.name}/{deltas[0].name}: {name} has other shapes in the members, so there is no mean of their tensors")
        if first.is_floating_point():
            total = sum(w * t for w, t in zip(weights, tensors))
            assert isinstance(total, Tensor)
            found[name] = total
        elif not all(torch.equal(t, first) for t in tensors):
            raise CompositionError(f"{deltas[0].site.name}/{deltas[0].name}: the members differ in {name}, which is no number to take a mean of; mix their changes instead (space=out)")
    return found


def members_of(over: Expr | str | Sequence[Expr | str], router: str) -> tuple[Expr, ...]:
    """The members a router is made for: those listed, or those of the mixture in an expression that names the router.

    Raises:
        CompositionError: the expression has no mixture of this router, or several with different members.
    """
    if not isinstance(over, Expr | str):
        return tuple(expr(member) for member in over)
    found = {mix.parts for mix in mixtures(expr(over)) if mix.router == router}
    if len(found) != 1:
        what = "several mixtures with different members" if found else "no mixture"
        raise CompositionError(f"{over} has {what} with router={router}; write e.g. fuse(a, b; router={router})")
    return found.pop()


def mixtures(e: Expr) -> Iterator[Mix]:
    """All mixtures in an expression."""
    if isinstance(e, Mix):
        yield e
    for child in e.children():
        yield from mixtures(child)


def covering(sites: SiteMap, wanted: Iterable[Site]) -> dict[str, str]:
    """Site patterns by port that select exactly some sites; those a router cannot weigh are left out."""
    found: dict[str, list[Site]] = {}
    for site in wanted:
        if site.port in ("out", "in", "weight"):
            found.setdefault(site.port, []).append(site)
    return {port: _pattern(sites, chosen) for port, chosen in sorted(found.items())}


def _pattern(sites: SiteMap, chosen: Sequence[Site]) -> str:
    """Short where all layers have the site, else name by name."""
    names, parts = {site.name for site in chosen}, []
    left = dict.fromkeys(site.name for site in sites.values() if site.name in names)
    for name in list(left):
        if name not in left:
            continue
        words = name.split(".")
        tail = ".".join(words[next((i for i, w in enumerate(words) if w.isdecimal()), -1) + 1 :])
        short = {s.name for s in sites.select(tail, port=chosen[0].port)} if tail else {name, ""}
        parts.append(tail if short <= names else name)
        for covered in short if short <= names else {name}:
            left.pop(covered, None)
    return ", ".join(parts)
