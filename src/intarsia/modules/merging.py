"""Merging that looks at single entries: `ties`, `dare`, `magnitude`, `sparse_union`, and `svd` to a lower rank with its residual.

All work on the changes of the weights, multiplied out (`dense`); their results are as large as the weights they change.
Where all modules change chosen entries or columns only, the work is done on the entries that any of them has, and so is the
result: sparse modules stay sparse, and a share of the entries is one of those.  Factors whose matrix follows from a seed
and the layer's shape cannot be multiplied out without the model and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.modules.arithmetic import (
    assemble,
    check_layers,
    check_together,
    check_weights,
    combine,
    head_of,
    head_owners,
)
from intarsia.modules.module import Module
from intarsia.modules.terms import Term, kind_of, on_entries, patches_from, scattered, terms, united
from intarsia.patches import (
    Blocks,
    Columns,
    Core,
    Dense,
    Diag,
    FactorSpec,
    Free,
    Hadamard,
    Kron,
    KronPair,
    LowRank,
    Sparse,
    Sum,
)
from intarsia.patches.seeded import Stream

Scope = Literal["module", "tensor"]
Place = tuple[str, str]


def matrix(factor: FactorSpec, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor a factor stands for, in single precision or better.

    Args:
        shape: of the tensor, which a factor of some of its entries does not know.

    Raises:
        ModuleError: it follows from more than the tensors (a seed, the layer's shape).
    """
    if isinstance(factor, Sparse | Columns) and shape is not None:
        return scattered(factor, tensors, shape)
    wide = {leaf: t.to(torch.promote_types(t.dtype, torch.float32)) for leaf, t in tensors.items()}
    if isinstance(factor, Dense):
        return wide["value"]
    if isinstance(factor, LowRank):
        return wide["up"] @ wide["down"]
    if isinstance(factor, Diag):
        return torch.diag(wide["value"])
    if isinstance(factor, KronPair | Kron) and "rule.left" in wide:
        right = wide["up"] @ wide["down"] if "down" in wide else wide["up"]
        return torch.stack([torch.kron(a, b) for a, b in zip(wide["rule.left"], right)]).sum(0)
    if isinstance(factor, Core) and isinstance(factor.frame, Free):
        inner = matrix(factor.core, _below(wide, "core"))
        found = wide["frame.up"] @ inner @ wide["frame.down"]
        return found * wide["gain"][:, None] if "gain" in wide else found
    if isinstance(factor, Blocks):
        parts = [matrix(factor.factor, _below(wide, f"parts.{i}")) for i in range(factor.rows * factor.columns)]
        return torch.cat([torch.cat(parts[i : i + factor.columns], 1) for i in range(0, len(parts), factor.columns)])
    if isinstance(factor, Hadamard | Sum):
        members = [(part, _below(wide, f"parts.{i}")) for i, part in enumerate(factor.parts)]
        at = next((i for i, (part, _) in enumerate(members) if kind_of(part) is None), 0)
        first = matrix(*members[at], shape)  # says how large those are that hold some entries only
        several = torch.stack([first if i == at else matrix(*member, tuple(first.shape)) for i, member in enumerate(members)])
        return several.prod(0) if isinstance(factor, Hadamard) else several.sum(0)
    if kind_of(factor) is not None:
        raise ModuleError(
            "single entries meet whole columns or rows here, and how large the tensor is does not follow from the modules; use add, average or scale"
        )
    raise ModuleError(
        f"the matrix of a {type(factor).__name__.lower()!r} factor follows from its seed and the layer's shape and not from the module alone; "
        "use add, average or scale, which do not multiply it out"
    )


def _below(tensors: Mapping[str, Tensor], lead: str) -> dict[str, Tensor]:
    return {leaf.removeprefix(f"{lead}."): t for leaf, t in tensors.items() if leaf.startswith(f"{lead}.")}


