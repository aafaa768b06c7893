"""`Delta`: one patch built for one site, and the contracts between its parts.

    value  = form(h, seen)            the only place where parameters are read
    change = op.change(h, value)      h' = h + change
    fold   = form/op on the linear map itself, or the reason why that is impossible

A delta holds no state about who is active and never writes to the model.  `h` is a tensor for the ports `out`, `in` and
`weight`; for `mem` and `seq` it is a tuple of blocks that is concatenated (see `blocks.py`); for `logits` it is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from intarsia.patches import kernels
from intarsia.patches.place import Place
from intarsia.sites.address import Site


class Seen(Protocol):
    """What a form may look at besides `h`.  Nothing is computed until asked; a missing tensor raises SiteError."""

    @property
    def site(self) -> Site: ...
    @property
    def input(self) -> Tensor:
        """What the touched module was given, [..., in]."""

    @property
    def residual(self) -> Tensor:
        """The skip connection of the sub-layer, [B, T, d]."""

    @property
    def reads(self) -> Tensor:
        """What the sub-layer reads (after the layer norm in pre-LN models), [B, T, d]."""

    @property
    def mask(self) -> Tensor | None:
        """Attention mask of the call, [B, T] bool, None if the caller gave none."""

    @property
    def weight(self) -> Tensor:
        """The touched layer's own weight, [out, in], cut to the site's view; never what other modules make of it."""

    @property
    def bias(self) -> Tensor | None:
        """The touched layer's own bias, [out], cut to the site's view; None if it has none."""

    @property
    def embedding(self) -> Tensor:
        """The base's word-embedding matrix, [V, d]."""

    def unembedding(self, x: Tensor) -> Tensor:
        """What meets the word embeddings in a language-model head, [..., d]: x behind the inverse of invertible modules (heads only)."""

    def normed(self, h: Tensor) -> Tensor:
        """The layer norm that follows the residual add, of `h + residual`; in pre-LN models `h + residual` itself.

        Recomputed from the `h` given, so that stacked adapters each read the stream as the previous one left it.
        """

    def context(self, key: str) -> Any:
        """Per-call context, e.g. a task id; raises CompositionError naming the key if the call gave none."""

    @property
    def rows(self) -> int:
        """Rows of the batch that this form computes.  Some layers flatten [B, T], so a tensor's first dimension is a multiple."""

    def per_row(self, key: str) -> tuple[Any, ...]:
        """Per-call context with one value for each of `rows`; a single value of the call stands for all of them."""

    @property
    def ids(self) -> Tensor | None:
        """Token ids the model was given, [rows, T] (heads only), None if it was given embeddings."""

    def tokens(self, length: int, stack: str | None = None, *, all_passes: bool = False) -> Positions:
        """Which of the `length` positions of a tensor here hold tokens, and which of these are the prompt.

        Args:
            stack: another stack than that of the site.
            all_passes: give the positions of earlier passes too, in front.
        """

    def taps(self, stack: str) -> tuple[Tensor, ...]:
        """What the first block of a stack was given and what every block gave, [R, T, d] each, without a graph."""

    def grown(self, owner: object, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, T, n] behind those of earlier passes, which stay with the model's cache."""

    def kept(self, owner: object, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, computed when the prompt is read and kept with the cache for the steps that follow it."""

    def note(self, owner: object, weights: Tensor, members: Sequence[int]) -> None:
        """A router's weights [..., n] of some members, for whoever watches the call (reports, penalties)."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of one pass through a stack.

    Attributes:
        rank: [R, T], the number of real tokens before each position, earlier passes included; -1 where there is padding.
        prompt: [R], how many tokens the prompt has: what the call's context `prompt` says, else all that the first pass
            brings (one in a decoder that reads an encoder: its start token).
        over: the prompt was read in earlier passes, and none of it is here.
    """

    rank: Tensor
    prompt: Tensor
    over: bool = False

    def in_prompt(self) -> Tensor:
        """[R, T] bool: real tokens of the prompt."""
        return (self.rank >= 0) & (self.rank < self.prompt[:, None])


@dataclass(frozen=True, slots=True)
class WhyNot:
    """The reason why something (folding, export, mixing) is impossible, as a sentence for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class Linear:
    """An affine map y = W x + b as data: W is [out, in] (or a vector for norms), b [out] or None.  Used for folding.

    Attributes:
        origin: the layer's map before any module changed it; None where this is it.
    """

    weight: Tensor | None
    bias: Tensor | None
    origin: Linear | None = None


class Form(nn.Module):
    """Computes the value of a patch.  Subclasses read parameters in `forward` only.

    A form (or a part of one) whose class sets `reads_call` looks at `Seen.rows`, `per_row`, `tokens` or `kept`; the host
    notes what a stack was given only where one is active.  `reads_taps` is the same for `Seen.taps`.
    """

    reads_call = False
    reads_taps = False

    def forward(self, h: Any, seen: Seen) -> Any:
        raise NotImplementedError

    def into(self, h: Tensor, seen: Seen, scale: float, fresh: bool) -> Tensor | None:
        """h + scale * self(h, seen) without the value in between, where a form can do that; else None.  See `Delta.enter`."""
        return None

    def as_linear(self) -> Linear | WhyNot:
        """The value as an affine function of the touched module's *input* (`read == "input"`), if it is one."""
        return WhyNot(f"{type(self).__name__} is not an affine function of the layer's input")

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        """The value as an affine function of the touched layer's input, where that layer is `base` as it is now.

        At the port `in` the value enters through the layer; what is meant is what it gives behind it.
        """
        if port == "out":
            return self.as_linear()
        return WhyNot(
            "a value added to a layer's input enters through the layer's own weights; only `out` folds"
            if port == "in"
            else f"{type(self).__name__} is not a change of this parameter"
        )

    def constant(self) -> Tensor | WhyNot:
        """The value if it does not depend on any activation."""
        return WhyNot(f"{type(self).__name__} depends on the activations")

    def export(self) -> tuple[Any, dict[str, Tensor]] | None:
        """A cheaper equal form as (specification, its tensors), or None if this is already the cheapest."""
        return None

    def export_for(self, context: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]] | None:
        """`export` under a call's context, for forms whose tensors depend on it (a task id)."""
        return self.export()


