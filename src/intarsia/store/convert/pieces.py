"""`Piece`: what a peer's tensors are at one site, and pieces put together as a method."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Method, Patch, Policy, PortName
from intarsia.modules.terms import spelled
from intarsia.patches import FormSpec, OpSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """One patch at one site.

    Attributes:
        name: of the patch.
        tensors: by leaf.
    """

    site: str
    name: str
    form: FormSpec
    op: OpSpec
    port: PortName
    tensors: Mapping[str, Tensor] = field(repr=False)
    tag: str = ""


def together(name: str, pieces: Sequence[Piece], policy: Policy | None = None, source: str = "") -> tuple[Method, dict[str, Tensor]]:
    """A method and its tensors; sites with the same form and op share a patch whose pattern names exactly them."""
    groups: dict[tuple[object, ...], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.name, piece.port, piece.form, piece.op, piece.tag), []).append(piece)
    patches: list[Patch] = []
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for members in groups.values():
        first = members[0]
        counts[first.name] = counts.get(first.name, 0) + 1
        unique = first.name if counts[first.name] == 1 else f"{first.name}_{counts[first.name]}"
        at = spelled({piece.site for piece in members})
        patches.append(Patch(unique, at, first.form, first.op, first.port, tag=first.tag))
        for piece in members:
            tensors |= {f"{piece.site}/{unique}.{leaf}": tensor for leaf, tensor in piece.tensors.items()}
    return Method(name, tuple(patches), policy or Policy(), source), tensors


def sparse_leaves(index: Tensor, values: Tensor, size: int) -> dict[str, Tensor]:
    """Leaves of a `Sparse` factor of `size` entries: rising flat positions and their values."""
    return {"factor.index": index.to(torch.int32 if size < 2**31 else torch.int64), "factor.values": values.contiguous()}


def check_alone(taken: Container[object], place: object, where: str) -> None:
    """Refuse a second patch where a peer's file has room for one.

    Args:
        taken: places that have their patch.

    Raises:
        ModuleError: `place` is among them.
    """
    if place in taken:
        raise ModuleError(f"{where}: two patches of one kind, and the file has room for one; add what can be added up first: intarsia.modules.arithmetic.scale(module, 1.0)")
