"""`Sparse`: a few entries of a tensor, as their positions and their trained values.

The trained parameter holds the chosen entries only, so neither weight decay nor an optimiser's momentum can reach another
entry, and its state has their number.  Which entries: drawn from a seed until something better is known (`choose`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import ModuleError, SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Factor
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import Stream


def rising(index: Tensor, below: int) -> bool:
    """Whether positions [k] rise from 0 or more and stay below a size."""
    return not len(index) or (int(index[0]) >= 0 and int(index[-1]) < below and bool((index[1:] > index[:-1]).all()))


class SparseFactor(Factor):
    """values [k] at the flat positions index [k], rising, of a tensor of `shape`; zero elsewhere."""

    index: Tensor

    def __init__(self, shape: tuple[int, ...], index: Tensor, values: nn.Parameter, spec: Sparse) -> None:
        super().__init__()
        self.shape = shape
        self.spec = spec
        self.register_buffer("index", index)
        self.values = values
        self.__dict__["_gradient"] = None  # of the whole tensor; None while nobody asks for it

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.values), self.materialise())

    def materialise(self) -> Tensor:
        zero = torch.zeros(prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        whole = zero.scatter(0, self.index.long(), self.values).view(self.shape)
        if self._gradient is not None and whole.requires_grad:
            whole.register_hook(self._gradient.append)
        return whole

    _gradient: list[Tensor] | None

    def collect(self, wanted: bool) -> None:
        """Collect the gradients of the whole tensor from now on, or stop doing so."""
        self.__dict__["_gradient"] = [] if wanted else None

    def collected(self) -> Tensor:
        """Their sum since `collect`, of `shape`."""
        return torch.stack(self._gradient or [torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)]).sum(0)

    def choose(self, index: Tensor) -> None:
        """Train these entries from now on, from zero.  The parameter is a new one: make optimisers afterwards."""
        self._check(index, index)
        self.index = index.to(self.index.device, self.index.dtype)
        self.values = nn.Parameter(torch.zeros(len(index), dtype=self.values.dtype, device=self.values.device), self.values.requires_grad)

    def adopt(self, leaves: Mapping[str, Tensor]) -> None:
        """Make room for stored leaves, whose number of entries need not be that of a fresh factor.

        Raises:
            ModuleError: they are not positions of this tensor and as many values.
        """
        self._check(leaves["index"], leaves["values"])
        self.choose(leaves["index"])

    def _check(self, index: Tensor, values: Tensor) -> None:
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool or values.shape != index.shape:
            raise ModuleError(f"sparse entries need a vector of positions and as many values, found {tuple(index.shape)} {index.dtype} and {tuple(values.shape)}")
        if not rising(index, prod(self.shape)):
            raise ModuleError(f"positions of sparse entries must rise and lie below {prod(self.shape)}, the size of a tensor of shape {self.shape}")


@register("sparse")
@dataclass(frozen=True, slots=True)
class Sparse:
    """A part of the entries of a tensor.

    Attributes:
        density: share of the entries of all sites together; the number is exact, floor(density * size).
        rank: instead, as many entries as a low-rank factor of this rank has: rank * (m + n) of a matrix, all of a vector
            shorter than that.
        scope: when entries are chosen by their scores (`Policy.program`), the best of all sites (`all`) or of each (`site`).
        seed: of the entries before such a choice.
    """

    density: float = 0.005
    rank: int | None = None
    scope: Literal["all", "site"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise SpecError(f"a density lies above 0 and is at most 1, found {self.density}")
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> SparseFactor:
        size = prod(shape)
        count = self.count(shape, place)
        dtype = torch.int32 if size < 2**31 else torch.int64
        index = place.buffer((count,), lambda: Stream(self.seed, "sparse", place.label).distinct(count, size).to(dtype))
        return SparseFactor(tuple(shape), index, place.parameter(count, fill=INITS[init]), self)

    def count(self, shape: Sequence[int], place: Place) -> int:
        """Entries at this site."""
        if self.rank is not None:
            return min(prod(shape), self.rank * sum(shape))
        sizes = {peer.site.name: prod(peer.shape) for peer in place.peers} if not place.role else {}
        if place.site.name not in sizes or sizes[place.site.name] != prod(shape):
            return max(1, int(self.density * prod(shape)))
        return shares(list(sizes.values()), self.density)[list(sizes).index(place.site.name)]


def shares(sizes: Sequence[int], density: float) -> list[int]:
    """floor(density * sum) entries divided over tensors in proportion; what is left goes to the largest remainders, then by order."""
    exact = [size * density for size in sizes]
    found = [int(part) for part in exact]
    left = int(density * sum(sizes) + 1e-9) - sum(found)
    order = sorted(range(len(sizes)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: max(left, 0)]:
        found[i] += 1
    return found


def best(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Positions of the `count` largest scores over all tensors, rising, per tensor; ties go to the first tensor and position."""
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    count = min(count, len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        limit = flat.topk(count, sorted=False).values.min()
        chosen = flat > limit
        chosen[(flat == limit).nonzero()[: count - int(chosen.sum()), 0]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {key: part.nonzero()[:, 0] for key, part in zip(scores, parts)}
