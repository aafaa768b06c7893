"""Tensors between the deltas on a model and a module as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, SpecError, listing
from intarsia.host.build import Built
from intarsia.host.record import Entry
from intarsia.methods import Method
from intarsia.modules import Module


def whole(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU; of a sharded tensor all of it (every rank must call)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().clone()


def flattened(entry: Entry, context: Mapping[str, Any]) -> tuple[Method, dict[str, Tensor]]:
    """Method and tensors with every exportable form in its plain form under a context."""
    specs: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    keep = entry.built.tensors()
    for site, deltas in entry.built.deltas:
        for delta in deltas:
            exported = delta.form.export_for(context)
            prefix = f"{site.name}/{delta.name}."
            if exported is None:
                tensors.update({k: t for k, t in keep.items() if k.startswith(prefix)})
                continue
            spec, plain = exported
            if specs.setdefault(delta.name, spec) != spec:
                raise SpecError(f"patch {delta.name!r} exports to different forms at different sites")
            tensors.update({prefix + k: t for k, t in plain.items()})
    patches = tuple(replace(p, form=specs.get(p.name, p.form)) for p in entry.method.patches)
    return replace(entry.method, patches=patches), {**keep, **tensors}


def make_room(built: Built, tensors: Mapping[str, Tensor]) -> None:
    """Let parts whose number of entries is the module's own (`adopt`) take the sizes of stored tensors.

    Raises:
        ModuleError: a stored pair is not positions and values of the tensor there; the name of its site is given.
    """
    for site, deltas in built.deltas:
        for delta in deltas:
            for path, part in delta.form.named_modules():
                if not hasattr(part, "adopt"):
                    continue
                prefix = f"{site.name}/{delta.name}." + (f"{path}." if path else "")
                leaves = {leaf: tensors[prefix + leaf] for leaf in ("index", "values") if prefix + leaf in tensors}
                if len(leaves) == 2:
                    try:
                        part.adopt(leaves)
                    except ModuleError as error:
                        raise ModuleError(f"{prefix}: {error}") from None


def fill(built: Built, module: Module) -> None:
    """Copy a module's tensors into freshly built deltas, strictly.

    Raises:
        ModuleError: counts and first names of what is missing, extra or of another shape.
    """
    make_room(built, module.tensors)
    wanted = built.tensors()
    problems = []
    for what, keys in (
        ("missing", [k for k in wanted if k not in module.tensors]),
        ("unexpected", [k for k in module.tensors if k not in wanted]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} ({listing(keys, 5)})")
    shapes = [
        f"{k}: {tuple(module.tensors[k].shape)} in the file, {tuple(t.shape)} on this model"
        for k, t in wanted.items()
        if k in module.tensors and module.tensors[k].shape != t.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({listing(shapes, 3)})")
    if problems:
        raise ModuleError(f"module {module.name!r} does not fit this model: {'; '.join(problems)}")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(module.tensors[key])