def reads_call(form: nn.Module) -> bool:
    """Whether a form or a part of it looks at what the whole stack was given."""
    return any(getattr(part, "reads_call", False) for part in form.modules())


@runtime_checkable
class FormSpec(Protocol):
    """A frozen, registered dataclass that can build a form."""

    def build(self, place: Place) -> Form: ...


@runtime_checkable
class OpSpec(Protocol):
    """How a value enters: a frozen, registered dataclass."""

    def change(self, h: Any, value: Any) -> Any:
        """What is added to `h`."""

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        """Change of the affine map `base` at a linear site, or the reason why there is none."""


class Delta(nn.Module):
    """A form and an op at one site.

    Args:
        name: the patch's name within its method; tensors are stored under `<site>/<name>.<leaf>`.
    """

    def __init__(self, name: str, site: Site, form: Form, op: OpSpec) -> None:
        super().__init__()
        self.name = name
        self.site = site
        self.form = form
        self.op = op

    def forward(self, h: Any, seen: Seen) -> Any:
        """Return the change of `h`."""
        return self.op.change(h, self.form(h, seen))

    def enter(self, h: Tensor, seen: Seen, fresh: bool = False) -> Tensor:
        """`h` with its change, h + self(h, seen), in as few passes over `h` as form and op allow.

        Args:
            fresh: `h` may be overwritten: nobody else reads it, and no operation kept it for its backward.
        """
        enter = getattr(self.op, "enter", None)
        found = None if enter is None else enter(h, self.form, seen, fresh)
        return found if found is not None else h + self(h, seen)

    def fold(self, base: Linear) -> Linear | WhyNot:
        """Change of the affine map of the touched module; `base` is that map as it is now."""
        return self.op.fold(base, self.form, self.site.port)

    def extra_repr(self) -> str:
        return f"{self.site.name}, {type(self.op).__name__}"


def same_dtype(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` in the dtype of a parameter: a bf16 base under fp32 modules computes the module in fp32."""
    return x if x.dtype == parameter.dtype else x.to(parameter.dtype)


def back(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype of the stream it enters."""
    return value if value.dtype == like.dtype else value.to(like.dtype)


def dropped(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout that costs nothing when it does nothing."""
    return kernels.dropout(x, rate) if training and rate > 0 else x
