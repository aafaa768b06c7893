"""Forms around forms: `Gated` weighs the value of any other by an input-dependent gate, `Scaled` by a learnt number.

Gated (UniPELT, Mao et al. 2022, arXiv 2110.07577): value * g with g = mean over tokens of sigmoid(w . x + c), one number
per row.  Around an `Attend` it multiplies keys *and* values: a closed gate leaves zero vectors with their share of the
softmax, not their absence.

The mean is over the tokens of the prompt (the released code includes padding: `masked=False`), and a decoder keeps it for
the tokens it generates: a mean over what is still to come would look into the future, in training too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.blocks import MemoryBlock
from intarsia.patches.bottleneck import Read, read
from intarsia.patches.delta import Form, FormSpec, Linear, Seen, WhyNot, same_dtype
from intarsia.patches.init import normal
from intarsia.patches.place import Place


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """[R] so that it multiplies `like` [R * n, ...]: rows stay in front, repeated where a layer flattens [B, T]."""
    if like.shape[0] != value.shape[0]:
        value = value.repeat_interleave(like.shape[0] // value.shape[0], 0)
    return value.view(-1, *[1] * (like.dim() - 1))


def wrapped(exported: tuple[Any, dict[str, Tensor]] | None, spec: Any, own: Mapping[str, Tensor]) -> Any:
    """The export of a form around another: that of the inner one, the outer tensors as they are."""
    if exported is None:
        return None
    inner, tensors = exported
    return replace(spec, form=inner), {**{f"inner.{k}": t for k, t in tensors.items()}, **own}


class GatedForm(Form):
    """inner(h) times a gate per row; gate: [d], gate_bias: [1]."""

    reads_call = True

    def __init__(self, inner: Form, gate: nn.Parameter, gate_bias: nn.Parameter, spec: Gated) -> None:
        super().__init__()
        self.inner = inner
        self.gate = gate
        self.gate_bias = gate_bias
        self.spec = spec

    def openness(self, h: Any, seen: Seen) -> Tensor:
        """The gate of every row, [R], between 0 and 1."""
        x = read(h, seen, self.spec.read)
        x = x.reshape(seen.rows, -1, x.shape[-1])
        each = torch.sigmoid(F.linear(same_dtype(x, self.gate), self.gate) + self.gate_bias)
        if not self.spec.masked:
            return each.mean(1)
        counted = seen.tokens(x.shape[1]).in_prompt().to(each.dtype)
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)

    def forward(self, h: Any, seen: Seen) -> Any:
        gate = seen.kept(self, lambda: self.openness(h, seen))
        value = self.inner(h, seen)
        if isinstance(value, Tensor):
            return value * per_row(gate, value if value.dim() > 1 else h)
        return tuple(weighed(block, gate) for block in value)

    def as_linear(self) -> WhyNot:
        return WhyNot("its gate depends on the input")

    def export(self) -> Any:
        return self.export_for({})

    def export_for(self, context: Mapping[str, Any]) -> Any:
        return wrapped(self.inner.export_for(context), self.spec, {"gate": self.gate, "gate_bias": self.gate_bias})


def weighed(block: MemoryBlock, gate: Tensor) -> MemoryBlock:
    """Keys and values [H, P, d] or [R, H, P, d] times a gate per row: [R, H, P, d]."""
    gate = gate[:, None, None, None]
    return replace(block, keys=block.keys * gate, values=block.values * gate)


@register("gated")
@dataclass(frozen=True, slots=True)
class Gated:
    """Any form times a gate that looks at the input.

    Attributes:
        form: what is gated.
        read: what the gate looks at, see `bottleneck.read`.
        masked: leave padding out of the mean over tokens.
    """

    form: FormSpec
    read: Read = "input"
    masked: bool = True

    @property
    def length(self) -> int:
        """Positions that a gated prefix adds."""
        return int(getattr(self.form, "length", 0))

    def build(self, place: Place) -> GatedForm:
        if place.site.port in ("seq", "weight", "logits"):
            raise SpecError(f"{place.site.name}: a gate looks at the tokens, and there are none to look at (port {place.site.port!r})")
        widths = {"input": place.reads, "self": place.site.features}
        gate = place.parameter(widths.get(self.read, place.width), fill=normal(0.02))
        return GatedForm(self.form.build(place), gate, place.parameter(1), self)


class ScaledForm(Form):
    """inner(h) times `scale` [1]."""

    def __init__(self, inner: Form, scale: nn.Parameter, spec: Scaled) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale
        self.spec = spec

    def forward(self, h: Any, seen: Seen) -> Tensor:
        return self.inner(h, seen) * self.scale

    def _scaled(self, value: Linear | WhyNot) -> Linear | WhyNot:
        if isinstance(value, WhyNot):
            return value
        weight, bias = (None if part is None else part * self.scale for part in (value.weight, value.bias))
        return Linear(weight, bias)

    def as_linear(self) -> Linear | WhyNot:
        return self._scaled(self.inner.as_linear())

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        return self._scaled(self.inner.value_at(base, port))

    def constant(self) -> Tensor | WhyNot:
        value = self.inner.constant()
        return value if isinstance(value, WhyNot) else value * self.scale

    def export(self) -> Any:
        return self.export_for({})

    def export_for(self, context: Mapping[str, Any]) -> Any:
        return wrapped(self.inner.export_for(context), self.spec, {"scale": self.scale})


@register("scaled")
@dataclass(frozen=True, slots=True)
class Scaled:
    """Any form whose value is a tensor, times one trained number per site that starts at `start`."""

    form: FormSpec
    start: float = 1.0

    def build(self, place: Place) -> ScaledForm:
        if place.site.port in ("seq", "mem"):
            raise SpecError(f"{place.site.name}: tokens and memories are not scaled by a number; gate them (Gated)")
        return ScaledForm(self.form.build(place), place.parameter(1, fill=self.start), self)
