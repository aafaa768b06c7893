"""`Bottleneck`: up(sigma(down(x))): adapters.  What x is (`read`) and where the value enters (`at`) make the variant.

| read | x | used by |
|---|---|---|
| `self` | h, as left by the modules before this one | Houlsby et al. 2019 |
| `normed` | LN(h + residual) (post-LN), h + residual (pre-LN) | Pfeiffer et al. 2020 |
| `reads` | what the sub-layer reads | parallel adapters, He et al. 2021 |
| `residual` | the skip connection | variants |
| `input` | the touched module's own input | - |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches import kernels
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, back, dropped, same_dtype
from intarsia.patches.factors import Applied, Dense, DenseFactor, Factor, FactorSpec, spread
from intarsia.patches.place import Place

Read = Literal["self", "normed", "reads", "residual", "input"]
Vector = nn.Parameter | Factor
EPSILON = 1e-5


def read(h: Tensor, seen: Seen, what: str) -> Tensor:
    """The tensor a form looks at."""
    if what == "self":
        return h
    if what == "normed":
        return seen.normed(h)
    return getattr(seen, what)


class Norm(nn.Module):
    """A layer norm of the adapter's own: gain and shift [n], plain or given by factors."""

    def __init__(self, weight: Vector, bias: Vector) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        weight, bias = value_for(self.weight, seen, x), value_for(self.bias, seen, x)
        x = same_dtype(x, weight)
        if weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)
        return F.layer_norm(x, x.shape[-1:], None, None, EPSILON) * weight + bias


def value_of(vector: Vector) -> Tensor:
    """A bias or gain [n]."""
    return vector if isinstance(vector, Tensor) else vector.materialise()


def value_for(vector: Vector, seen: Seen, like: Tensor) -> Tensor:
    """A bias or gain so that it meets `like` [..., n]."""
    return vector if isinstance(vector, Tensor) else spread(vector.given(seen).materialise(), like)


class BottleneckForm(Form):
    """[..., reads] -> [..., width] -> [..., features]."""

    def __init__(
        self, down: Factor, up: Factor, down_bias: Vector, up_bias: Vector, norms: Mapping[str, Norm], spec: Bottleneck
    ) -> None:
        super().__init__()
        self.down = down
        self.up = up
        self.down_bias = down_bias
        self.up_bias = up_bias
        self.norm_in = norms.get("norm_in")
        self.norm_out = norms.get("norm_out")
        self.spec = spec

    def branch(self, x: Tensor, seen: Seen) -> Tensor:
        """The adapter without its residual."""
        down: Applied = self.down.given(seen)
        up: Applied = self.up.given(seen)
        inner = x if self.norm_in is None else self.norm_in(x, seen)
        hidden = down(inner)
        hidden = ACTIVATIONS[self.spec.activation](hidden + value_for(self.down_bias, seen, hidden))
        value = up(dropped(hidden, self.spec.dropout, self.training))
        return value + value_for(self.up_bias, seen, value)

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        x = read(h, seen, self.spec.read)
        value = self.branch(x, seen)
        if self.norm_out is not None:
            inside = self.spec.residual == "inside"
            value = self.norm_out(value + h, seen) - h if inside else self.norm_out(value, seen)
        if self.spec.residual == "read":
            value = value + x - h
        elif self.spec.residual == "none":
            value = value - h
        return back(value, h)

    def into(self, h: Tensor, seen: Seen, scale: float, fresh: bool) -> Tensor | None:
        """Plain adapters: both biases inside the products, and the stream read and written once."""
        spec, down, up, bias_in, bias_out = self.spec, self.down, self.up, self.down_bias, self.up_bias
        if spec.residual != "self" or self.norm_in is not None or self.norm_out is not None:
            return None
        if type(down) is not DenseFactor or type(up) is not DenseFactor or not isinstance(bias_in, Tensor) or not isinstance(bias_out, Tensor):
            return None
        x = read(h, seen, spec.read)
        if not kernels.usable(h, x, down.value, up.value, bias_in, bias_out):
            return None
        hidden = ACTIVATIONS[spec.activation](F.linear(x, down.value, bias_in))
        return kernels.added(h, dropped(hidden, spec.dropout, self.training), up.value, bias_out, scale, fresh and spec.read in ("input", "reads"))

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        """Behind a linear layer a linear adapter is one more product: U (D (W x + b) + c) + e."""
        if self.spec.activation != "identity" or self.spec.norm != "none":
            return WhyNot("an adapter with a non-linearity is not a change of any weight")
        if self.spec.read not in ("self", "input") or self.spec.residual != "self" or port != "out":
            return WhyNot("an adapter folds where it reads a linear layer's input or output and adds to its output")
        if self.spec.generated:
            return WhyNot("its tensors are generated for the task of the call; export it for one task first")
        up, down = self.up.materialise(), self.down.materialise()
        first, second = value_of(self.down_bias), value_of(self.up_bias)
        if self.spec.read == "self":
            if base.weight is None:
                return WhyNot("there is no weight here to map")
            first = first if base.bias is None else first + down @ base.bias
            down = down @ base.weight
        return Linear(up @ down, up @ first + second)

    def export_for(self, context: Mapping[str, Any]) -> tuple[Bottleneck, dict[str, Tensor]] | None:
        """The ordinary adapter that a generated one is under a context (a task); None if this is an ordinary one."""
        if not self.spec.generated:
            return None
        vectors = {"down_bias": self.down_bias, "up_bias": self.up_bias}
        for name, norm in (("norm_in", self.norm_in), ("norm_out", self.norm_out)):
            if norm is not None:
                vectors |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        named: dict[str, Any] = {"down.value": self.down, "up.value": self.up, **vectors}
        tensors: dict[str, Tensor] = {}
        for name, part in named.items():
            found = part if isinstance(part, Tensor) else part.fixed(context)
            if found is None:
                return None
            tensors[name] = found
        return replace(self.spec, factor=Dense(), vectors=None), tensors

    def export(self) -> tuple[Bottleneck, dict[str, Tensor]] | None:
        return self.export_for({})


