"""Scores of the members of a mixture, beyond attention: what a `Router` may go by.

| scorer | scores | tensors | used by |
|---|---|---|---|
| `Table` | numbers of their own, for the whole model or per value of a key of the call's context | [N] or [K, N] | Polytropon, LoRA soups, AdaMerging, LoraHub, EMEA; fixed weights and routing by key (frozen) |
| `Prototype` | <x, v_i> | [N, n] | Arrow, centroids |
| `Gate` | <x, g_i> + c_i, or standardised | [N, n], [N] | PHATGOOSE, mixtures of experts |
| `Basis` | a linear map or a small network of a vector of the call's context (typology) | [N, m] ... | CPG, UDapter, MAD-G |
| `Gaussian` | log density of x | [N, n] twice, [N] | hierarchical domain adapters, mixture models |

x is what the member methods read or what the site holds, per token or as the mean over an example's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError, listing, nearest
from intarsia.patches.bottleneck import Read, read
from intarsia.patches.delta import Seen, same_dtype
from intarsia.patches.init import Fill, normal, uniform
from intarsia.patches.place import Place
from intarsia.patches.router import Changes, Look, Scorer, looks, width_of

By = Literal["token", "example"]


def per_example(owner: object, x: Tensor, seen: Seen) -> Tensor:
    """The mean of x over the tokens of every row's prompt, [R, n]; a decoder keeps it for the tokens it generates."""

    def mean() -> Tensor:
        whole = x.reshape(seen.rows, -1, x.shape[-1])
        counted = seen.tokens(whole.shape[1]).in_prompt().to(whole.dtype)
        return (whole * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)

    return seen.kept(owner, mean)


class Looking(Scorer):
    """A scorer that looks at x."""

    def __init__(self, spec: Any, what: Read) -> None:
        super().__init__()
        self.spec = spec
        self.what = what
        self.reads_call = spec.by == "example"
        self.per_token = spec.by == "token"

    def looked(self, h: Tensor, seen: Seen) -> Tensor:
        """x, per token or per example."""
        x = read(h, seen, self.what)
        return per_example(self, x, seen) if self.spec.by == "example" else x


class TableScorer(Scorer):
    """table: [N], or [K, N] with a row per value of a key."""

    def __init__(self, table: Tensor, spec: Table) -> None:
        super().__init__()
        if isinstance(table, nn.Parameter):
            self.table = table
        else:
            self.register_buffer("table", table)
        self.spec = spec
        self.reads_call = bool(spec.keys)
        self.per_input = self.per_token = False
        self.keys = frozenset((spec.context,)) if spec.keys else frozenset()

    def forward(self, h: Any, changes: Changes, seen: Seen) -> Tensor:
        spec = self.spec
        if not spec.keys:
            return self.table
        value = seen.context(spec.context)
        if isinstance(value, str | int):
            return self.table[self._row(value)]
        each = value.tolist() if isinstance(value, Tensor) else list(value)
        if len(set(each)) == 1:
            return self.table[self._row(each[0])]
        if not isinstance(h, Tensor) or seen.site.port == "weight":
            raise CompositionError(f"{seen.site.name}: the rows of this batch have several values of {spec.context!r}, and here is one parameter for all of them")
        rows = torch.tensor([self._row(v) for v in seen.per_row(spec.context)], device=self.table.device)
        return self.table[rows]

    def _row(self, value: object) -> int:
        try:
            return self.spec.keys.index(str(value))
        except ValueError:
            known = self.spec.keys
            raise CompositionError(
                f"the router knows no {self.spec.context}={value!r}{nearest(str(value), known)} known: {listing(known)}; a new one needs a router that is made with it among its keys"
            ) from None


