"""What a form may know while it is built for one site: `Place`.  No live model, only shapes, values and a generator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from intarsia.errors import SpecError
from intarsia.sites.address import Site

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the sites of a patch, and the shape of the tensor there: (width, width read) or that of the parameter."""

    site: Site
    shape: tuple[int, ...]


@dataclass
class Place:
    """The surroundings of one patch at one site, handed to `FormSpec.build`.

    Attributes:
        site: where; `site.features` is the width of the tensor there.
        reads: width of the tensor the patch reads (equals `site.features` unless it reads the input of a projection).
        width: hidden size of the model (`d`).
        generator: CPU generator, seeded per module and site, so that initial values do not depend on other modules.
        weight: the base's parameter at this site as (out, in) or a vector, cut to the site's view; None if it has none.
        embedding: the base's word-embedding matrix [V, d_embed], None if the model has none.
        bidirectional: the stack is an encoder whose first position is pooled (no decoder behind it).
        peers: all sites of this patch on this model, this one among them: for what is sized by the whole.
        shared: tied parts of the module being built: `tied` returns the same object for the same key.
        dtype: dtype of new parameters.
        device: where the touched module lives.
        role: which tensor of the form is being built (`down`, `up` ...), for factors that are shared by role.
        layers: number of blocks of every stack.
        heads: (number of key/value heads, size of one head) of the attention that the site is a part of; empty elsewhere.
    """

    site: Site
    reads: int
    width: int
    generator: torch.Generator
    weight: Callable[[], Tensor | None] = lambda: None
    embedding: Callable[[], Tensor | None] = lambda: None
    bidirectional: bool = False
    peers: tuple[Peer, ...] = ()
    shared: dict[Hashable, nn.Module] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    role: str = ""
    layers: Mapping[str, int] = field(default_factory=dict)
    heads: tuple[int, int] | tuple[()] = ()

    def named(self, role: str) -> Place:
        """The same place, for one tensor of the form."""
        return replace(self, role=role)

    @property
    def label(self) -> str:
        """Name of the tensor that is being built: tells apart what is drawn from a seed."""
        return f"{self.site.name}.{self.role}" if self.role else self.site.name

    def tied(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the part stored under `key`, building it at the first call of this module.

        A form keeps the part in its `__dict__`, not as a child: tied parts belong to the model's root, so that sharding
        by blocks does not meet one parameter in two groups.
        """
        if key not in self.shared:
            self.shared[key] = build()
        return self.shared[key]  # type: ignore[return-value]

    def buffer(self, shape: tuple[int, ...], value: Callable[[], Tensor]) -> Tensor:
        """A frozen tensor of `shape`, computed by `value` on the CPU unless only shapes are asked for (meta device)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        made = value()
        assert made.shape == shape, f"{self.site.name}: {tuple(made.shape)} is not {shape}"
        return made.to(self.device, self.dtype if made.is_floating_point() else made.dtype)

    def base_weight(self) -> Tensor:
        """The base's weight here, for methods that start from it.

        Raises:
            SpecError: there is none, or it is quantised.
        """
        value = self.weight()
        if value is None or not value.is_floating_point():
            found = "no weight" if value is None else f"a weight of {value.dtype}"
            raise SpecError(f"{self.site.name}: this method starts from the base's weight and found {found} there")
        return value

    def parameter(self, *shape: int, fill: Callable[[Tensor, torch.Generator], None] | float = 0.0) -> nn.Parameter:
        """A new fp parameter of `shape`, filled on the CPU from the place's generator (same values on any device)."""
        if self.device.type == "meta":
            return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device="meta"))
        value = torch.empty(*shape, dtype=torch.float32)
        if callable(fill):
            with torch.no_grad():
                fill(value, self.generator)
        else:
            value.fill_(fill)
        return nn.Parameter(value.to(self.device, self.dtype))
