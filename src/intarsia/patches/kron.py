"""Kronecker products as factors: W = sum over i of A_i (x) B_i.

`Kron` is the parameterised hypercomplex multiplication of Zhang et al. 2021 (arXiv 2102.08597) and, with a low-rank B_i
and one A for the whole module, that of Compacter (Mahabadi et al. 2021, arXiv 2106.04647).  `KronPair` is the single
term of LoKr (Yeh et al. 2023, arXiv 2309.14859), with unequal sides.  Matrices are written [out, in]; the papers' code
multiplies from the left (x W), so its A_i are the transposes of ours.

The product is applied without forming W: with x seen as X [q, in/q], (A (x) B) x is A X B^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS, normal
from intarsia.patches.place import Place


class KronRule(nn.Module):
    """The left matrices A: [terms, p, q]."""

    def __init__(self, left: nn.Parameter) -> None:
        super().__init__()
        self.left = left

    def forward(self) -> Tensor:
        return self.left


class KronFactor(Factor):
    """sum_i left_i (x) right_i, with right_i = up_i @ down_i: up [terms, out/p, r], down [terms, r, in/q].

    Without a rank `up` is right itself, [terms, out/p, in/q], and `down` is None.
    """

    def __init__(self, rule: KronRule, up: nn.Parameter, down: nn.Parameter | None, tied: bool) -> None:
        super().__init__()
        if tied:
            self.__dict__["rule"] = rule  # belongs to the module's root, see `Place.tied`
        else:
            self.rule = rule
        self.up = up
        self.down = down

    def right(self) -> Tensor:
        """B: [terms, out/p, in/q]."""
        return self.up if self.down is None else self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        left: Tensor = self.rule()
        x = same_dtype(x, self.up).unflatten(-1, (left.shape[2], -1))
        if self.down is None:
            mixed = torch.einsum("ipq,...qk->...ipk", left, x)
        else:
            mixed = torch.einsum("ipq,...qir->...ipr", left, torch.einsum("irk,...qk->...qir", self.down, x))
        return torch.einsum("...ipk,iok->...po", mixed, self.up).flatten(-2)

    def materialise(self) -> Tensor:
        left: Tensor = self.rule.left
        w = torch.einsum("ipq,iok->poqk", left, self.right())
        return w.flatten(2).flatten(0, 1)


def _divisible(what: str, size: int, n: int, place: Place) -> int:
    if size % n:
        raise SpecError(f"{place.site.name}: a Kronecker factor needs {what} divisible by n={n}, found {size}")
    return size // n


@register("kron")
@dataclass(frozen=True, slots=True)
class Kron:
    """`n` terms A_i [n, n] (x) B_i [out/n, in/n]; n divides both sides.

    Attributes:
        rank: rank of every B_i, None for a full one.
        share: one A for the whole module (all sites, patches and projections with this n), as Compacter prescribes.
        left_init: start of A; None for the released code's N(0, 1e-4^2) if shared, N(0, 0.01^2) if not.
        down_init: start of the inner side of a low-rank B; `init` of `build` is the start of its outer side (or of B).
    """

    n: int = 4
    rank: int | None = 1
    share: bool = True
    left_init: str | None = None
    down_init: str = "phm"

    def __post_init__(self) -> None:
        if self.n < 1 or (self.rank is not None and self.rank < 1):
            raise SpecError(f"a Kronecker factor needs n >= 1 and rank >= 1 (or none), found n={self.n}, rank={self.rank}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> KronFactor:
        if len(shape) != 2:
            raise SpecError(f"a Kronecker factor needs a matrix, {place.site.name} holds a tensor of shape {tuple(shape)}")
        out, inner = (_divisible(w, s, self.n, place) for w, s in zip(("an output width", "an input width"), shape))
        fill = normal(1e-4 if self.share else 1e-2) if self.left_init is None else INITS[self.left_init]

        def rule() -> KronRule:
            return KronRule(place.parameter(self.n, self.n, self.n, fill=fill))

        left = place.tied(("kron", self.n), rule) if self.share else rule()
        if self.rank is None:
            return KronFactor(left, place.parameter(self.n, out, inner, fill=INITS[init]), None, self.share)
        up = place.parameter(self.n, out, self.rank, fill=INITS[init])
        down = place.parameter(self.n, self.rank, inner, fill=INITS[self.down_init])
        return KronFactor(left, up, down, self.share)


def near_square(size: int, limit: int | None = None) -> tuple[int, int]:
    """(a, b) with a * b = size, a <= b: `a` is `limit` if that divides, else the largest divisor up to the root."""
    if limit is not None and size % limit == 0:
        return cast(tuple[int, int], tuple(sorted((limit, size // limit))))
    a = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    return a, size // a


@register("kron_pair")
@dataclass(frozen=True, slots=True)
class KronPair:
    """One term A [p, q] (x) B [out/p, in/q], p and q the divisors nearest below the root (or `limit`).

    Attributes:
        rank: of B; B is full where the rank would not make it smaller.
    """

    rank: int | None = 8
    limit: int | None = None
    left_init: str = "kaiming"
    down_init: str = "kaiming"

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> KronFactor:
        if len(shape) != 2:
            raise SpecError(f"a Kronecker factor needs a matrix, {place.site.name} holds a tensor of shape {tuple(shape)}")
        (p, out), (q, inner) = (near_square(s, self.limit) for s in shape)
        rule = KronRule(place.parameter(1, p, q, fill=INITS[self.left_init]))
        if self.rank is None or self.rank >= max(out, inner) / 2:
            return KronFactor(rule, place.parameter(1, out, inner, fill=INITS[init]), None, False)
        down = place.parameter(1, self.rank, inner, fill=INITS[self.down_init])
        return KronFactor(rule, place.parameter(1, out, self.rank, fill=INITS[init]), down, False)