@register("table_scores")
@dataclass(frozen=True, slots=True)
class Table:
    """Numbers of their own.

    Attributes:
        keys: values of `context` that have a row each; empty for one row that always counts.
        context: key of the call's context.
        start: of all scores; or one number per member.
        spread: half the width of the uniform noise around the start.
        frozen: not trained: fixed weights, or routing by key.
        identity: the i-th key stands for the i-th member: 1 there, 0 elsewhere.
    """

    keys: tuple[str, ...] = ()
    context: str = "task"
    start: float | tuple[float, ...] = 0.0
    spread: float = 0.0
    frozen: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        if len(set(self.keys)) != len(self.keys):
            raise SpecError(f"a table has a row per key, and keys come once: {self.keys}")

    def scorer(self, members: int, place: Place) -> TableScorer:
        if isinstance(self.start, tuple) and len(self.start) != members:
            raise SpecError(f"a table for {members} members has {len(self.start)} starting values")
        if self.identity and len(self.keys) != members:
            raise SpecError(f"identity: {len(self.keys)} keys for {members} members")
        shape = (len(self.keys), members) if self.keys else (members,)

        def fill(value: Tensor, generator: torch.Generator) -> None:
            if self.identity:
                value.copy_(torch.eye(members))
                return
            if self.spread:
                uniform(self.spread)(value, generator)
            else:
                value.zero_()
            value.add_(torch.tensor(self.start))

        table = place.parameter(*shape, fill=fill)
        return TableScorer(table.detach() if self.frozen else table, self)


class PrototypeScorer(Looking):
    """prototypes: [N, n]."""

    def __init__(self, prototypes: Tensor, spec: Prototype, what: Read) -> None:
        super().__init__(spec, what)
        self.register_buffer("prototypes", prototypes)

    prototypes: Tensor

    def forward(self, h: Tensor, changes: Changes, seen: Seen) -> Tensor:
        x = same_dtype(self.looked(h, seen), self.prototypes)
        if self.spec.normalise:
            x = F.normalize(x, dim=-1)
        scores = F.linear(x, self.prototypes)
        return scores.abs() if self.spec.absolute else scores


@register("prototype_scores")
@dataclass(frozen=True, slots=True)
class Prototype:
    """A vector per member, computed and not trained.

    Attributes:
        absolute: of the product: singular vectors have no sign (Arrow).
        normalise: x to length 1.
    """

    read: Look = "input"
    by: By = "token"
    absolute: bool = True
    normalise: bool = False

    def scorer(self, members: int, place: Place) -> PrototypeScorer:
        what = looks(place, self.read)
        shape = (members, width_of(place, what))
        return PrototypeScorer(place.buffer(shape, lambda: torch.zeros(shape)), self, what)


