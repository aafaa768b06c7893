"""How a value enters the forward pass: the op axis.

| op | change of h | folds |
|---|---|---|
| `Add(scale)` | scale * value | at a linear map |
| `Mul()` | h * value - h | at a linear map: rows of W and b (out), columns of W (in) |
| `Gain(scale)` | scale * h * value | as `Mul` |
| `Rot()` | value - h, the value a linear map of h | at a linear map |
| `Set()` | value - h | never |
| `Concat()` | the blocks themselves (appended) | never |
| `Replace()` | the value (a head's logits) | never |
| `Weigh()` | none: a router weighs what others change | where the weights are the same for every input |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intarsia._codec import register
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, back


@register("add")
@dataclass(frozen=True, slots=True)
class Add:
    """h' = h + scale * value."""

    scale: float = 1.0

    def change(self, h: Any, value: Any) -> Any:
        value = back(value, h)
        return value if self.scale == 1.0 else value * self.scale

    def enter(self, h: Tensor, form: Form, seen: Seen, fresh: bool) -> Tensor | None:
        """h + scale * form(h, seen) in one pass, where the form can; see `Delta.enter`."""
        return form.into(h, seen, self.scale, fresh)

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        constant = form.constant()
        if not isinstance(constant, WhyNot) and port != "in":
            return Linear(constant * self.scale, None) if port == "weight" else Linear(None, constant * self.scale)
        value = form.value_at(base, port)
        if isinstance(value, WhyNot):
            return value
        bias = None if value.bias is None else value.bias * self.scale
        return Linear(None if value.weight is None else value.weight * self.scale, bias)


@register("mul")
@dataclass(frozen=True, slots=True)
class Mul:
    """h' = h * value, entering as the change h * (value - 1)."""

    def change(self, h: Any, value: Any) -> Any:
        return h * back(value - 1.0, h)

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        value = form.constant()
        return value if isinstance(value, WhyNot) else _rescaled(base, value - 1.0, port)


@register("gain")
@dataclass(frozen=True, slots=True)
class Gain:
    """h' = h * (1 + scale * value): as `Mul`, but a value of zero is the base."""

    scale: float = 1.0

    def change(self, h: Any, value: Any) -> Any:
        return h * back(value * self.scale, h)

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        value = form.constant()
        return value if isinstance(value, WhyNot) else _rescaled(base, value * self.scale, port)


def _rescaled(base: Linear, gain: Tensor, port: str) -> Linear | WhyNot:
    """The change of a map whose output, input or weight is multiplied by 1 + gain."""
    if base.weight is None:
        return WhyNot("there is no weight here to rescale")
    if port == "out":
        weight = base.weight * (gain[:, None] if base.weight.dim() == 2 else gain)
        return Linear(weight, None if base.bias is None else base.bias * gain)
    return Linear(base.weight * (gain[None, :] if port == "in" else gain), None)


@register("rot")
@dataclass(frozen=True, slots=True)
class Rot:
    """h' = value, the value being a linear map of h itself: a rotation of the input side (port `weight`: W R) or of the
    output (port `out`)."""

    def change(self, h: Any, value: Any) -> Any:
        return back(value, h) - h

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        value = form.value_at(base, port)
        if isinstance(value, WhyNot):
            return value
        if value.weight is None or base.weight is None:
            return WhyNot("there is no weight here to turn")
        bias = None if value.bias is None or base.bias is None else value.bias - base.bias
        return Linear(value.weight - base.weight, bias)


@register("concat")
@dataclass(frozen=True, slots=True)
class Concat:
    """The value is a tuple of blocks put in front of the sequence or the memory."""

    def change(self, h: Any, value: Any) -> Any:
        return value

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        return WhyNot("tokens put in front of the sequence are not a change of any weight")


@register("set")
@dataclass(frozen=True, slots=True)
class Set:
    """h' = value: the value takes the place of a hidden state, entering as the change value - h."""

    def change(self, h: Any, value: Any) -> Any:
        return back(value, h) - h

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        return WhyNot("what takes the place of a hidden state is not a change of any weight")


@register("replace")
@dataclass(frozen=True, slots=True)
class Replace:
    """The value takes the place of the output (a head's logits)."""

    def change(self, h: Any, value: Any) -> Any:
        return value

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        return WhyNot("a head is new output, not a change of a base weight; keep it as a module")


@register("weigh")
@dataclass(frozen=True, slots=True)
class Weigh:
    """No change by itself: the form is a router, which a mixture asks for weights."""

    def change(self, h: Any, value: Any) -> Any:
        return value

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        weights = form.constant_weights(list(range(len(form.spec.parts))))  # type: ignore[operator, union-attr, arg-type]
        return weights if isinstance(weights, WhyNot) else Linear(None, None)