def aligned(modules: Sequence[Module]) -> list[dict[Place, tuple[Term, Tensor]]]:
    """Every change of each module multiplied out, with the term it stands at; equal places have values of equal shape.

    A place is a whole tensor, or the entries (columns, rows) that any of the modules holds there: then the term's factor says
    which, by `index`.  A change beside a layer (`Affine`) and one of its weight (`Matrix`) are changes of the same matrix.
    """
    found: list[dict[Place, Any]] = [{(t.site, t.form): t for t, _ in combine([(1.0, term) for term in terms(module)])} for module in modules]
    places = {place: term for at in found for place, term in at.items()}
    for at in found:
        for (site, form), term in list(at.items()):
            other = places.get((f"{site}.weight", "matrix"))
            if form == "affine" and other is not None and term.patch.port == "out" and not (term.relative or other.relative):
                moved = replace(at.pop((site, form)), site=other.site, form="matrix", patch=other.patch)
                if (other.site, "matrix") in at:
                    moved = combine([(1.0, moved), (1.0, at[other.site, "matrix"])])[0][0]
                at[other.site, "matrix"] = moved
    for place in {place: None for at in found for place in at}:
        _align(place, [at for at in found if place in at])
    return found


def _align(place: Place, found: Sequence[dict[Place, Any]]) -> None:
    """Replace the terms at a place by terms with values of one shape."""
    here = [at[place] for at in found]
    kinds = {kind_of(term.factor) for term in here}
    if None not in kinds and len(kinds) == 1:
        index = united([term.tensors for term in here])
        for at, term in zip(found, here):
            value = on_entries(term.factor, term.tensors, index) * term.scale
            factor = Sparse() if isinstance(term.factor, Sparse) else term.factor
            at[place] = (replace(term, factor=factor, scale=1.0, tensors={"index": index}), value)
        return
    whole = next((term for term in here if kind_of(term.factor) is None), here[0])
    first = matrix(whole.factor, whole.tensors)  # says how large those are that hold some entries only
    for at, term in zip(found, here):
        value = first if term is whole else matrix(term.factor, term.tensors, tuple(first.shape))
        at[place] = (replace(term, factor=Dense()), value * term.scale)


def from_changes(modules: Sequence[Module], values: Mapping[Place, tuple[Term, Tensor]], name: str | None, head: str | None, operation: str, **settings: object) -> Module:
    """A module of dense or sparse changes (as `aligned` gives them), with the head that a sum of the modules would have."""
    found = []
    for term, value in values.values():
        tensors = {"value": value}
        if isinstance(term.factor, Sparse):
            kept = value != 0
            tensors = {"index": term.tensors["index"][kept], "values": value[kept]}
        elif isinstance(term.factor, Columns):
            tensors = {"index": term.tensors["index"], "values": value}
        new = replace(term, scale=1.0, tensors=tensors)
        found.append((new, (new,)))
    patches, whole = patches_from(found)
    owners = head_owners(modules, head)
    if len(owners) > 1:
        raise UsageError(f"several modules have a head; name the one the result has: head={owners[0].name!r}")
    for owner in owners:
        patch, held = head_of(owner)
        patches = (*patches, patch)
        whole |= held
    return assemble(modules, patches, whole, owners[0].labels if owners else None, name, operation, settings)


def dense(module: Module, *, name: str | None = None) -> Module:
    """The same module with every change multiplied out; chosen entries stay such."""
    return from_changes([module], aligned([module])[0], name, None, "dense")


def _check_share(what: str, value: float, low: bool = False) -> None:
    if not (0.0 <= value <= 1.0) or (low and value == 1.0):
        raise UsageError(f"{what} is a share from 0 to 1{' (below 1)' if low else ''}, found {value}")


def _trimmed(values: Mapping[Place, Tensor], keep: float, scope: Scope, count: Callable[[float], int] = round) -> dict[Place, Tensor]:
    """The largest entries by magnitude, exactly count(keep * n) of them; of equals the first by place."""

    def cut(flat: Tensor) -> Tensor:
        kept = torch.zeros(flat.numel(), dtype=torch.bool)
        kept[flat.abs().argsort(descending=True, stable=True)[: count(keep * flat.numel())]] = True
        return flat * kept

    order = sorted(values)
    if scope == "tensor":
        return {place: cut(values[place].flatten()).view_as(values[place]) for place in order}
    if scope != "module":
        raise UsageError(f"scope is 'module' or 'tensor', found {scope!r}")
    pieces = cut(torch.cat([values[place].flatten() for place in order])).split([values[place].numel() for place in order])
    return {place: piece.view_as(values[place]) for place, piece in zip(order, pieces)}


