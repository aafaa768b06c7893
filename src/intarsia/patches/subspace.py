"""`SubspaceEdit`: representation fine-tuning (ReFT, Wu et al. 2024, arXiv 2404.03592).

    LoReFT  h + R^T (W h + b - R h)     R [r, d] with orthonormal rows, so R h' = W h + b exactly
    NoReFT  the same, R without the constraint
    DiReFT  h + R^T (W h + b)           neither constraint nor subtraction

The edit is made at the first and last tokens of the *prompt*, counted among real tokens whatever the padding.  What a
decoder generates is never edited: at cached steps no position is chosen, and without a cache the call says how long the
prompt is (`host.using("m", prompt=lengths)`), as it must where a prompt is trained together with its answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, back, dropped
from intarsia.patches.init import kaiming, normal, uniform
from intarsia.patches.place import Place


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of `matrix` [r, d], in its order and orientation; at least fp32."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    q, triangle = torch.linalg.qr(wide.mT)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)  # unique: an orthonormal matrix stays itself
    return (q * signs).mT


class Unit(nn.Module):
    """One edit: projection R [r, d] (before the constraint), source W [r, d], bias b [r]."""

    def __init__(self, projection: nn.Parameter, source: nn.Parameter, bias: nn.Parameter, spec: SubspaceEdit) -> None:
        super().__init__()
        self.projection = projection
        self.source = source
        self.bias = bias
        self.spec = spec

    def rows(self) -> Tensor:
        """R."""
        return orthonormal(self.projection) if self.spec.orthonormal else self.projection

    def forward(self, h: Tensor) -> Tensor:
        """The change of h [..., d]."""
        rows = self.rows()
        x = h.to(rows.dtype).contiguous()  # else torch chooses the kernel by whether weights are being trained
        target = ACTIVATIONS[self.spec.activation](F.linear(x, self.source) + self.bias)
        change = (target - F.linear(x, rows) if self.spec.subtract else target) @ rows
        return dropped(x + change, self.spec.dropout, self.training) - x if self.spec.dropout else change


class SubspaceEditForm(Form):
    """The change of h [R, T, d]: zero outside the chosen positions."""

    def __init__(self, units: dict[str, Unit], spec: SubspaceEdit) -> None:
        super().__init__()
        self.units = nn.ModuleDict(units)
        self.spec = spec
        self.reads_call = spec.selective

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        spec = self.spec
        if not spec.selective:
            return back(self.units["edit"](h), h)
        shaped = h.view(seen.rows, -1, h.shape[-1])
        positions = seen.tokens(shaped.shape[1])
        if positions.over:
            return torch.zeros_like(h)
        rank, inside = positions.rank, positions.in_prompt()
        last = inside & (rank >= positions.prompt[:, None] - spec.last)
        first = inside & (rank < spec.first) & ~last  # where both meet, the last ones win
        chosen = {"edit": first | last} if spec.tied else {"first": first, "last": last}
        change = torch.zeros_like(shaped)
        for name, unit in self.units.items():  # at every position: low rank costs less than looking for the chosen ones
            change = torch.where(chosen[name][..., None], back(unit(shaped), h), change)
        return change.view(h.shape)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        """At every position of a linear layer's output the edit is one more product."""
        if self.spec.selective:
            return WhyNot("it edits chosen positions only, which no weight can")
        if port != "out" or base.weight is None or self.spec.activation != "identity":
            return WhyNot("an edit folds at the output of a linear layer, without an activation")
        unit: Unit = self.units["edit"]  # type: ignore[assignment]
        rows = unit.rows()
        matrix = rows.mT @ (unit.source - rows if self.spec.subtract else unit.source)
        shift = unit.bias @ rows
        return Linear(matrix @ base.weight, shift if base.bias is None else shift + matrix @ base.bias)

    def export(self) -> tuple[SubspaceEdit, dict[str, Tensor]] | None:
        """Without constraint and subtraction, where no activation stands between: W - R in the place of W."""
        if self.spec.activation != "identity" or not (self.spec.orthonormal or self.spec.subtract):
            return None
        tensors: dict[str, Tensor] = {}
        for name in self.units:
            unit: Unit = self.units[name]  # type: ignore[assignment]
            rows = unit.rows().detach()
            source = unit.source - rows if self.spec.subtract else unit.source
            tensors |= {f"units.{name}.projection": rows, f"units.{name}.source": source, f"units.{name}.bias": unit.bias}
        return replace(self.spec, orthonormal=False, subtract=False), tensors


@register("subspace_edit")
@dataclass(frozen=True, slots=True)
class SubspaceEdit:
    """An edit of rank `rank` at the `first` and `last` tokens of the prompt, or everywhere (`positions="all"`).

    Attributes:
        tied: one edit for first and last tokens, else one each.
        subtract: remove what stood in the subspace (LoReFT, NoReFT).
        orthonormal: keep the rows of R orthonormal, by QR in fp32.
        dropout: on the edited state as a whole, as the released code.
        init: `paper` (a random subspace: not the base) or `identity` (W = R, b = 0: exactly the base; needs `subtract`).
    """

    rank: int = 4
    first: int = 0
    last: int = 0
    positions: Literal["ends", "all"] = "ends"
    tied: bool = True
    subtract: bool = True
    orthonormal: bool = True
    activation: str = "identity"
    dropout: float = 0.0
    init: Literal["paper", "identity"] = "paper"

    def __post_init__(self) -> None:
        ACTIVATIONS[self.activation]
        if self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")
        if self.selective and (min(self.first, self.last) < 0 or not self.first + self.last):
            raise SpecError(f"an edit needs positions: first={self.first} and last={self.last} choose none; or positions='all'")
        if self.init == "identity" and not (self.subtract and self.activation == "identity"):
            raise SpecError("init='identity' is W = R, which is the base only where R h is subtracted and nothing stands between")

    @property
    def selective(self) -> bool:
        """Whether only some positions are edited."""
        return self.positions == "ends"

    def names(self) -> tuple[str, ...]:
        """Names of the edits."""
        if self.tied or not self.selective:
            return ("edit",)
        return tuple(name for name, count in (("first", self.first), ("last", self.last)) if count)

    def build(self, place: Place) -> SubspaceEditForm:
        width = place.site.features
        if place.site.port not in ("out", "in"):
            raise SpecError(f"{place.site.name}: an edit needs hidden states (port 'out' or 'in'), this is port {place.site.port!r}")
        if self.rank > width:
            raise SpecError(f"{place.site.name}: rank {self.rank} does not fit into {width} features")
        return SubspaceEditForm({name: self._unit(place, width) for name in self.names()}, self)

    def _unit(self, place: Place, width: int) -> Unit:
        projection = place.parameter(self.rank, width, fill=normal(1.0))
        source = place.parameter(self.rank, width, fill=kaiming)
        bias = place.parameter(self.rank, fill=uniform(1 / math.sqrt(width)))
        if place.device.type != "meta":
            with torch.no_grad():
                projection.copy_(orthonormal(projection) if self.orthonormal else projection / math.sqrt(width))
                if self.init == "identity":
                    source.copy_(orthonormal(projection) if self.orthonormal else projection)
                    bias.zero_()
        return Unit(projection, source, bias, self)


__all__ = ["SubspaceEdit", "SubspaceEditForm", "Unit", "orthonormal"]
