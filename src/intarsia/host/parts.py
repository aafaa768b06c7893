"""Parts of fused projections, and a layer's parameters as forms see them: (out, in), cut to a site's view."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia.sites.address import Site


def cut(h: Tensor, site: Site, dim: int = -1) -> Tensor:
    """The part of a fused projection that belongs to a site."""
    view = site.view
    assert view is not None
    grouped = h.unflatten(dim, (view.groups, -1))
    axis = dim if dim < 0 else dim + 1
    return grouped.narrow(axis, view.start, view.width).flatten(axis - 1, axis)


def paste(h: Tensor, part: Tensor, site: Site, dim: int = -1) -> Tensor:
    """`h` with a site's part replaced; `h` itself is left alone."""
    view = site.view
    assert view is not None
    axis = dim if dim < 0 else dim + 1
    grouped = h.unflatten(dim, (view.groups, -1))
    middle = part.unflatten(dim, (view.groups, view.width))
    tail = grouped.shape[axis] - view.start - view.width
    pieces = [grouped.narrow(axis, 0, view.start), middle, grouped.narrow(axis, view.start + view.width, tail)]
    return torch.cat(pieces, axis).flatten(axis - 1, axis)


def weight_of(site: Site, module: nn.Module) -> Tensor | None:
    """The base's parameter at a site as (out, in), cut to the view; a vector stays a vector, None if there is none."""
    parameter = module._parameters.get(site.param or "weight")
    if parameter is None:
        return None
    value: Tensor = parameter.detach()
    if value.dim() == 2 and (site.transposed or type(module).__name__ == "Conv1D"):
        value = value.t()
    return value if site.view is None or site.port == "in" else cut(value, site, dim=0)


def bias_of(site: Site, module: nn.Module) -> Tensor | None:
    """The bias beside the weight at a site, cut to the view; None if there is none."""
    parameter = module._parameters.get("bias")
    if parameter is None:
        return None
    value: Tensor = parameter.detach()
    return value if site.view is None or site.port == "in" else cut(value, site, dim=0)
