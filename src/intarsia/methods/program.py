"""Phases that come before a module's own training and decide which entries it trains.  Data only: `train/program.py` runs them.

| phase | scores of the base's entries | used by |
|---|---|---|
| `Probe` | squared gradients on some training examples: the diagonal of the empirical Fisher matrix | FISH, Child-Tuning D, RoSA |
| `Explore` | how far a full fine-tuning of a part of the steps moves them; it is then undone | LT-SFT |
| `WarmUp` | none: trains the module's other parts for a while, so that the next phase looks at the base beside these; then undone | RoSA |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.factors import DenseFactor
from intarsia.patches.matrix import MatrixForm
from intarsia.patches.sparse import SparseFactor


@register("probe")
@dataclass(frozen=True, slots=True)
class Probe:
    """Attributes:
    rows: training examples to look at.
    by: squares of the gradient of every `example`, or of the mean over a `batch` of `batch_size`.
    head_counts: the parameters of the module's head are among the entries that may be trained, so that so many fewer of
        the base are chosen.
    """

    rows: int = 1024
    by: Literal["example", "batch"] = "example"
    batch_size: int = 16
    head_counts: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch_size < 1:
            raise SpecError(f"a probe needs rows and batch_size of at least 1, found {self}")

    def chooses(self) -> str:
        """What the choice goes by, in a few words."""
        return f"squared gradients by {self.by}"


@register("explore")
@dataclass(frozen=True, slots=True)
class Explore:
    """Attributes:
    share: of the optimiser steps.
    learning_rate: of the full fine-tuning.
    """

    share: float = 0.5
    learning_rate: float | None = 5e-5

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise SpecError(f"the share of the steps lies between 0 and 1, found {self.share}")

    def steps_of(self, total: int) -> int:
        """Steps out of the run's that the phase takes."""
        return max(1, round(self.share * total))

    def chooses(self) -> str:
        """What the choice goes by, in a few words."""
        return "how far a full fine-tuning moves the weights"


@register("warm_up")
@dataclass(frozen=True, slots=True)
class WarmUp:
    """Attributes:
    steps: optimiser steps.
    share: of the run's steps that these are at most.
    learning_rate: None for those of the method.
    """

    steps: int = 64
    share: float = 0.25
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 < self.share < 1.0:
            raise SpecError(f"a warm-up needs steps of at least 1 and a share of the run's between 0 and 1, found {self}")

    def steps_of(self, total: int) -> int:
        """Steps out of the run's that the phase takes."""
        return max(1, min(self.steps, round(self.share * total)))

    def chooses(self) -> str:
        """What the choice goes by, in a few words."""
        return "nothing by itself: the other parts are trained first"


@register("distance")
@dataclass(frozen=True, slots=True)
class Distance:
    """weight * mean of |change| over the entries that may change: pulls back to the base (LT-SFT's regulariser)."""

    weight: float = 0.1

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        values = [v for part in parts if isinstance(part, MatrixForm) for v in _values(part)]
        size = sum(v.numel() for v in values)
        if not size:
            return None
        total = values[0].abs().sum()
        for value in values[1:]:
            total = total + value.abs().sum()
        return total * (self.weight / size)


def _values(form: MatrixForm) -> list[Tensor]:
    factor = form.factor
    if isinstance(factor, SparseFactor):
        return [factor.values]
    return [factor.value] if isinstance(factor, DenseFactor) else []
