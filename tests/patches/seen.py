"""A stand-in for what a form sees, for tests of forms alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intarsia.patches.delta import Positions
from intarsia.sites.address import Site


@dataclass
class Glimpse:
    """`h` of [B, T, d] stands for everything that is not given."""

    input: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None
    said: dict[str, Any] = field(default_factory=dict)
    site: Site = field(default_factory=lambda: Site("0.ffn", "x"))

    @property
    def reads(self) -> Tensor:
        return self.input

    residual = reads

    @property
    def rows(self) -> int:
        return len(self.input)

    def normed(self, h: Tensor) -> Tensor:
        return h + self.input

    def context(self, key: str) -> Any:
        return self.said[key]

    def per_row(self, key: str) -> tuple[Any, ...]:
        value = self.said[key]
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * self.rows

    def tokens(self, length: int) -> Positions:
        real = torch.ones(self.rows, length, dtype=torch.bool) if self.mask is None else self.mask.bool()
        return Positions(torch.where(real, real.cumsum(1) - 1, -1), real.sum(1))

    def kept(self, owner: object, make: Callable[[], Tensor]) -> Tensor:
        return make()