def magnitude(module: Module, keep: float, *, scope: Scope = "module", name: str | None = None) -> Module:
    """The entries of largest magnitude, the others zero.

    Args:
        keep: share of the entries.
        scope: the largest of the whole module, or of each tensor.
    """
    _check_share("keep", keep)
    values = aligned([module])[0]
    kept = _trimmed({place: value for place, (_, value) in values.items()}, keep, scope)
    return from_changes([module], {place: (term, kept[place]) for place, (term, _) in values.items()}, name, None, "magnitude", keep=keep, scope=scope)


def dare(module: Module, drop: float, seed: int = 0, *, name: str | None = None) -> Module:
    """Random entries dropped, the others divided by the share that stays (Yu et al. 2024, arXiv 2311.03099).

    The draw depends on the seed and the site only: it is the same in another process and for another module.
    """
    _check_share("drop", drop, low=True)
    values = {}
    for place, (term, value) in aligned([module])[0].items():
        stream = Stream(seed, "dare", *place)
        if isinstance(term.factor, Sparse):  # the draw of each entry is that of a whole tensor
            index = term.tensors["index"].long()
            drawn = stream.uniform(int(index[-1]) + 1)[index] if len(index) else value.double()
        else:
            drawn = stream.uniform(value.numel()).view(value.shape)
        values[place] = (term, value * (drawn >= drop) / (1.0 - drop))
    return from_changes([module], values, name, None, "dare", drop=drop, seed=seed)


Variant = Literal["paper", "peft", "mergekit"]
#: how many of `keep * n` entries stay: peft rounds down, and mergekit keeps one at least
_COUNTS: Mapping[Variant, Callable[[float], int]] = {"paper": round, "peft": int, "mergekit": lambda share: max(1, int(share)) if share > 0 else 0}
Elect = Literal["mass", "count"]


def ties(
    modules: Sequence[Module],
    keep: float = 0.2,
    *,
    weight: float = 1.0,
    weights: Sequence[float] | None = None,
    variant: Variant = "paper",
    elect: Elect = "mass",
    scope: Scope | None = None,
    name: str | None = None,
    head: str | None = None,
) -> Module:
    """Trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv 2306.01708).

    Of each module the largest entries stay; each entry's sign is that of the sum over the modules; the result is the mean of
    the entries that have this sign, times `weight`.

    Args:
        keep: share of the entries that stay.
        weight: lambda of the paper, on the result.
        weights: one per module; None for ones.  `peft` multiplies them in after the election and divides by the number of
            entries that agree; `mergekit` multiplies before the election and divides by the weights of those that agree;
            the paper has none.  Both round the number of entries down, and take an undecided election for the positive sign,
            where the paper's has no winner and the entry is zero.
        elect: the sign with more mass, or (`count`) the one of more modules.
        scope: where the largest are looked for; None for the variant's own (`paper`: module, the others: tensor).
    """
    _check_share("keep", keep)
    if len(modules) < 2:
        raise UsageError(f"ties merges two or more modules, found {len(modules)}")
    if variant not in ("paper", "peft", "mergekit") or elect not in ("mass", "count"):
        raise UsageError(f"ties: variant is 'paper', 'peft' or 'mergekit' and elect 'mass' or 'count', found {variant!r} and {elect!r}")
    if variant == "paper" and weights is not None:
        raise UsageError("ties of the paper has no weight for each module; use variant='peft' or variant='mergekit'")
    shares = torch.tensor(shares_of(modules, weights))
    changes = changes_of(modules, head)
    scope = scope or ("module" if variant == "paper" else "tensor")
    trimmed = [_trimmed({place: value for place, (_, value) in found.items()}, keep, scope, _COUNTS[variant]) for found in changes]
    result = {}
    for place, term in places_of(changes).items():
        here = [i for i, found in enumerate(changes) if place in found]
        stack = torch.stack([trimmed[i][place] for i in here])
        mine = shares[here].to(stack.dtype).view(-1, *[1] * (stack.dim() - 1))
        voting = stack * mine if variant == "mergekit" else stack
        sign = (voting if elect == "mass" else voting.sign()).sum(0).sign()
        sign = sign if variant == "paper" else torch.where(sign == 0, 1, sign)
        agree = (voting.sign() == sign) & (stack != 0)
        whole = (mine * agree).sum(0) if variant == "mergekit" else agree.sum(0).clamp(min=1)
        result[place] = (term, weight * (stack * mine * agree).sum(0) / torch.where(whole == 0, 1, whole))
    settings = {"keep": keep, "weight": weight, "variant": variant, "elect": elect, "scope": scope}
    return from_changes(modules, result, name, head, "ties", **settings, **({"weights": list(weights)} if weights is not None else {}))


