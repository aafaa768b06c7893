"""What a host knows of the modules it carries and of what it has done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from intarsia.compose.legality import Traits
from intarsia.host.build import Built
from intarsia.methods import Method
from intarsia.modules import Card
from intarsia.patches import Coupling, LanguageModelHead
from intarsia.sites.address import SiteMap


@dataclass
class Entry:
    """What a host knows of a module it carries, besides the deltas in the sockets."""

    method: Method
    built: Built
    labels: tuple[str, ...] | None
    roles: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    card: Card | None = None

    def traits(self) -> Traits:
        """What legality needs to know."""
        blocks: dict[str, int] = {}
        for site, deltas in self.built.deltas:
            for delta in deltas:
                spec = next(p.form for p in self.method.patches if p.name == delta.name)
                if site.port in ("mem", "seq"):
                    blocks[site.name] = blocks.get(site.name, 0) + int(getattr(spec, "length", 0))
        coupled = any(isinstance(patch.form, Coupling) for patch in self.method.patches)
        head = self.method.head
        return Traits(self.labels if head is not None else None, blocks, coupled, isinstance(head, LanguageModelHead))


@dataclass
class Record:
    """All that a host has done to a model.  Lives on the model's root child, so that a deep or pickled copy of the model
    carries its own (`Host.of`)."""

    sites: SiteMap
    flags: dict[str, bool]
    entries: dict[str, Entry] = field(default_factory=dict)
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    children: list[tuple[nn.Module, str]] = field(default_factory=list)
    implementation: str | None = None
    numbers: int = 0
