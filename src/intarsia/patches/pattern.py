"""Square factors with few entries: `Diag`, and `Pattern`, the fixed sparse patterns of SVFT (Lingam et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import Stream


def _side(shape: tuple[int, ...], place: Place, what: str) -> int:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise SpecError(f"{place.site.name}: {what} needs a square matrix, found the shape {tuple(shape)}")
    return shape[0]


class DiagFactor(Factor):
    """value: [n]."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return same_dtype(x, self.value) * self.value

    def materialise(self) -> Tensor:
        return torch.diag(self.value)


@register("diag")
@dataclass(frozen=True, slots=True)
class Diag:
    """A diagonal of trained numbers that starts at `start`, or as the caller says."""

    start: float | None = None

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> DiagFactor:
        fill = INITS[init] if self.start is None else self.start
        return DiagFactor(place.parameter(_side(shape, place, "a diagonal"), fill=fill))


class PatternFactor(Factor):
    """value: [entries]; index [2, entries] says where each stands; gate [1] or None multiplies all by sigmoid(gate)."""

    index: Tensor

    def __init__(self, value: nn.Parameter, index: Tensor, gate: nn.Parameter | None, n: int, aligned: bool) -> None:
        super().__init__()
        self.value = value
        self.gate = gate
        self.n = n
        self.aligned = aligned
        # what follows from the specification alone is not stored
        self.register_buffer("index", index, persistent=aligned)

    def align(self, up: Tensor, down: Tensor) -> None:
        """Choose the entries (i, j) whose left and right singular vectors look most alike, ties by position."""
        if not self.aligned or up.device.type == "meta":
            return
        if up.shape[0] != down.shape[1]:
            raise SpecError(f"the pattern 'aligned' compares inputs with outputs and needs as many, found {down.shape[1]} and {up.shape[0]}")
        scores = (up.T @ down.T).abs().flatten()
        order = scores.argsort(descending=True, stable=True)[: self.index.shape[1]].sort().values
        self.index.copy_(torch.stack((order // self.n, order % self.n)))

    def weights(self) -> Tensor:
        """The entries, [entries]."""
        return self.value if self.gate is None else self.value * torch.sigmoid(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.value), self.materialise())

    def materialise(self) -> Tensor:
        zero = torch.zeros(self.n, self.n, dtype=self.value.dtype, device=self.value.device)
        return zero.index_put((self.index[0].long(), self.index[1].long()), self.weights())


@register("pattern")
@dataclass(frozen=True, slots=True)
class Pattern:
    """Trained entries at fixed positions of a square matrix.

    Attributes:
        kind: `band` (the diagonal and `width` on both sides), `random` (as many entries as that band), or `aligned` (as
            many, where the frame's left and right vectors look most alike).
        width: diagonals on each side.
        seed: of the random positions.
        gate: multiply by a trained sigmoid(gate), as the released code does.
    """

    kind: Literal["band", "random", "aligned"] = "band"
    width: int = 1
    seed: int = 0
    gate: bool = False

    def entries(self, n: int) -> int:
        """How many: n (2k + 1) - k (k + 1)."""
        k = min(self.width, n - 1)
        return n * (2 * k + 1) - k * (k + 1)

    def positions(self, n: int, site: str) -> Tensor:
        """Rows and columns, int32 [2, entries]."""
        if self.kind == "band":
            row, column = torch.meshgrid(torch.arange(n), torch.arange(-self.width, self.width + 1), indexing="ij")
            column = row + column
            inside = (column >= 0) & (column < n)
            return torch.stack((row[inside], column[inside])).int()
        if self.kind == "aligned":
            return torch.zeros(2, self.entries(n), dtype=torch.int32)
        chosen = Stream(self.seed, "pattern", site).distinct(self.entries(n), n * n)
        return torch.stack((chosen // n, chosen % n)).int()

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> PatternFactor:
        n = _side(shape, place, "a pattern")
        value = place.parameter(self.entries(n), fill=INITS[init])
        index = place.buffer((2, self.entries(n)), lambda: self.positions(n, place.label))
        return PatternFactor(value, index, place.parameter(1) if self.gate else None, n, self.kind == "aligned")
