"""What a host knows of the modules it carries and of what it has done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from intarsia.compose.legality import Carried, Traits, Weighs
from intarsia.host.build import Built
from intarsia.methods import Method
from intarsia.modules import Card
from intarsia.patches import Coupling, LanguageModelHead, RouterForm
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
    known: Traits | None = None

    def traits(self) -> Traits:
        """What legality needs to know; it does not change while the module is here."""
        if self.known is not None:
            return self.known
        blocks: dict[str, int] = {}
        for site, deltas in self.built.deltas:
            for delta in deltas:
                spec = next(p.form for p in self.method.patches if p.name == delta.name)
                if site.port in ("mem", "seq"):
                    blocks[site.name] = blocks.get(site.name, 0) + int(getattr(spec, "length", 0))
        coupled = any(isinstance(patch.form, Coupling) for patch in self.method.patches)
        head = self.method.head
        labels = self.labels if head is not None else None
        found = Traits(labels, blocks, coupled, isinstance(head, LanguageModelHead), *self._changes(), masks=self._masked())
        self.known = found
        return found

    def _masked(self) -> frozenset[str]:
        """The parameters of which it decides what counts."""
        masks = set(self.method.masks)
        return frozenset(site.name for site, deltas in self.built.deltas if any(d.name in masks for d in deltas))

    def _changes(self) -> tuple[dict[str, Carried], Weighs | None]:
        """What it changes where, and what it weighs if it is a router."""
        specs = {p.name: p.form for p in self.method.patches}
        tied = any(tensor.numel() for part in self.built.shared.values() for tensor in part.state_dict().values())
        sites, routers = {}, []
        for site, deltas in self.built.deltas:
            if site.port == "logits":
                continue
            forms = [d.form for d in deltas if isinstance(d.form, RouterForm)]
            routers += [(site, form) for form in forms]
            if not forms:
                sites[site.name] = Carried(site.port, tuple((specs[d.name], d.op) for d in deltas), tied)
        if not routers:
            return sites, None
        scorers = [form.scorer for _, form in routers]
        weighs = Weighs(
            routers[0][1].spec.parts,
            frozenset(site.name for site, _ in routers),
            any(s.reads_changes for s in scorers),
            any(s.per_input for s in scorers),
            frozenset().union(*(s.keys for s in scorers)),
            any(site.port == "weight" for site, _ in routers),
            any(s.per_token for s in scorers),
        )
        return sites, weighs


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
