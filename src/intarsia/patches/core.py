"""`Core`: a small matrix between two frames, W = g * up @ core @ down, with up [out, r], core [r, r], down [r, in].

| frame | up, down | core | method |
|---|---|---|---|
| `Free` | trained | `Diag` | AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) |
| `Seeded` | one random pair for the whole module, cut to each site | `Diag`, and a gain g per output | VeRA (Kopiczko et al. 2024, arXiv 2310.11454) |
| `Singular` | singular vectors of the base weight | `Dense` | LoRA-XS (Balazy et al. 2024, arXiv 2405.17604) |
| `Singular` | all of them | `Pattern` | SVFT (Lingam et al. 2024, arXiv 2405.19597) |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.delta import same_dtype
from intarsia.patches.factors import Dense, Factor, FactorSpec, LowRank
from intarsia.patches.init import INITS
from intarsia.patches.place import Place
from intarsia.patches.seeded import DRAWS, Stream
from intarsia.patches.spectrum import check_rank, leading, thin


class Frame(nn.Module):
    """up [out, r] and down [r, in]."""

    up: Tensor
    down: Tensor

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, value in (("up", up), ("down", down)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    def sides(self, out: int, inner: int) -> tuple[Tensor, Tensor]:
        """up and down for a matrix [out, inner]: leading slices where they are larger."""
        return self.up[:out], self.down[:, :inner]


@runtime_checkable
class FrameSpec(Protocol):
    """A frozen, registered dataclass that builds a frame."""

    def frame(self, rank: int, shape: tuple[int, int], place: Place) -> tuple[Frame, bool]:
        """A frame, and whether it belongs to the whole module (see `Place.tied`)."""


@register("free")
@dataclass(frozen=True, slots=True)
class Free:
    """Both sides trained."""

    init: str = "bert"

    def frame(self, rank: int, shape: tuple[int, int], place: Place) -> tuple[Frame, bool]:
        fill = INITS[self.init]
        return Frame(place.parameter(shape[0], rank, fill=fill), place.parameter(rank, shape[1], fill=fill)), False


@register("seeded")
@dataclass(frozen=True, slots=True)
class Seeded:
    """Frozen random sides, one pair for all sites of the module, as large as its largest site."""

    seed: int = 0
    draw: str = "he"

    def frame(self, rank: int, shape: tuple[int, int], place: Place) -> tuple[Frame, bool]:
        shapes = [shape, *(peer.shape for peer in place.peers)]
        out, inner = max(s[0] for s in shapes), max(s[-1] for s in shapes)

        def make() -> Frame:
            draw = DRAWS[self.draw]
            up = place.buffer((out, rank), lambda: draw((out, rank), Stream(self.seed, "up")))
            return Frame(up, place.buffer((rank, inner), lambda: draw((rank, inner), Stream(self.seed, "down"))))

        return place.tied(("frame", self.seed, self.draw, out, rank, inner), make), True


@register("singular")
@dataclass(frozen=True, slots=True)
class Singular:
    """Frozen singular vectors of the base weight; `spectrum` says which side carries the singular values."""

    spectrum: Literal["down", "up", "none"] = "down"

    def frame(self, rank: int, shape: tuple[int, int], place: Place) -> tuple[Frame, bool]:
        if rank > min(shape):
            check_rank(rank, torch.empty(shape, device="meta"))
        if place.device.type == "meta":
            return Frame(place.parameter(shape[0], rank).detach(), place.parameter(rank, shape[1]).detach()), False
        weight = place.base_weight()
        if tuple(weight.shape) != tuple(shape):
            raise SpecError(f"{place.site.name}: the weight there is {tuple(weight.shape)}, the factor {tuple(shape)}")
        u, s, vt = thin(weight) if rank == min(shape) else leading(weight, rank)
        up = u * s if self.spectrum == "up" else u
        down = s[:, None] * vt if self.spectrum == "down" else vt
        return Frame(*(t.to(place.device, place.dtype) for t in (up, down))), False


class CoreFactor(Factor):
    """gain * up @ core @ down; gain [out] or None."""

    frame: Frame

    def __init__(self, frame: Frame, tied: bool, core: Factor, gain: nn.Parameter | None, shape: tuple[int, int]) -> None:
        super().__init__()
        if tied:
            self.__dict__["frame"] = frame
        else:
            self.frame = frame
        self.core = core
        self.gain = gain
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.frame.sides(*self.shape)
        y = F.linear(self.core(F.linear(same_dtype(x, down), down)), up)
        return y if self.gain is None else y * self.gain

    def materialise(self) -> Tensor:
        up, down = self.frame.sides(*self.shape)
        w = up @ self.core.materialise() @ down
        return w if self.gain is None else w * self.gain[:, None]

    def export(self) -> tuple[LowRank, dict[str, Tensor]] | None:
        """A plain low-rank product, where the sides are trained: the frozen ones are smaller as they are."""
        if not isinstance(self.frame.up, nn.Parameter):
            return None
        up = self.frame.up @ self.core.materialise()
        return LowRank(up.shape[1]), {"up": up if self.gain is None else up * self.gain[:, None], "down": self.frame.down}

    def skewness(self) -> list[Tensor]:
        """How far the trained sides are from orthonormal: ||P^T P - I|| and ||Q Q^T - I|| (Frobenius)."""
        if not isinstance(self.frame.up, nn.Parameter):
            return []
        eye = torch.eye(self.frame.up.shape[1], device=self.frame.up.device, dtype=self.frame.up.dtype)
        up, down = self.frame.up, self.frame.down
        return [torch.linalg.matrix_norm(up.T @ up - eye), torch.linalg.matrix_norm(down @ down.T - eye)]


@register("core")
@dataclass(frozen=True, slots=True)
class Core:
    """A factor [rank, rank] between frames.

    Attributes:
        rank: None for the smaller side of the matrix.
        core_init: start of the core, None for what the caller asks.
        gain: start of a trained gain per output, None for no gain.
    """

    rank: int | None = 8
    frame: FrameSpec = field(default_factory=Free)
    core: FactorSpec = field(default_factory=Dense)
    core_init: str | None = None
    gain: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank must be at least 1, found {self.rank}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> CoreFactor:
        if len(shape) != 2:
            raise SpecError(f"a core stands between the sides of a matrix, {place.site.name} holds a tensor of shape {shape}")
        rank = min(shape) if self.rank is None else self.rank
        frame, tied = self.frame.frame(rank, (shape[0], shape[1]), place)
        core = self.core.build((rank, rank), place, init if self.core_init is None else self.core_init)
        if isinstance(core, Aligned):
            core.align(*frame.sides(shape[0], shape[1]))
        gain = None if self.gain is None else place.parameter(shape[0], fill=INITS[self.gain])
        return CoreFactor(frame, tied, core, gain, (shape[0], shape[1]))


@runtime_checkable
class Aligned(Protocol):
    """A core that looks at the frame before it starts."""

    def align(self, up: Tensor, down: Tensor) -> None: ...
