"""`Attend`: keys and values put in front of what an attention sees (prefix tuning, Li & Liang 2021, arXiv 2101.00190).

With `reparameterise` the keys and values come from a small network shared by the layers of a stack and attention kind
(E [P, d] -> Linear -> tanh -> one Linear per layer); `export` turns them into the plain tensors, exactly.

`mix="zero_gate"` gives them a softmax of their own, whose result enters times a trained number that starts at zero
(LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199): a fresh module is the base, exactly.

`init="activations"` starts from the keys and values that the base itself computes for a text (`ids`, repeated to `length`).
A form cannot run the base, so the host does it once when the module is added, and hands them to `start_from`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.blocks import MemoryBlock
from intarsia.patches.delta import Form, Seen, dropped
from intarsia.patches.factors import Factor, FactorSpec
from intarsia.patches.init import INITS, Fill, kaiming, normal, uniform
from intarsia.patches.place import Place


def placed(form: Any) -> tuple[bool, bool]:
    """Whether a form's positions are relative, and whether they shift those of the text; neither in cross-attention."""
    return form.reads_call and form.spec.relative, form.reads_call and form.spec.shifts


class AttendForm(Form):
    """keys, values: [H_kv, P, d_head]; gate: [1], only with a softmax of its own."""

    def __init__(self, keys: nn.Parameter, values: nn.Parameter, gate: nn.Parameter | None, spec: Attend) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.gate = gate
        self.spec = spec

    def forward(self, h: Any, seen: Seen) -> tuple[MemoryBlock, ...]:
        keys, values = (dropped(t, self.spec.dropout, self.training) for t in (self.keys, self.values))
        return (MemoryBlock(keys, values, self.gate, *placed(self)),)

    def start_from(self, keys: Tensor, values: Tensor) -> None:
        """Take over keys and values [H_kv, P, d_head]."""
        with torch.no_grad():
            self.keys.copy_(keys)
            self.values.copy_(values)


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
        self,
        trunk: PrefixTrunk,
        weight: nn.Parameter,
        bias: nn.Parameter,
        gate: nn.Parameter | None,
        heads: tuple[int, int],
        spec: Attend,
    ) -> None:
        super().__init__()
        self.__dict__["trunk"] = trunk  # tied parts are registered once, by who carries the module (see `Place.tied`)
        self.weight = weight
        self.bias = bias
        self.gate = gate
        self.heads = heads
        self.spec = spec

    trunk: PrefixTrunk

    def block(self) -> MemoryBlock:
        """[P, 2 * H * d_head] cut into keys and values per head."""
        flat = dropped(F.linear(self.trunk(), self.weight, self.bias), self.spec.dropout, self.training)
        keys, values = flat.view(self.spec.length, 2, *self.heads).permute(1, 2, 0, 3)
        return MemoryBlock(keys, values, self.gate, *placed(self))

    def forward(self, h: Any, seen: Seen) -> tuple[MemoryBlock, ...]:
        return (self.block(),)

    def start_from(self, keys: Tensor, values: Tensor) -> None:
        """Let the layer's own map give keys and values [H_kv, P, d_head]: the least change of its weights that does.

        Exact where the trunk gives `length` independent rows, hence with a hidden width of at least the length (the
        released code comes near by 500 steps of gradient descent); else the least squares.
        """
        with torch.no_grad():
            wanted = torch.stack([keys, values]).permute(2, 0, 1, 3).reshape(self.spec.length, -1)
            hidden = self.trunk().double()
            missing = wanted.double() - F.linear(hidden, self.weight.double(), self.bias.double())
            self.weight.add_((torch.linalg.pinv(hidden) @ missing).T.to(self.weight.dtype))

    def export(self) -> tuple[Attend, dict[str, Tensor]]:
        was_training = self.training
        self.eval()
        with torch.no_grad():
            block = self.block()
        self.train(was_training)
        tensors = {"keys": block.keys, "values": block.values}
        return replace(self.spec, reparameterise=None), tensors if self.gate is None else {**tensors, "gate": self.gate}


