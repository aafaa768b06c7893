"""New values of parameters, which peers store, and their changes, which modules hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.sites.address import Site
from intarsia.store.convert.folder import as_float


def base_value(weights: Mapping[str, Tensor], site: Site, like: Tensor | None = None) -> Tensor:
    """The base's own value of a site's parameter, as the model lays it out.

    Args:
        weights: `model.state_dict()`.
        like: a value that must have its shape.

    Raises:
        ModuleError: there is none, or it has another shape.
    """
    name = f"{site.path}.{site.param}"
    found = weights.get(name)
    if found is None:
        raise ModuleError(f"weights has no {name}; give model.state_dict() of the model whose sites these are")
    if like is not None and found.shape != like.shape:
        raise ModuleError(f"{name} has shape {tuple(like.shape)}, the base's has {tuple(found.shape)}")
    return as_float(found.detach().cpu())


def exact_change(value: Tensor, old: Tensor) -> Tensor:
    """`value - old`, in double precision where a single one would not give the value back when it is added again."""
    change = value - old
    return change if torch.equal(old + change, value) else value.double() - old.double()


def change_at(site: Site, value: Tensor, old: Tensor) -> Tensor:
    """What a module holds, (out, in), for a new value as the model lays it out."""
    return _turned(site, exact_change(value, old)).contiguous()


def value_at(site: Site, change: Tensor, old: Tensor) -> Tensor:
    """The new value, as the model lays it out, that a change (out, in) gives."""
    return (old + _turned(site, change)).to(old.dtype)


def _turned(site: Site, tensor: Tensor) -> Tensor:
    return tensor.T if site.transposed and tensor.dim() == 2 else tensor
