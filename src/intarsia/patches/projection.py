"""`Projection`: every tensor of a module is a fixed random map of one short trained vector.

    W_i = lambda_i * P_i theta        theta [d] shared by all sites, P_i [D_i, d] frozen and never stored

Intrinsic dimension (Li et al. 2018, arXiv 1804.08838): no lambda, the columns of the stacked P have norm 1 over the whole
module.  SAID (Aghajanyan et al. 2021, arXiv 2012.13255): P_i keeps norms tensor by tensor, lambda_i is trained and counts
within d.  Starts at zero, unless the form asks for another start of theta.

| projection | P_i | memory |
|---|---|---|
| `dense` | N(0, 1) | D_i * d |
| `sparse` | +1 or -1 at a share 1/sqrt(D) of the entries | D_i * d / sqrt(D) |
| `fastfood` | H G Pi H B, cut to D_i rows (Le et al. 2013) | D_i |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.hadamard import hadamard
from intarsia.patches.init import INITS
from intarsia.patches.place import Peer, Place
from intarsia.patches.seeded import Stream

LARGEST = 2**31
"""Entries of a dense projection; beyond, `fastfood` is what one wants."""


class Theta(nn.Module):
    """value: [d], the one trained vector."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


class Norms(nn.Module):
    """Column norms of the stacked projection, [d]; nothing here is stored."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


class Map(nn.Module):
    """theta [d] -> [D]."""

    def forward(self, theta: Tensor) -> Tensor:
        raise NotImplementedError


class DenseMap(Map):
    """matrix: [D, d]."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        return self.matrix @ theta