class FactorAttendForm(Form):
    """Keys and values given by factors for matrices [P, H_kv * d_head]: Kronecker, low-rank or generated prefixes."""

    def __init__(self, keys: Factor, values: Factor, gate: nn.Parameter | None, heads: tuple[int, int], spec: Attend) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.gate = gate
        self.heads = heads
        self.spec = spec

    def by_head(self, matrix: Tensor) -> Tensor:
        """[..., P, H * d_head] -> [..., H, P, d_head]."""
        return dropped(matrix.unflatten(-1, self.heads).transpose(-2, -3), self.spec.dropout, self.training)

    def forward(self, h: Any, seen: Seen) -> tuple[MemoryBlock, ...]:
        keys, values = (self.by_head(factor.given(seen).materialise()) for factor in (self.keys, self.values))
        return (MemoryBlock(keys, values, self.gate, *placed(self)),)

    def export_for(self, context: Mapping[str, Any]) -> tuple[Attend, dict[str, Tensor]] | None:
        keys, values = self.keys.fixed(context), self.values.fixed(context)
        if keys is None or values is None:
            return None
        keys, values = (matrix.unflatten(-1, self.heads).transpose(0, 1) for matrix in (keys, values))
        tensors = {"keys": keys, "values": values}
        return replace(self.spec, factor=None), tensors if self.gate is None else {**tensors, "gate": self.gate}

    def export(self) -> tuple[Attend, dict[str, Tensor]] | None:
        return self.export_for({})


@register("attend")
@dataclass(frozen=True, slots=True)
class Attend:
    """`length` extra positions.

    Attributes:
        reparameterise: width of the shared network, None for plain tensors.
        dropout: of the keys and values.
        init: of plain tensors; `activations` for the base's own keys and values of a text.
        mix: `shared`: one softmax with what the attention sees anyway; `zero_gate`: one of their own, gated from zero.
        ids: token ids of that text.
        factor: how the matrices of keys and values are given, without `reparameterise`; None for plain tensors.
        relative: in self-attention with a relative position bias (T5), give the positions the bias of standing right in front
            of the text, as T-Few's code does; otherwise theirs is 0, as in BART, which has no such bias.  Cross-attention has
            none in T5, and the positions have none there.
        shifts: there, number the positions as the first of the text and its keys behind them, as AdapterHub does by leaving the
            queries where they were; for its modules.
    """

    length: int = 30
    reparameterise: int | None = 512
    dropout: float = 0.0
    init: str = "unit"
    mix: Literal["shared", "zero_gate"] = "shared"
    ids: tuple[int, ...] = ()
    factor: FactorSpec | None = None
    relative: bool = False
    shifts: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prefix length must be at least 1, found {self.length}")
        if self.relative and self.shifts:
            raise SpecError("a prefix stands in front of the text (relative) or at its beginning (shifts), not both")
        if (self.relative or self.shifts) and self.mix != "shared":
            raise SpecError("relative positions are for a prefix that shares the attention's softmax (mix='shared')")
        if (self.init == "activations") != bool(self.ids):
            raise SpecError("init='activations' starts from a text and needs its token ids: ids=(...); other starts take none")
        if self.factor is not None and (self.reparameterise is not None or self.ids):
            raise SpecError("keys and values given by a factor take neither reparameterise nor a start from activations")

    @property
    def text(self) -> tuple[int, ...]:
        """The token ids whose keys and values are the start, repeated to `length`; empty for other starts."""
        return tuple(self.ids[i % len(self.ids)] for i in range(self.length)) if self.ids else ()

    def build(self, place: Place) -> Form:
        form = self._build(place)
        if (self.relative or self.shifts) and not place.site.name.endswith("xattn.mem"):
            form.reads_call = True  # where the text begins and what was read before it; these forms are the relative ones
        return form

    def _build(self, place: Place) -> Form:
        heads = place.site.heads
        if len(heads) != 2:
            raise SpecError(f"{place.site.name} is not an attention memory")
        count, size = heads
        gate = place.parameter(1) if self.mix == "zero_gate" else None
        if self.factor is not None:
            keys, values = (self.factor.build((self.length, count * size), place.named(w), self.init) for w in ("keys", "values"))
            return FactorAttendForm(keys, values, gate, (count, size), self)
        if self.reparameterise is None:
            fill = INITS["zeros" if self.init == "activations" else self.init]
            shape = (count, self.length, size)
            return AttendForm(place.parameter(*shape, fill=fill), place.parameter(*shape, fill=fill), gate, self)
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
            shared, place.parameter(out, mid, fill=kaiming), place.parameter(out, fill=bias), gate, (count, size), self
        )
