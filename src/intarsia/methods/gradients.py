"""Rules on gradients: what is done to them before the optimiser's moments see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import nn

from intarsia._codec import register
from intarsia.errors import SpecError


@register("child_gradients")
@dataclass(frozen=True, slots=True)
class ChildGradients:
    """g <- g * m / keep, with m ~ Bernoulli(keep) drawn anew for every entry and step (Xu et al. 2021, arXiv 2109.05687: F).

    Attributes:
        keep: share of the entries that get their gradient, `p_F` of the paper.
        spare: patches whose tensors always learn, e.g. the head.
    """

    keep: float = 0.3
    spare: tuple[str, ...] = ("head",)

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise SpecError(f"a share of gradients to keep lies above 0 and is at most 1, found {self.keep}")

    @torch.no_grad()
    def before_step(self, step: int, seed: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            patch = name.split("/")[-1].split(".", 1)[0]
            if parameter.grad is None or patch in self.spare:
                continue
            digest = sha256(f"{seed}:{step}:{name}".encode()).digest()
            source = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            mask = torch.rand(parameter.grad.shape, generator=source) < self.keep
            parameter.grad.mul_(mask.to(parameter.grad)).div_(self.keep)
