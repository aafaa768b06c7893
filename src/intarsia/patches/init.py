"""Initial values, each a function of (tensor, generator) so that a seed fixes them whatever the device.

`zeros` and `ones` are plain floats.  What needs the base (SVD, vocabulary rows, activations) lives with its form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from intarsia._registry import Registry

Fill = Callable[[Tensor, torch.Generator], None]
INITS: Registry[Fill] = Registry("init")


def normal(std: float) -> Fill:
    """N(0, std^2)."""

    def fill(value: Tensor, generator: torch.Generator) -> None:
        value.normal_(0.0, std, generator=generator)

    return fill


def uniform(bound: float) -> Fill:
    """U(-bound, bound)."""

    def fill(value: Tensor, generator: torch.Generator) -> None:
        value.uniform_(-bound, bound, generator=generator)

    return fill


def truncated(std: float) -> Fill:
    """N(0, std^2) cut at two standard deviations (Houlsby et al. 2019)."""

    def fill(value: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std, generator=generator)

    return fill


def kaiming(value: Tensor, generator: torch.Generator) -> None:
    """U(-1/sqrt(n), 1/sqrt(n)) for a matrix [m, n]: kaiming_uniform with a = sqrt(5), as LoRA's released code."""
    value.uniform_(-1 / math.sqrt(value.shape[-1]), 1 / math.sqrt(value.shape[-1]), generator=generator)


def glorot(value: Tensor, generator: torch.Generator) -> None:
    """U(-b, b) with b = sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / (value.shape[-1] + value.shape[-2]))
    value.uniform_(-bound, bound, generator=generator)


def phm(value: Tensor, generator: torch.Generator) -> None:
    """Glorot with gain sqrt(2), matrix by matrix (Mahabadi et al. 2021, released code of Compacter)."""
    glorot(value, generator)
    value.mul_(math.sqrt(2))


def zeros(value: Tensor, generator: torch.Generator) -> None:
    """All zero; the generator is not used."""
    value.zero_()


def ones(value: Tensor, generator: torch.Generator) -> None:
    """All one; the generator is not used."""
    value.fill_(1.0)


for _name, _fill in {
    "zeros": zeros,
    "ones": ones,
    "kaiming": kaiming,
    "glorot": glorot,
    "phm": phm,
    "bert": normal(0.02),
    "houlsby": truncated(1e-2),
    "unit": normal(1.0),
    "tiny": normal(1e-5),
    "loha": normal(0.1),
}.items():
    INITS.add(_name, _fill)
