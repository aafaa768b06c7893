"""`Attend`: keys and values put in front of what an attention sees (prefix tuning, Li & Liang 2021, arXiv 2101.00190).

With `reparameterise` the keys and values come from a small network shared by the layers of a stack and attention kind
(E [P, d] -> Linear -> tanh -> one Linear per layer); `export` turns them into the plain tensors, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.blocks import MemoryBlock
from intarsia.patches.delta import Form, Seen, dropped
from intarsia.patches.init import INITS, Fill, kaiming, normal, uniform
from intarsia.patches.place import Place


class AttendForm(Form):
    """keys, values: [H_kv, P, d_head]."""

    def __init__(self, keys: nn.Parameter, values: nn.Parameter) -> None:
        super().__init__()
        self.keys = keys
        self.values = values

    def forward(self, h: Any, seen: Seen) -> tuple[MemoryBlock, ...]:
        return (MemoryBlock(self.keys, self.values),)


class PrefixTrunk(nn.Module):
    """The shared part of a reparametrised prefix: embedding [P, d] and first layer, giving [P, mid]."""

    def __init__(self, embedding: nn.Parameter, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = weight
        self.bias = bias

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class GeneratedAttendForm(Form):
    """Keys and values of one layer from the shared trunk: Linear(mid, 2 * H_kv * d_head)."""

    def __init__(
        self, trunk: PrefixTrunk, weight: nn.Parameter, bias: nn.Parameter, heads: tuple[int, int], spec: Attend
    ) -> None:
        super().__init__()
        self.__dict__["trunk"] = trunk  # tied parts are registered once, by who carries the module (see `Place.tied`)
        self.weight = weight
        self.bias = bias
        self.heads = heads
        self.spec = spec

    trunk: PrefixTrunk

    def block(self) -> MemoryBlock:
        """[P, 2 * H * d_head] cut into keys and values per head."""
        flat = dropped(F.linear(self.trunk(), self.weight, self.bias), self.spec.dropout, self.training)
        keys, values = flat.view(self.spec.length, 2, *self.heads).permute(1, 2, 0, 3)
        return MemoryBlock(keys, values)

    def forward(self, h: Any, seen: Seen) -> tuple[MemoryBlock, ...]:
        return (self.block(),)

    def export(self) -> tuple[Attend, dict[str, Tensor]]:
        was_training = self.training
        self.eval()
        with torch.no_grad():
            block = self.block()
        self.train(was_training)
        return replace(self.spec, reparameterise=None), {"keys": block.keys, "values": block.values}


@register("attend")
@dataclass(frozen=True, slots=True)
class Attend:
    """`length` extra positions; `reparameterise` is the width of the shared network, None for plain tensors."""

    length: int = 30
    reparameterise: int | None = 512
    dropout: float = 0.0
    init: str = "unit"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prefix length must be at least 1, found {self.length}")

    def build(self, place: Place) -> Form:
        heads = place.site.heads
        if len(heads) != 2:
            raise SpecError(f"{place.site.name} is not an attention memory")
        count, size = heads
        if self.reparameterise is None:
            fill = INITS[self.init]
            shape = (count, self.length, size)
            return AttendForm(place.parameter(*shape, fill=fill), place.parameter(*shape, fill=fill))
        mid = self.reparameterise
        kind = place.site.name.split(".")[-2]

        def trunk() -> PrefixTrunk:
            return PrefixTrunk(
                place.parameter(self.length, place.width, fill=normal(1.0)),
                place.parameter(mid, place.width, fill=kaiming),
                place.parameter(mid, fill=uniform(1 / math.sqrt(place.width))),
            )

        shared = place.tied(("prefix", place.site.stack, kind), trunk)
        out = 2 * count * size
        bias: Fill = uniform(1 / math.sqrt(mid))
        return GeneratedAttendForm(
            shared, place.parameter(out, mid, fill=kaiming), place.parameter(out, fill=bias), (count, size), self
        )