def sparse_union(modules: Sequence[Module], *, name: str | None = None, head: str | None = None) -> Module:
    """Each entry that some module changes; where several do, the mean of those that do.

    Modules that touch different entries keep all they know, which an average would divide by their number.
    """
    shares_of(modules, None)
    changes = changes_of(modules, head)
    result = {}
    for place, term in places_of(changes).items():
        stack = torch.stack([found[place][1] for found in changes if place in found])
        result[place] = (term, stack.sum(0) / (stack != 0).sum(0).clamp(min=1))
    return from_changes(modules, result, name, head, "sparse_union")


def shares_of(modules: Sequence[Module], weights: Sequence[float] | None) -> list[float]:
    """One weight per module, ones for None; another number is refused."""
    shares = [1.0] * len(modules) if weights is None else list(weights)
    check_weights(modules, shares)
    return shares


def changes_of(modules: Sequence[Module], head: str | None) -> list[dict[Place, tuple[Term, Tensor]]]:
    """The changes of modules that go together; refuses others in the words of a sum."""
    check_together(modules)
    check_layers(term for module in modules for term in terms(module))
    head_owners(modules, head)
    return aligned(modules)


def places_of(changes: Sequence[Mapping[Place, tuple[Term, Tensor]]]) -> dict[Place, Term]:
    """Every place that some module changes, with a term that stands there."""
    places: dict[Place, Term] = {}
    for found in changes:
        for place, (term, _) in found.items():
            places.setdefault(place, term)
    return places


def svd(module: Module, rank: int, *, name: str | None = None) -> tuple[Module, float]:
    """The nearest module of a rank, and how far it is: ||W - W_r|| / ||W|| over all its matrices (Frobenius).

    Changes that have no higher rank, vectors, multipliers and chosen entries stay as they are.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, found {rank}")
    found, lost, whole = [], 0.0, 0.0
    for term, sources in combine([(1.0, term) for term in terms(module)]):
        new = term
        if kind_of(term.factor) is None and term.form != "const":
            value = matrix(term.factor, term.tensors).double()
            whole += float((value * term.scale).square().sum())
            small = isinstance(term.factor, LowRank) and term.factor.rank <= rank
            if value.dim() == 2 and not small and not term.relative and min(value.shape) > rank:
                u, s, vt = torch.linalg.svd(value, full_matrices=False)
                root = s[:rank].sqrt()
                lost += float((s[rank:] * term.scale).square().sum())
                sides = {"up": (u[:, :rank] * root).float(), "down": (root[:, None] * vt[:rank]).float()}
                new = replace(term, factor=LowRank(rank), tensors=sides)
        found.append((new, sources))
    patches, tensors = patches_from(found)
    head = [p for p in module.method.patches if p.port == "logits"]
    for patch in head:
        tensors |= {k: t for k, t in module.tensors.items() if k.partition("/")[2].startswith(f"{patch.name}.")}
    residual = math.sqrt(lost / whole) if whole else 0.0
    result = assemble([module], (*patches, *head), tensors, module.labels, name, "svd", {"rank": rank, "residual": residual})
    return result, residual
