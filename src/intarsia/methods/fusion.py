"""Routers of the literature, one row each: methods that weigh the members of a mixture instead of changing anything.

They are modules like all others (file, card, digest), and run inside an expression only: `fuse(a, b; router=f)`.  A row says
what is weighed how; which members, and at which sites, the host fills in (`Host.router`), because that follows from them.
What is not here: the arithmetic (`patches/router.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from intarsia._codec import register
from intarsia._registry import Registry
from intarsia.methods.method import Method, Patch, Penalty, Policy, Row
from intarsia.patches import Attention, Router, RouterForm, Weigh

ROUTERS: Registry[Row] = Registry("router")

Where = Mapping[str, str]
"""Site patterns by port."""


def router(name: str, *, equation: str, source: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a factory, whose first arguments are `parts` and `where`, as the router `name`."""

    def add(factory: Callable[..., Method]) -> Callable[..., Method]:
        ROUTERS.add(name, Row(name, factory, (inspect.getdoc(factory) or "").split("\n", 1)[0], equation, source))
        return factory

    return add


def weighing(name: str, spec: Router, where: Where, policy: Policy) -> Method:
    """A method with one patch per port."""
    patches = [Patch("router" if port == "out" else f"router_{port}", at, spec, Weigh(), port=port) for port, at in where.items()]  # type: ignore[arg-type]
    return Method(name, tuple(patches), policy)


@register("identity_penalty")
@dataclass(frozen=True, slots=True)
class IdentityPenalty:
    """weight * sum over sites of ||I - V||^2, for the value maps of a router."""

    weight: float = 0.01

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        terms = []
        for form in parts:
            if isinstance(form, RouterForm) and form.value is not None:
                off = form.value.clone()
                off.diagonal().sub_(1.0)
                terms.append(off.square().sum())
        return sum(terms[1:], terms[0]) * self.weight if terms else None


@router("fusion", equation="h' = h + V sum_i softmax_i((Q x + a) . (K d_i + b)) d_i", source="Pfeiffer et al. 2021, arXiv 2005.00247")
def fusion(
    parts: tuple[str, ...] = (),
    where: Where = {"out": "ffn"},  # noqa: B006 (never changed)
    value: bool = True,
    read: str = "auto",
    dropout: float = 0.1,
    temperature: float = 1.0,
    penalty: float = 0.01,
) -> Method:
    """AdapterFusion: per token and site an attention over what the members change.

    As the released code: V starts at the identity (1e-6 beside the diagonal) and is kept near it by 0.01 * ||I - V||^2 per site,
    queries and keys have biases, dropout is on the scores, and keys are the members' changes, not their outputs.  The
    query is the add-and-norm of a sub-layer where there is one (`read`).  `value=False` is the released code's static
    variant.  Members may be of any method that changes activations.
    """
    spec = Router(parts, Attention(read, dropout, temperature), value)  # type: ignore[arg-type]
    penalties: tuple[Penalty, ...] = (IdentityPenalty(penalty),) if value and penalty else ()
    return weighing("fusion", spec, where, Policy(learning_rate=5e-5, penalties=penalties))


__all__ = ["ROUTERS", "IdentityPenalty", "fusion", "router", "weighing"]
