"""Where and how an adapter is put in: the design elements that He et al. 2021 (arXiv 2110.04366) exchange between methods.

| element | values |
|---|---|
| `insertion` | `sequential`: reads what it changes; `parallel`: reads what the sub-layer reads |
| `at` | which representation is changed: `ffn`, `attn`, `attn.heads`, `ffn.act`, `attn.q` ... or several |
| `scale` | h + s * adapter(x), fixed, or trained from there (`learn_scale`) |
| `norm` | a trained layer norm on what the adapter reads (`in`), on its value (`out`), or both |
| `residual` | what its own skip connection adds, see `Bottleneck` |

Every adapter row takes these settings, so one element of one method can be exchanged:
`build("pfeiffer", insertion="parallel", scale=4)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from intarsia.errors import SpecError, nearest
from intarsia.methods.method import Patch
from intarsia.patches import Add, Bottleneck, FormSpec, Scaled
from intarsia.sites.address import expand_braces, split_top

INSERTIONS = ("sequential", "parallel")
NORMS = ("none", "in", "out", "both")
RESIDUALS = ("self", "read", "none", "inside")
INPUTS = ("heads", "act")
"""Sites that are the input of a module rather than its output, by their last word."""


@dataclass(frozen=True, slots=True)
class Insertion:
    """The shared settings of adapter rows; see the module's docstring."""

    insertion: str = "sequential"
    at: str = "ffn"
    scale: float = 1.0
    learn_scale: bool = False
    norm: str = "none"
    residual: str = "self"
    layers: str | None = None

    def patches(self, form: Bottleneck, name: str = "adapter") -> tuple[Patch, ...]:
        """The patches that put `form` (whose `read` is that of its sequential kind) at the sites.

        Raises:
            SpecError: a setting is unknown, or the combination has no meaning.
        """
        for word, known in (("insertion", INSERTIONS), ("norm", NORMS), ("residual", RESIDUALS)):
            found = getattr(self, word)
            if found not in known:
                raise SpecError(f"{word} is one of {', '.join(known)}, found {found!r}{nearest(str(found), known)}")
        if self.residual != "self" and (self.scale != 1.0 or self.learn_scale):
            raise SpecError(
                f"residual={self.residual!r} says what takes the place of the stream, and scale={self.scale:g} would scale that too; "
                "use one or the other"
            )
        if self.insertion == "parallel":
            form = replace(form, read="reads")
        form = replace(form, norm=self.norm, residual=self.residual)  # type: ignore[arg-type]
        value: FormSpec = Scaled(form, float(self.scale)) if self.learn_scale else form
        op = Add(1.0 if self.learn_scale else float(self.scale))
        outer, inner = split(self.at)
        patches = [Patch(name, ", ".join(outer), value, op, layers=self.layers)] if outer else []
        if inner:
            patches.append(Patch(f"{name}_in" if outer else name, ", ".join(inner), value, op, port="in", layers=self.layers))
        return tuple(patches)


def split(at: str) -> tuple[Sequence[str], Sequence[str]]:
    """Patterns of outputs and patterns of inputs among the parts of a site pattern."""
    parts = [p for part in split_top(at) for p in expand_braces(part)]
    inner = [p for p in parts if p.rpartition(".")[2] in INPUTS]
    return ([p for p in parts if p not in inner], inner) if inner else ([at], [])
