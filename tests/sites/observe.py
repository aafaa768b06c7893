"""What a model does at its sites, noted by hooks during one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.sites import Site, SiteMap, View


def first(value: object) -> Tensor | None:
    """The first floating-point tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for entry in entries if (found := first(entry)) is not None), None)


def part(tensor: Tensor, view: View | None, dim: int = -1) -> Tensor:
    """The part of a tensor that a view describes, written independently of the library."""
    if view is None:
        return tensor
    size = tensor.shape[dim] // view.groups
    kept = [group * size + view.start + offset for group in range(view.groups) for offset in range(view.width)]
    return tensor.index_select(dim, torch.tensor(kept))


@dataclass
class Firing:
    """One time a site was reached: its tensor, and the latest inputs of the modules it refers to."""

    value: Tensor
    residual: Tensor | None
    reads: Tensor | None


@dataclass
class Observer:
    """Runs a model once; afterwards `firings[site name]` and `inputs[module path]` say what happened."""

    model: PreTrainedModel
    sites: SiteMap
    firings: dict[str, list[Firing]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def run(self, batch: dict[str, Tensor]) -> Any:
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(path)))
        try:
            with torch.no_grad():
                return self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = first(args) if first(args) is not None else first((kwargs.get("hidden_states"), kwargs))
            if value is not None:
                self.inputs.setdefault(path, []).append(value.clone())
                self._fire(path, "in", value)

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first(output)
            if value is not None:
                self.outputs.setdefault(path, []).append(value.clone())
                self._fire(path, "out", value)

        return hook

    def _fire(self, path: str, port: str, value: Tensor) -> None:
        for site in self.sites.values():
            if site.path == path and site.port == port:
                firing = Firing(part(value.clone(), site.view), self._latest(site.residual), self._latest(site.reads))
                self.firings.setdefault(site.name, []).append(firing)

    def _latest(self, path: str | None) -> Tensor | None:
        return None if path is None else self.inputs[path][-1]


def last(observer: Observer, site: Site | str) -> Firing:
    """The last time a site was reached."""
    return observer.firings[site if isinstance(site, str) else site.name][-1]