class SparseMap(Map):
    """Entries `sign` at (row, column)."""

    row: Tensor
    column: Tensor
    sign: Tensor

    def __init__(self, size: int, row: Tensor, column: Tensor, sign: Tensor) -> None:
        super().__init__()
        self.size = size
        for name, value in (("row", row), ("column", column), ("sign", sign)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        return theta.new_zeros(self.size).index_add(0, self.row, theta[self.column] * self.sign)


class FastfoodMap(Map):
    """signs B, order Pi and gains G of H G Pi H B, each [LL], LL the power of two that holds D and d."""

    signs: Tensor
    order: Tensor
    gains: Tensor

    def __init__(self, size: int, signs: Tensor, order: Tensor, gains: Tensor, official: bool) -> None:
        super().__init__()
        self.size = size
        self.official = official
        for name, value in (("signs", signs), ("order", order), ("gains", gains)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        n = len(self.signs)
        share = 1 / math.sqrt(n) if self.official else 1.0
        x = F.pad(theta, (0, n - len(theta))) if len(theta) <= n else theta[:n]
        y = hadamard(x * self.signs, share)[self.order] * self.gains
        y = hadamard(y, share)[: self.size]
        return y / (self.gains.square().sum().sqrt() * math.sqrt(n) * math.sqrt(self.size / n))


class ProjectionFactor(Factor):
    """weight: lambda [1], None if there is none."""

    theta: Theta
    norms: Norms | None

    def __init__(
        self, theta: Theta, norms: Norms | None, project: Map, weight: nn.Parameter | None, share: float, shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.__dict__["theta"] = theta  # tied parts belong to the module's root, see `Place.tied`
        self.__dict__["norms"] = norms
        self.project = project
        self.weight = weight
        self.share = share
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        w = self.materialise()
        return F.linear(same_dtype(x, w), w)

    def materialise(self) -> Tensor:
        theta: Tensor = self.theta.value.to(next(self.project.buffers()).device)
        if self.norms is not None:
            theta = theta / self.norms.value.to(theta.device)
        value = self.project(theta).view(self.shape)
        value = value if self.share == 1.0 else value * self.share
        return value if self.weight is None else value * self.weight


@register("projection")
@dataclass(frozen=True, slots=True)
class Projection:
    """All tensors from `dimension` numbers.

    Attributes:
        kind: see the table above.
        scaled: a trained factor per tensor, taken out of `dimension` (SAID).
        official: as SAID's released code: the gradient through each transform is divided by the root of its size, and
            theta is cut to tensors smaller than it.  Only for replication.
    """

    dimension: int = 1000
    kind: Literal["fastfood", "sparse", "dense"] = "fastfood"
    seed: int = 0
    scaled: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        if self.official and self.kind != "fastfood":
            raise SpecError("official=True concerns the projection 'fastfood' only")

    def free(self, peers: tuple[Peer, ...]) -> int:
        """Size of theta.

        Raises:
            SpecError: nothing is left of the dimension.
        """
        size = self.dimension - (len(peers) if self.scaled else 0)
        if size < 1:
            raise SpecError(
                f"a dimension of {self.dimension} leaves nothing to train"
                + (f" beside one factor for each of {len(peers)} tensors; raise it or narrow the sites" if self.scaled else "")
            )
        return size

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> ProjectionFactor:
        peers = self.family(shape, place)
        d, total = self.free(peers), sum(math.prod(p.shape) for p in peers)
        size = math.prod(shape)
        theta = place.tied(("theta", self.seed, d), lambda: Theta(place.parameter(d, fill=INITS[init])))
        norms, share = None, 1.0
        alone = self.scaled or bool(place.role)
        if self.kind == "fastfood":
            share = 1.0 if alone else math.sqrt(size / total)
        elif not alone:
            norms = place.tied(("norms", self.kind, self.seed, d, total), lambda: Norms(place.buffer((d,), lambda: self.norms(peers, d))))
        else:  # norms are kept tensor by tensor, on average
            share = 1.0 / math.sqrt(size if self.kind == "dense" else size / math.sqrt(total))
        weight = place.parameter(1, fill=1.0) if self.scaled else None
        return ProjectionFactor(theta, norms, self.map(place, size, d, total), weight, share, tuple(shape))

    def family(self, shape: tuple[int, ...], place: Place) -> tuple[Peer, ...]:
        """The tensors that one projection is stacked from: those of the patch, or the one alone inside another form."""
        own = (Peer(place.site, tuple(shape)),)
        if not any(peer == own[0] for peer in place.peers):
            if self.scaled and place.peers:
                raise SpecError(f"{place.label}: a projection with a factor per tensor counts the base's parameters; use scaled=False here")
            return own
        return place.peers

    def map(self, place: Place, size: int, d: int, total: int) -> Map:
        """P_i without its scale."""
        name = place.label
        if self.kind == "dense":
            return DenseMap(place.buffer((size, d), lambda: self.dense(name, size, d)))
        if self.kind == "sparse":
            if place.device.type == "meta":
                return SparseMap(size, *(torch.empty(0, device="meta") for _ in range(3)))
            return SparseMap(size, *(t.to(place.device) for t in self.sparse(name, size, d, total)))
        n = 1 << (max(size, 1 if self.official else d) - 1).bit_length()
        return FastfoodMap(
            size,
            place.buffer((n,), lambda: Stream(self.seed, name, "signs").signs(n).float()),
            place.buffer((n,), lambda: Stream(self.seed, name, "order").permutation(n)),
            place.buffer((n,), lambda: Stream(self.seed, name, "gains").normal(n).float()),
            self.official,
        )

    def dense(self, name: str, size: int, d: int) -> Tensor:
        """N(0, 1), [size, d]."""
        if size * d > LARGEST:
            raise SpecError(
                f"{name}: a dense projection of {size:,} x {d:,} numbers is beyond the limit of {LARGEST:,}; "
                "use projection='fastfood' or 'sparse', or fewer sites"
            )
        return Stream(self.seed, name, "dense").normal(size * d).view(size, d).float()

    def sparse(self, name: str, size: int, d: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and signs of the entries that are not zero."""
        count = max(1, round(size * d / math.sqrt(total)))
        place = Stream(self.seed, name, "place").distinct(count, size * d)
        return place // d, place % d, Stream(self.seed, name, "sign").signs(count).float()

    def norms(self, peers: tuple[Peer, ...], d: int) -> Tensor:
        """Column norms over all tensors, [d]; 1 for a column without entries."""
        squares = torch.zeros(d, dtype=torch.float64)
        total = sum(math.prod(p.shape) for p in peers)
        for peer in peers:
            size = math.prod(peer.shape)
            if self.kind == "dense":
                squares += self.dense(peer.site.name, size, d).double().square().sum(0)
            else:
                squares += torch.bincount(self.sparse(peer.site.name, size, d, total)[1], minlength=d)
        return torch.where(squares > 0, squares, 1.0).sqrt().float()