@register("bottleneck")
@dataclass(frozen=True, slots=True)
class Bottleneck:
    """An adapter of `width`, or of the model's width divided by `reduction`.

    Attributes:
        init: start of `down`; `up` starts at zero if `zero_up`, else likewise.
        norm: a trained layer norm on what the adapter reads (`in`), on the adapter's value (`out`), or both.
        residual: what the adapter's own skip connection adds: h (`self`), what it reads (`read`), nothing (`none`), or h
            under the outer norm (`inside`: LN(value + h)).
        vectors: how biases and norms are given; None for plain trained ones.
    """

    width: int | None = None
    reduction: float = 16.0
    activation: str = "relu"
    read: Read = "self"
    factor: FactorSpec = field(default_factory=Dense)
    init: str = "bert"
    zero_up: bool = False
    dropout: float = 0.0
    norm: Literal["none", "in", "out", "both"] = "none"
    residual: Literal["self", "read", "none", "inside"] = "self"
    vectors: FactorSpec | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            ACTIVATIONS[self.activation]
        if self.width is not None and self.width < 1:
            raise SpecError(f"adapter width must be at least 1, found {self.width}")
        if self.residual == "inside" and self.norm not in ("out", "both"):
            raise SpecError(f"residual='inside' is a residual under the outer norm: set norm='out' or 'both', found {self.norm!r}")

    @property
    def generated(self) -> bool:
        """Whether its tensors come from a network that looks at the call."""
        return any(getattr(part, "generated", False) for part in (self.factor, self.vectors))

    def size(self, features: int) -> int:
        """Width of the bottleneck for a stream of `features`."""
        return self.width if self.width is not None else max(1, math.floor(features / self.reduction))

    def build(self, place: Place) -> BottleneckForm:
        for needed, there in (("reads", place.site.reads), ("normed", place.site.residual), ("residual", place.site.residual)):
            if self.read == needed and there is None:
                raise SpecError(f"{place.site.name}: there is no {needed!r} to look at here; only sub-layers have one")
        features, reads = place.site.features, self.reads(place)
        size = self.size(features)
        down = self.factor.build((size, reads), place.named("down"), self.init)
        up = self.factor.build((features, size), place.named("up"), "zeros" if self.zero_up else self.init)
        biases = [self._vector(n, place.named(role), "zeros") for n, role in ((size, "down_bias"), (features, "up_bias"))]
        norms = {}
        for where, n in (("in", reads), ("out", features)):
            if self.norm in (where, "both"):
                parts = ((f"norm_{where}.weight", "zeros" if self.vectors else "ones"), (f"norm_{where}.bias", "zeros"))
                norms[f"norm_{where}"] = Norm(*(self._vector(n, place.named(role), init) for role, init in parts))
        return BottleneckForm(down, up, biases[0], biases[1], norms, self)

    def reads(self, place: Place) -> int:
        """Width of what the adapter reads."""
        if self.read == "input":
            return place.reads
        # what a module is given (port `in`) may be wider or narrower than the stream
        return place.width if self.read != "self" and place.site.port == "in" else place.site.features

    def _vector(self, size: int, place: Place, init: str) -> Vector:
        if self.vectors is not None:
            return self.vectors.build((size,), place, init)
        return place.parameter(size, fill=1.0 if init == "ones" else 0.0)
