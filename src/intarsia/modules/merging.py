"""Merging that looks at single entries: `ties`, `dare`, `magnitude`, and `svd` to a lower rank with the residual reported.

All work on the changes of the weights, multiplied out (`dense`); their results are as large as the weights they change.
Factors whose matrix follows from a seed and the layer's shape cannot be multiplied out without the model and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.modules.arithmetic import add, assemble, check_together, combine
from intarsia.modules.module import Module
from intarsia.modules.terms import Term, patches_from, terms
from intarsia.patches import Blocks, Core, Dense, Diag, FactorSpec, Free, Hadamard, Kron, KronPair, LowRank, Sum
from intarsia.patches.seeded import Stream

Scope = Literal["module", "tensor"]
Place = tuple[str, str]


def matrix(factor: FactorSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor a factor stands for, in single precision or better.

    Raises:
        ModuleError: it follows from more than the tensors (a seed, the layer's shape).
    """
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
        several = torch.stack([matrix(part, _below(wide, f"parts.{i}")) for i, part in enumerate(factor.parts)])
        return several.prod(0) if isinstance(factor, Hadamard) else several.sum(0)
    raise ModuleError(
        f"the matrix of a {type(factor).__name__.lower()!r} factor follows from its seed and the layer's shape and not from the module alone; "
        "use add, average or scale, which do not multiply it out"
    )


def _below(tensors: Mapping[str, Tensor], lead: str) -> dict[str, Tensor]:
    return {leaf.removeprefix(f"{lead}."): t for leaf, t in tensors.items() if leaf.startswith(f"{lead}.")}


def _changes(module: Module) -> dict[Place, tuple[Term, Tensor]]:
    """Every change of a module multiplied out, with the term it stands at."""
    found: dict[Place, tuple[Term, Tensor]] = {}
    for term, _ in combine([(1.0, term) for term in terms(module)]):
        found[term.site, term.form] = (term, matrix(term.factor, term.tensors) * term.scale)
    return found


def _built(modules: Sequence[Module], values: Mapping[Place, tuple[Term, Tensor]], name: str | None, head: str | None, operation: str, **settings: object) -> Module:
    """A module of dense changes, with the head that a sum of the modules would have."""
    found = []
    for term, value in values.values():
        new = replace(term, factor=Dense(), scale=1.0, tensors={"value": value})
        found.append((new, (new,)))
    patches, tensors = patches_from(found)
    heads = [m for m in modules if m.method.head is not None]
    if head is None and len(heads) > 1:
        raise UsageError(f"several modules have a head; name the one the result has: head={heads[0].name!r}")
    owner = next((m for m in heads if head in (None, m.name)), None)
    if head is not None and owner is None:
        raise UsageError(f"head={head!r} is none of these modules with a head")
    if owner is not None:
        patch = next(p for p in owner.method.patches if p.port == "logits")
        patches = (*patches, patch)
        tensors |= {k: t for k, t in owner.tensors.items() if k.partition("/")[2].startswith(f"{patch.name}.")}
    return assemble(modules, patches, tensors, None if owner is None else owner.labels, name, operation, settings)


def dense(module: Module, *, name: str | None = None) -> Module:
    """The same module with every change multiplied out."""
    return _built([module], _changes(module), name, None, "dense")


def _check_share(what: str, value: float, low: bool = False) -> None:
    if not (0.0 <= value <= 1.0) or (low and value == 1.0):
        raise UsageError(f"{what} is a share from 0 to 1{' (below 1)' if low else ''}, found {value}")


def _trimmed(values: Mapping[Place, Tensor], keep: float, scope: Scope) -> dict[Place, Tensor]:
    """The largest entries by magnitude, exactly round(keep * n) of them; of equals the first by place."""

    def cut(flat: Tensor) -> Tensor:
        kept = torch.zeros(flat.numel(), dtype=torch.bool)
        kept[flat.abs().argsort(descending=True, stable=True)[: round(keep * flat.numel())]] = True
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
    values = _changes(module)
    kept = _trimmed({place: value for place, (_, value) in values.items()}, keep, scope)
    return _built([module], {place: (term, kept[place]) for place, (term, _) in values.items()}, name, None, "magnitude", keep=keep, scope=scope)


def dare(module: Module, drop: float, seed: int = 0, *, name: str | None = None) -> Module:
    """Random entries dropped, the others divided by the share that stays (Yu et al. 2024, arXiv 2311.03099).

    The draw depends on the seed and the site only: it is the same in another process and for another module.
    """
    _check_share("drop", drop, low=True)
    values = {}
    for place, (term, value) in _changes(module).items():
        stays = Stream(seed, "dare", *place).uniform(value.numel()).view(value.shape) >= drop
        values[place] = (term, value * stays / (1.0 - drop))
    return _built([module], values, name, None, "dare", drop=drop, seed=seed)


def ties(
    modules: Sequence[Module],
    keep: float = 0.2,
    *,
    weight: float = 1.0,
    scope: Scope = "module",
    name: str | None = None,
    head: str | None = None,
) -> Module:
    """Trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv 2306.01708).

    Of each module the largest entries stay; each entry's sign is that of the sum over the modules; the result is the mean of
    the entries that have this sign, times `weight`.

    Args:
        keep: share of the entries that stay.
        scope: `module` as in the paper; `tensor` as peft does it.
    """
    _check_share("keep", keep)
    if len(modules) < 2:
        raise UsageError(f"ties merges two or more modules, found {len(modules)}")
    check_together(modules)
    add(*modules, head=head or next((m.name for m in modules if m.method.head is not None), None))  # refuses what does not go together
    changes = [_changes(module) for module in modules]
    trimmed = [_trimmed({place: value for place, (_, value) in found.items()}, keep, scope) for found in changes]
    result = {}
    for place in dict.fromkeys(place for found in changes for place in found):
        term = next(found[place][0] for found in changes if place in found)
        stack = torch.stack([found[place] for found in trimmed if place in found])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        result[place] = (term, weight * (stack * agree).sum(0) / agree.sum(0).clamp(min=1))
    return _built(modules, result, name, head, "ties", keep=keep, weight=weight, scope=scope)


def svd(module: Module, rank: int, *, name: str | None = None) -> tuple[Module, float]:
    """The nearest module of a rank, and how far it is: ||W - W_r|| / ||W|| over all its matrices (Frobenius).

    Changes that have no higher rank, vectors and multipliers stay as they are.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, found {rank}")
    found, lost, whole = [], 0.0, 0.0
    for term, sources in combine([(1.0, term) for term in terms(module)]):
        new = term
        if term.form == "affine":
            value = matrix(term.factor, term.tensors).double()
            whole += float((value * term.scale).square().sum())
            if not (isinstance(term.factor, LowRank) and term.factor.rank <= rank) and min(value.shape) > rank:
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
