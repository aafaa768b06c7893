"""`Draft`: the sites of one model while they are being collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError, nearest
from intarsia.sites import structure
from intarsia.sites.address import Site, View


@dataclass(frozen=True, slots=True)
class Role:
    """What the parameters of one module are called: `<name>.weight`."""

    name: str
    layer: int | None
    stack: str
    lend_at: str | None = None


@dataclass(slots=True)
class Draft:
    """Sites, and what is needed to name parameters afterwards.

    Attributes:
        prefix: path of the base in the model.
        sites: activations so far, by name.
        roles: module path -> role that names its parameters; the first role a module gets counts.
        views: module path -> part of its fused output -> view.
        blocks: path of a block -> (layer, stack).
        missing: reason per family of sites that the model lacks.
    """

    model: PreTrainedModel
    prefix: str
    sites: dict[str, Site] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    views: dict[str, dict[str, View]] = field(default_factory=dict)
    blocks: dict[str, tuple[int, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def find(self, path: str) -> nn.Module | None:
        return structure.find(self.model, path)

    def need(self, path: str, role: str) -> nn.Module:
        """The module at a path of the anatomy.

        Raises:
            SiteError: it is not there.
        """
        module = self.find(path)
        if module is None:
            paths = [known for known, _ in self.model.named_modules() if known]
            kind = getattr(self.model.config, "model_type", "")
            raise SiteError(
                f"{self.name}: role {role!r} should be at {path!r}, which is not there{nearest(path, paths)}. "
                f"The anatomy for model_type {kind!r} does not fit this model; "
                "try resolve(model, anatomy=infer(model)), and see sites.verify(model)"
            )
        return module

    def features(self, path: str, role: str, otherwise: int) -> int:
        """Width of a module's output; `otherwise` where the module leaves it open (dropout, a whole sub-layer)."""
        return structure.out_width(self.need(path, role)) or otherwise

    def add(self, site: Site) -> None:
        self.sites[site.name] = site

    def role(self, path: str, role: Role) -> None:
        self.roles.setdefault(path, role)

    def divide(self, path: str, parts: Sequence[tuple[str, View]]) -> None:
        self.views[path] = dict(parts)
