"""Folding: the change of an expression inside a *copy* of the base, as a plain transformers model.

The same expression is evaluated on the affine maps themselves (y = W x + b as data) instead of on activations, so a fold
equals the active expression whatever it is made of.  Order at a module: its weights, then what is added to or multiplied
on its output, then what rescales its input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.compose import Expr, Mix
from intarsia.compose.algebra import Algebra, Terms
from intarsia.errors import CompositionError
from intarsia.host.parts import bias_of, cut, paste, weight_of
from intarsia.host.routing import blended, router_of
from intarsia.host.socket import Slot
from intarsia.patches import Delta, Linear, WhyNot
from intarsia.sites.address import Site, SiteMap

_ORDER = {"weight": 0, "out": 1, "in": 2}


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Maps:
    """Algebra of affine maps."""

    def join(self, h: Linear, change: Linear) -> Linear:
        return Linear(_plus(h.weight, change.weight), _plus(h.bias, change.bias), h.origin)

    plus = join

    def mix(self, terms: Terms, members: int) -> Linear | None:
        total: Linear | None = None
        for weight, change in terms:
            scaled = Linear(
                None if change.weight is None else change.weight * weight,
                None if change.bias is None else change.bias * weight,
            )
            total = scaled if total is None else self.join(total, scaled)
        return total


class _FoldAt:
    """A slot whose deltas act on the affine map; the first that cannot is refused with its reason."""

    algebra: Algebra = _Maps()

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def deltas(self, name: str) -> Sequence[Delta]:
        return self.slot.of(name)

    def routed(self, mix: Mix, h: Linear) -> Linear | None:
        if mix.space == "phi":
            return blended(mix, h, self)
        changes = [(i, change) for i, part in enumerate(mix.parts) if (change := part.change(h, self)) is not None]
        if not changes:
            return None
        weights = self.weights_of(mix, h, [i for i, _ in changes])
        return self.algebra.mix([(weight, change) for weight, (_, change) in zip(weights, changes)], len(mix.parts))

    def weights_of(self, mix: Mix, h: Linear, members: Sequence[int]) -> list[float]:
        """Weights that are the same for every input."""
        if mix.router is None:
            return [mix.weights[i] for i in members]
        weights = router_of(mix, self).constant_weights(list(members), mix.top)
        if isinstance(weights, WhyNot):
            raise CompositionError(f"cannot fold {mix}: {weights.reason}")
        return [float(w) for w in weights]

    def with_tensors(self, delta: Delta, tensors: dict[str, Tensor], h: Linear) -> Linear:
        """The change of a delta that has other tensors."""
        other = copy.deepcopy(delta)
        other.load_state_dict({**other.state_dict(), **tensors})
        return self.change(other, h)

    def change(self, delta: Delta, h: Linear) -> Linear:
        change = delta.fold(h)
        if isinstance(change, WhyNot):
            raise CompositionError(f"cannot fold {delta.name!r} at {delta.site.name}: {change.reason}")
        return change


TIED = "its weight is tied to the word embeddings and would change both"


def tied_paths(sites: SiteMap) -> frozenset[str]:
    """Modules whose weight is another module's too."""
    return frozenset(path for site in sites.parameters() if len(site.owners) > 1 for path, _ in site.owners)


def why_not_foldable(
    e: Expr, slots: Sequence[tuple[Site, Slot]], sites: SiteMap, module_at: Callable[[str], nn.Module]
) -> str | None:
    """The first reason why an expression has no folded form, None if it has one."""
    names = {r.name for r in e.refs()}
    tied = tied_paths(sites)
    for site, slot in slots:
        mine = sorted(names & slot.names)
        if not mine:
            continue
        if site.port not in _ORDER:
            return f"{site.name}: port {site.port!r} is not a change of any weight"
        module = module_at(site.path)
        if site.port != "weight" and not _is_linear(module):
            return f"{site.name}: what enters here passes no linear layer it could be part of"
        for delta in (d for name in mine for d in slot.of(name)):
            change = delta.fold(_blank(site, module))
            if isinstance(change, WhyNot):
                return f"{site.name}: {change.reason}"
            if site.port != "weight" and change.bias is not None and module._parameters.get("bias") is None:
                return f"{site.name}: the layer has no bias, and a checkpoint of this architecture could not hold one"
            if site.port != "weight" and site.path in tied:
                return f"{site.name}: {TIED}"
    return None


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _blank(site: Site, module: nn.Module) -> Linear:
    """The untouched affine map at a site."""
    return Linear(weight_of(site, module), None if site.port == "weight" else bias_of(site, module))


@torch.no_grad()
def fold(
    bare: PreTrainedModel,
    e: Expr,
    slots: Sequence[tuple[Site, Slot]],
    sites: SiteMap,
    module_at: Callable[[str], nn.Module],
) -> PreTrainedModel:
    """Write the change of `e` into `bare`, a closed copy of the base.

    Args:
        slots: every site with deltas.
        module_at: module of a path in the base itself, which stays as it is.
    """
    names = {r.name for r in e.refs()}
    tied = tied_paths(sites)
    todo = [(s, slot) for s, slot in slots if not names.isdisjoint(slot.names)]
    for site, slot in sorted(todo, key=lambda pair: _ORDER[pair[0].port]):
        module = bare.get_submodule(site.path)
        origin = _blank(site, module_at(site.path))
        if site.port == "weight":
            _fold_parameter(module, site, slot, e, origin)
        else:
            if site.path in tied:
                raise CompositionError(f"cannot fold at {site.name}: {TIED}")
            _fold_linear(module, site, slot, e, origin)
    bare.tie_weights()
    return bare


def _fold_parameter(module: nn.Module, site: Site, slot: Slot, e: Expr, origin: Linear) -> None:
    value = module._parameters[site.param or "weight"]
    assert value is not None
    canonical = value.t() if site.transposed and value.dim() == 2 else value
    part = canonical if site.view is None else cut(canonical, site, dim=0)
    new = e.run(Linear(part.float(), None, origin), _FoldAt(slot)).weight.to(value.dtype)
    new = new if site.view is None else paste(canonical, new, site, dim=0)
    value.copy_(new.t() if site.transposed and value.dim() == 2 else new)


def _fold_linear(module: nn.Module, site: Site, slot: Slot, e: Expr, origin: Linear) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise CompositionError(f"cannot fold at {site.name}: {type(module).__name__} has no weight matrix there")
    transposed = type(module).__name__ == "Conv1D"
    bias = module._parameters.get("bias")
    canonical = weight.t() if transposed else weight
    view = site.view is not None and site.port == "out"
    part = cut(canonical, site, dim=0) if view else canonical
    part_bias = None if bias is None else (cut(bias, site, dim=0) if view else bias)
    new = e.run(Linear(part.float(), None if part_bias is None else part_bias.float(), origin), _FoldAt(slot))
    if new.bias is not None:
        if bias is None:
            raise CompositionError(
                f"cannot fold at {site.name}: the layer has no bias, and a checkpoint of this architecture could not hold one"
            )
        bias.copy_(paste(bias, new.bias.to(bias.dtype), site, dim=0) if view else new.bias.to(bias.dtype))
    matrix = new.weight.to(weight.dtype)
    matrix = paste(canonical, matrix, site, dim=0) if view else matrix
    weight.copy_(matrix.t() if transposed else matrix)

