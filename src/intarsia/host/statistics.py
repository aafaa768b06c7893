"""What merging may want to know of a module in use: `diagonal_fisher` and `grams`, per site, from batches.

Both run the model with an expression and leave it as it was.  The numbers are about the weights that a change is added to
(at W + D, the gradient by W is the gradient by D).  What is not here: merging (`intarsia.modules.informed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.compose import Expr
from intarsia.errors import UsageError, listing
from intarsia.host.host import Host
from intarsia.host.parts import cut
from intarsia.host.probe import Batch, evaluating, inputs_of
from intarsia.sites.address import Site

Loss = Callable[[Any, Batch], Tensor]


def diagonal_fisher(
    host: Host, expression: Expr | str | None, batches: Iterable[Batch], *, loss: Loss | None = None, sites: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of each weight, by site; [d_out, d_in] or [d].

    Args:
        batches: inputs of the model; every tensor has the rows first. Each row is run alone.
        loss: from the model's output and the row's inputs; None for the loss the model gives for its `labels`.
        sites: names; None for all that the host's modules change.

    Raises:
        UsageError: a site has no weight of its own, there are no rows, or nothing gives a loss.
    """
    wanted = _wanted(host, sites)
    weights = {name: _parameter(host, site) for name, site in wanted.items()}
    sums = {name: torch.zeros_like(_oriented(site, host.model.get_submodule(site.path), weights[name].detach()), dtype=torch.float32) for name, site in wanted.items()}
    rows = 0
    with _differentiable(weights.values()), evaluating(host.model), torch.enable_grad(), host.using(expression) as model:
        for batch in batches:
            for place in range(len(next(iter(batch.values())))):
                row = {key: value[place : place + 1] for key, value in batch.items()}
                given = row if loss is None else inputs_of(row)
                output = model(**given)
                value = output.get("loss") if loss is None else loss(output, row)
                if value is None:
                    raise UsageError("the model gives no loss for these inputs: put 'labels' into the batches, or give loss=function(output, row)")
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for (name, site), gradient in zip(wanted.items(), found):
                    if gradient is not None:
                        sums[name] += _oriented(site, host.model.get_submodule(site.path), gradient).float().square()
                rows += 1
    if not rows:
        raise UsageError("there are no rows to take statistics from")
    return {name: (value / rows).cpu() for name, value in sums.items()}


def grams(host: Host, expression: Expr | str | None, batches: Iterable[Batch], *, sites: Sequence[str] | None = None) -> dict[str, Tensor]:
    """X^T X of the inputs of each linear layer, by site, [d_in, d_in]; positions that `attention_mask` hides are left out.

    Args:
        batches, sites: as for `diagonal_fisher`.

    Raises:
        UsageError: there are no rows.
    """
    wanted = {name: site for name, site in _wanted(host, sites).items() if _is_map(site, host.model.get_submodule(site.path))}
    found: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def read(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().float()
            if mask[0] is not None and x.shape[:-1] == mask[0].shape:
                x = x[mask[0].bool()]
            x = x.reshape(-1, x.shape[-1])
            found[name] = x.T @ x + found.get(name, 0.0)

        return hook

    handles = [host.model.get_submodule(site.path).register_forward_pre_hook(read(name)) for name, site in wanted.items()]
    try:
        with evaluating(host.model), host.using(expression) as model:
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                model(**inputs_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in wanted if name not in found]
    if silent:
        raise UsageError(f"there are no rows, or the layers at {listing(silent)} did not run")
    return {name: value.cpu() for name, value in found.items()}


def _wanted(host: Host, names: Sequence[str] | None) -> dict[str, Site]:
    if names is not None:
        return {name: host.sites[name] for name in names}
    return {site.name: site for module in host.names for site, _ in host.deltas(module) if site.port != "logits"}


def _is_map(site: Site, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    reads = site.port in ("in", "out") or (site.port == "weight" and site.name.endswith(".weight"))
    return reads and weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _parameter(host: Host, site: Site) -> nn.Parameter:
    module = host.model.get_submodule(site.path)
    found = module._parameters.get(site.param or "weight")
    if found is None or (site.port not in ("in", "out", "weight")) or not found.is_floating_point():
        raise UsageError(f"{site.name} (port {site.port!r}) has no weight of its own, so that there is no gradient by it")
    return found


def _oriented(site: Site, module: nn.Module, value: Tensor) -> Tensor:
    """(out, in), cut to the site's view, as changes are."""
    if value.dim() == 2 and (site.transposed or type(module).__name__ == "Conv1D"):
        value = value.t()
    return value if site.view is None or site.port == "in" else cut(value, site, dim=0)


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters inside; afterwards each is as it was."""
    flags = {id(p): (p, p.requires_grad) for p in parameters}
    try:
        for parameter, _ in flags.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.values():
            parameter.requires_grad_(flag)
