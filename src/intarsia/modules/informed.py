"""Merging that knows how each module was used: `fisher` and `regmean`, from statistics that `intarsia.host.statistics` collects.

Both are written for whole weights W_0 + D_i and hold for the changes D_i alone, since their weights sum to one.

* Fisher: every entry is the mean of the modules' entries, weighted by how much each module's outputs depend on it
  (Matena & Raffel 2022, arXiv 2111.09832).
* RegMean: the matrix whose outputs are nearest to every module's outputs on that module's inputs, in closed form
  (Jin et al. 2023, arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError, listing
from intarsia.modules.merging import Place, changes_of, from_changes, places_of, shares_of
from intarsia.modules.module import Module
from intarsia.modules.terms import Term, kind_of
from intarsia.patches import Columns, Sparse


def fisher(
    modules: Sequence[Module],
    statistics: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-12,
    name: str | None = None,
    head: str | None = None,
) -> Module:
    """sum w_i F_i D_i / sum w_i F_i, entry by entry.

    Args:
        statistics: per module, by the name of a site, the mean squared gradient of every entry that is changed there: a
            tensor of the change's shape, for every site that any of the modules changes.
        floor: added to every F, so that an entry no module cares for becomes the mean.

    Raises:
        UsageError: statistics are missing, of another shape, negative, or not one set per module.
    """
    shares = shares_of(modules, weights)
    changes = changes_of(modules, head)
    _one_each(modules, statistics)
    result: dict[Place, tuple[Term, Tensor]] = {}
    for place, term in places_of(changes).items():
        shape = next(found[place][1].shape for found in changes if place in found)
        top, whole = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for module, share, found, known in zip(modules, shares, changes, statistics):
            importance = _importance(module, known, term, shape)
            if bool((importance < 0).any()):
                raise UsageError(f"Fisher statistics of {module.name!r} at {term.site} are negative; they are squares of gradients")
            importance = share * (importance.double() + floor)
            whole += importance
            if place in found:
                top += importance * found[place][1]
        result[place] = (term, (top / whole).float())
    return from_changes(modules, result, name, head, "fisher", weights=shares, floor=floor)


def regmean(
    modules: Sequence[Module],
    statistics: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    shrink: float = 0.9,
    name: str | None = None,
    head: str | None = None,
) -> Module:
    """(sum D_i G_i) (sum G_i)^-1 for every matrix; vectors, multipliers, embeddings and chosen entries are averaged.

    Args:
        statistics: per module, by the name of a site, the Gram matrix X^T X [d_in, d_in] of the layer's inputs with that module.
        weights: one per module, on its Gram matrices; None for equal ones.
        shrink: factor on what is off the diagonal of a Gram matrix (the paper's alpha), against singular ones.

    Raises:
        UsageError: statistics are missing, of another shape, or not one set per module.
    """
    shares = shares_of(modules, weights)
    changes = changes_of(modules, head)
    _one_each(modules, statistics)
    if not 0.0 <= shrink <= 1.0:
        raise UsageError(f"shrink is a share from 0 to 1, found {shrink}")
    result: dict[Place, tuple[Term, Tensor]] = {}
    for place, term in places_of(changes).items():
        value = next(found[place][1] for found in changes if place in found)
        heard = term.form == "affine" or any(term.site in known for known in statistics)  # an embedding has no inputs to multiply
        if not heard or term.relative or value.dim() != 2 or kind_of(term.factor) is not None:
            mean = sum((s * f[place][1] for s, f in zip(shares, changes) if place in f), torch.zeros_like(value)) / sum(shares)
            result[place] = (term, mean)
            continue
        width = value.shape[1]
        top, whole = torch.zeros(value.shape, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for module, share, found, known in zip(modules, shares, changes, statistics):
            gram = share * _known(module, known, term.site, (width, width)).double()
            gram = gram * shrink + torch.diag(gram.diagonal()) * (1.0 - shrink)
            whole += gram
            if place in found:
                top += found[place][1].double() @ gram
        result[place] = (term, _solved(top, whole).float())
    return from_changes(modules, result, name, head, "regmean", weights=shares, shrink=shrink)


def _solved(top: Tensor, whole: Tensor) -> Tensor:
    """top @ whole^-1, with the least ridge that makes it well posed; a direction nobody used gives no change."""
    ridge = 1e-9 * float(whole.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(whole + ridge * torch.eye(len(whole), dtype=whole.dtype), top, left=False)


def _one_each(modules: Sequence[Module], statistics: Sequence[Mapping[str, Tensor]]) -> None:
    if isinstance(statistics, Mapping) or len(statistics) != len(modules):
        raise UsageError(f"{len(modules)} modules and {len(statistics)} sets of statistics: give one for each module ({listing(m.name for m in modules)})")


def _importance(module: Module, known: Mapping[str, Tensor], term: Term, shape: Sequence[int]) -> Tensor:
    """The Fisher statistics at a place; of single entries those of the whole tensor, where they are."""
    found = known.get(term.site)
    if found is None or not isinstance(term.factor, Sparse | Columns):
        return _known(module, known, term.site, shape)
    index, axis = term.tensors["index"].long(), 1 if isinstance(term.factor, Columns) and not term.factor.rows else 0
    flat = found.reshape(-1) if isinstance(term.factor, Sparse) else found
    if flat.dim() <= axis or (len(index) and flat.shape[axis] <= int(index[-1])):
        raise UsageError(f"statistics of {module.name!r} at {term.site} have shape {tuple(found.shape)}; an entry that is changed lies beyond that")
    return _known(module, {term.site: flat.index_select(axis, index)}, term.site, shape)


def _known(module: Module, known: Mapping[str, Tensor], site: str, shape: Sequence[int]) -> Tensor:
    found = known.get(site)
    if found is None:
        raise UsageError(f"statistics of {module.name!r} lack the site {site}, which one of the modules changes; they have {listing(sorted(known)) or 'none'}")
    if tuple(found.shape) != tuple(shape):
        raise UsageError(f"statistics of {module.name!r} at {site} have shape {tuple(found.shape)}, expected {tuple(shape)}")
    if not bool(torch.isfinite(found).all()):
        raise ModuleError(f"statistics of {module.name!r} at {site} hold NaN or infinite values")
    return found