class GateScorer(Looking):
    """gate: [N, n], gate_bias: [N] or None."""

    def __init__(self, gate: nn.Parameter, gate_bias: nn.Parameter | None, spec: Gate, what: Read) -> None:
        super().__init__(spec, what)
        self.gate = gate
        self.gate_bias = gate_bias

    def forward(self, h: Tensor, changes: Changes, seen: Seen) -> Tensor:
        x = same_dtype(self.looked(h, seen), self.gate)
        if not self.spec.standardise:
            return F.linear(x, self.gate, self.gate_bias)
        return F.linear(standardised(x), standardised(self.gate)) / x.shape[-1] ** 0.5


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the last dimension."""
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True).clamp(min=1e-6)


@register("gate_scores")
@dataclass(frozen=True, slots=True)
class Gate:
    """A trained vector per member.

    Attributes:
        bias: a trained number beside it.
        standardise: vectors and x to mean 0 and deviation 1, their product over sqrt(n): gates that were trained apart
            become comparable (PHATGOOSE).
    """

    read: Look = "auto"
    by: By = "token"
    bias: bool = False
    standardise: bool = False
    std: float = 0.02

    def scorer(self, members: int, place: Place) -> GateScorer:
        what = looks(place, self.read)
        fill: Fill | float = normal(self.std) if self.std else 0.0
        bias = place.parameter(members) if self.bias else None
        return GateScorer(place.parameter(members, width_of(place, what), fill=fill), bias, self, what)


class BasisScorer(Scorer):
    """weight: [N, m], bias: [N]; with a hidden layer hidden: [m, size], hidden_bias: [m]."""

    def __init__(self, tensors: dict[str, nn.Parameter], spec: Basis) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, value)
        self.spec = spec
        self.reads_call = True
        self.per_input = self.per_token = False
        self.keys = frozenset((spec.context,))

    def forward(self, h: Any, changes: Changes, seen: Seen) -> Tensor:
        value = seen.context(self.spec.context)
        given = torch.as_tensor(value, dtype=self.weight.dtype, device=self.weight.device)
        if given.shape[-1:] != (self.spec.size,) or given.dim() != (1 if isinstance(value, tuple) else 2):
            raise CompositionError(
                f"{seen.site.name}: {self.spec.context}= is one vector, a tuple of {self.spec.size} numbers, or a list or tensor with one per row; "
                f"found a {type(value).__name__} of shape {tuple(given.shape)}"
            )
        if given.dim() == 2 and len(given) > 1:
            if seen.site.port == "weight":
                raise CompositionError(f"{seen.site.name}: rows with different {self.spec.context!r}, and here is one parameter for all of them")
            given = torch.stack([torch.as_tensor(v, dtype=given.dtype, device=given.device) for v in seen.per_row(self.spec.context)])
        else:
            given = given.reshape(-1)
        if self.spec.hidden:
            given = torch.relu(F.linear(given, self.hidden, self.hidden_bias))
        return F.linear(given, self.weight, self.bias)

    weight: nn.Parameter
    bias: nn.Parameter | None
    hidden: nn.Parameter
    hidden_bias: nn.Parameter


@register("basis_scores")
@dataclass(frozen=True, slots=True)
class Basis:
    """Scores from a vector that the call gives, such as typological features of the language.

    Attributes:
        size: of the vector.
        hidden: width of a hidden layer; 0 for a linear map.
        bias: D5: the paper of CPG has none, its code has one.
    """

    size: int
    context: str = "typology"
    hidden: int = 0
    bias: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.hidden < 0:
            raise SpecError(f"a basis reads a vector of at least one number, found {self}")

    def scorer(self, members: int, place: Place) -> BasisScorer:
        inner = self.hidden or self.size
        tensors = {"weight": place.parameter(members, inner, fill=normal(inner**-0.5))}
        if self.bias:
            tensors["bias"] = place.parameter(members)
        if self.hidden:
            tensors |= {"hidden": place.parameter(self.hidden, self.size, fill=normal(self.size**-0.5)), "hidden_bias": place.parameter(self.hidden)}
        scorer = BasisScorer(tensors, self)
        if not self.bias:
            scorer.bias = None
        return scorer


class GaussianScorer(Looking):
    """mean, variance: [N, n]; prior: [N], log."""

    def __init__(self, mean: Tensor, variance: Tensor, prior: Tensor, spec: Gaussian, what: Read) -> None:
        super().__init__(spec, what)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.register_buffer("prior", prior)

    mean: Tensor
    variance: Tensor
    prior: Tensor

    def forward(self, h: Tensor, changes: Changes, seen: Seen) -> Tensor:
        x = same_dtype(self.looked(h, seen), self.mean)
        weight = 1.0 / self.variance
        squares = F.linear(x.square(), weight) - 2 * F.linear(x, self.mean * weight) + (self.mean.square() * weight).sum(-1)
        return self.prior - 0.5 * (squares + self.variance.log().sum(-1))


@register("gaussian_scores")
@dataclass(frozen=True, slots=True)
class Gaussian:
    """Log density of x under one Gaussian with diagonal covariance per member; under softmax these are responsibilities."""

    read: Look = "self"
    by: By = "example"

    def scorer(self, members: int, place: Place) -> GaussianScorer:
        what = looks(place, self.read)
        shape = (members, width_of(place, what))
        return GaussianScorer(
            place.buffer(shape, lambda: torch.zeros(shape)), place.buffer(shape, lambda: torch.ones(shape)),
            place.buffer((members,), lambda: torch.zeros(members)), self, what,
        )  # fmt: skip

