"""`Kind`: how one patch lies in peft's files; the table of all kinds is in `peft_kinds.py`.

A `Kind` says which of a layer's tensors belong together, at which port of the layer they enter, how each leaf is laid out,
and how form and op follow from the configuration and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.patches import Add, Affine, FactorSpec, FormSpec, OpSpec, Rot
from intarsia.store.convert.peft_config import Config

Tensors = Mapping[str, Tensor]
Entry = Literal["out", "weight", "in"]
Made = tuple[FormSpec, OpSpec]
Fields = dict[str, Any]

#: (theirs -> ours, ours -> theirs)
LAYOUTS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "same": (lambda t: t, lambda t: t),
    "turned": (lambda t: t.transpose(0, 1), lambda t: t.transpose(0, 1)),
    "column": (lambda t: t[:, 0], lambda t: t[:, None]),
    "row": (lambda t: t[0], lambda t: t[None]),
    "unstacked": (lambda t: t[None], lambda t: t[0]),
    "negated": (lambda t: -t, lambda t: -t),
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor: peft's name below the layer, our leaf, and how one is laid out in the other."""

    theirs: str
    ours: str
    layout: str = "same"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a file.

    Attributes:
        path: of the module in the model.
        shape: (out, in) of its weight.
        tensors: by peft's name below the layer.
        shared: tensors of the whole file.
        weight: the base's own, [out, in]; None where it is not known.
        added: ranks of the file's LoRA that undo what its initialisation took from the base.
    """

    path: str
    shape: tuple[int, int]
    tensors: Tensors
    shared: Tensors = field(default_factory=dict)
    weight: Tensor | None = None
    added: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """One patch that peft's tensors of a layer make.

    Attributes:
        peft_type: peft's name of the method.
        patch: our name of the patch.
        port: where it enters at the layer.
        leaves: names and layouts; all must be there.
        read: form and op from the configuration and the layer.
        write: fields of the configuration from form and op, None for another kind; fields that vary between layers are
            `r`, `alpha` and `scale`.
        build: our tensors, where they are more than a layout.
        unbuild: peft's tensors of a patch at a weight of some shape, where they are more than a layout.
        fits: a further condition on the layer.
        note: what a user must know of modules read so.
        optional: further tensors that `build` takes where they are there.
        table: of an embedding, whose weight is [n, d]; None for both.
    """

    peft_type: str
    patch: str
    port: Entry
    leaves: tuple[Leaf, ...]
    read: Callable[[Config, Layer], Made]
    write: Callable[[Patch], Fields | None] | None = None
    build: Callable[[Config, Layer], dict[str, Tensor]] | None = None
    unbuild: Callable[[Patch, Tensors, tuple[int, int]], dict[str, Tensor]] | None = None
    fits: Callable[[Config, Layer], bool] = lambda config, layer: True
    note: str = ""
    optional: tuple[str, ...] = ()
    table: bool | None = None

    def takes(self, config: Config, layer: Layer) -> bool:
        """Whether these tensors are of this kind."""
        return self.peft_type == config.kind and all(leaf.theirs in layer.tensors for leaf in self.leaves) and self.fits(config, layer)

    def uses(self, layer: Layer) -> set[str]:
        """Names of the tensors it takes from a layer."""
        return {leaf.theirs for leaf in self.leaves} | {name for name in self.optional if name in layer.tensors}

    def ours(self, config: Config, layer: Layer) -> dict[str, Tensor]:
        """Our tensors by leaf."""
        if self.build is not None:
            return self.build(config, layer)
        return {leaf.ours: LAYOUTS[leaf.layout][0](layer.tensors[leaf.theirs]) for leaf in self.leaves}

    def theirs(self, patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
        """peft's tensors by name below the layer, whose weight is of `shape` [out, in]."""
        if self.unbuild is not None:
            return self.unbuild(patch, tensors, shape)
        return {leaf.theirs: LAYOUTS[leaf.layout][1](tensors[leaf.ours]) for leaf in self.leaves}


def scale_of(config: Config, layer: Layer, alpha: str, rank: int) -> float:
    """alpha / r (or the root) after patterns; the rank the file's tensors have must be the one configured."""
    said = config.at("rank_pattern", "r", layer.path)
    if said != rank:
        raise ModuleError(f"{layer.path}: the configuration says rank {said}, the tensors have rank {rank}")
    value = float(config.at("alpha_pattern", alpha, layer.path))
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def turn(form: FormSpec) -> Made:
    """A rotation."""
    return form, Rot()


def turned(patch: Patch) -> FactorSpec | None:
    """The factor of a rotation."""
    form = patch.form
    return form.factor if isinstance(form, Affine) and form.read == "self" and isinstance(patch.op, Rot) else None


def added(patch: Patch) -> FactorSpec | None:
    """The factor of an unscaled change."""
    form = patch.form
    return form.factor if isinstance(form, Affine) and form.read == "input" and patch.op == Add() else None


def write_only(config: Config, layer: Layer) -> bool:
    """For kinds that another row reads."""
    return False
