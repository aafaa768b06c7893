"""What writers of AdapterHub's folders share: one configuration for all layers, and the words in front of keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import Patch
from intarsia.sites.address import Site, SiteMap

#: of adapters, whose files these are
VERSION = "adapters.1.3.0"
Fields = dict[str, Any]
Item = tuple[Site, Patch, dict[str, Tensor]]
_FIRST = re.compile(r"(.*?)(?:encoder\.layer|transformer\.layer|encoder\.block|encoder\.layers|h|layers)\.0")


@dataclass
class Writing:
    """A module on its way into a folder.

    Attributes:
        name: of the adapter.
        model_type: `config.model_type` of the model.
        tied: tensors that all sites share, by our key; taken by who writes them.
        notes: what a user must know of the result.
    """

    sites: SiteMap
    name: str
    model_type: str
    tied: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def lead(self) -> str:
        """What stands in front of the base model's own keys: `bert.` in a class with a head, nothing without."""
        stem = self.sites["encoder.0" if "encoder.0" in self.sites else "0"]
        found = _FIRST.fullmatch(stem.path)
        if found is None:
            raise ModuleError(f"adapters' names for {self.sites.model} are not known (its first block is {stem.path})")
        return found.group(1)

    def numbers(self) -> list[tuple[str, int]]:
        """Layers in adapters' order: those of one stack after the other."""
        return [(stack, i) for stack, count in self.sites.layers.items() for i in range(count)]


def inner(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of the form under a gate or a scale."""
    return {leaf.removeprefix("inner."): tensor for leaf, tensor in ours.items() if leaf.startswith("inner.")}


def one(found: Sequence[Fields], what: str) -> Fields:
    """The fields that all sites share."""
    for other in found[1:]:
        odd = [key for key in found[0] if other[key] != found[0][key]]
        if odd:
            raise ModuleError(f"one configuration is for all {what}, here they differ in {listing(odd)}: {found[0][odd[0]]!r} and {other[odd[0]]!r}")
    return dict(found[0])
