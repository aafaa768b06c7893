"""Training rules of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): the orthogonality penalty and the rank budget.

The arithmetic is in pure functions (`smoothed`, `triplets`, `kept`, `RankBudget.at`); `RankBudget.after_step` applies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.methods.method import States
from intarsia.patches.core import CoreFactor

NOTHING: States = MappingProxyType({})


def cores(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, CoreFactor]]:
    """The factors with trained sides and a diagonal core among the parts of forms, by name."""
    for name, part in parts.items():
        for inner, module in part.named_modules():
            if isinstance(module, CoreFactor) and isinstance(module.frame.up, nn.Parameter):
                yield f"{name}.{inner}", module


@register("orthonormal")
@dataclass(frozen=True, slots=True)
class Orthonormal:
    """weight * mean over all sides P, Q of ||P^T P - I|| (Frobenius, not squared)."""

    weight: float = 0.1

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        terms = [t for _, core in cores({str(i): p for i, p in enumerate(parts)}) for t in core.skewness()]
        return torch.stack(terms).mean() * self.weight if terms else None


def smoothed(
    sensitivity: Tensor, uncertainty: Tensor, value: Tensor, gradient: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Running means of |w g| and of its distance from its own mean, after one step; importance is their product."""
    now = (value * gradient).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * now
    return sensitivity, beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs()


def triplets(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Score of every triplet, [r], from the importance of lambda [r], P [out, r] and Q [r, in]."""
    return core + up.mean(0) + down.mean(1)


def kept(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Which triplets are among the `budget` best of all matrices, [r] bool each; ties go to the first by order and index."""
    flat = torch.cat([s.flatten().double().cpu() for s in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[: max(budget, 0)]] = True
    return dict(zip(scores, mask.split([s.numel() for s in scores.values()])))


@register("rank_budget")
@dataclass(frozen=True, slots=True)
class RankBudget:
    """From the initial number of triplets down to `target` per matrix, by a cubic, over the middle of training.

    Only lambda is zeroed: P and Q stay, so that a triplet can come back until the last phase.

    Attributes:
        target: mean rank at the end.
        warmup: share of the steps before the first cut.
        final: share of the steps behind the last change of the budget, where the choice is made anew at every step.
        every: steps between two choices.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of the uncertainty.
    """

    target: int = 8
    warmup: float = 0.1
    final: float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if self.target < 1 or self.every < 1 or self.warmup < 0 or self.final < 0 or self.warmup + self.final >= 1:
            raise SpecError(f"a rank budget needs target, every >= 1 and warmup + final below 1, found {self}")

    def at(self, step: int, total: int, start: int, end: int) -> tuple[int, bool]:
        """Triplets allowed at a step (counted from 1) and whether the choice is made then."""
        first, last = round(self.warmup * total), total - round(self.final * total)
        if step <= first:
            return start, False
        if step > last:
            return end, True
        left = 1 - (step - first) / max(last - first, 1)
        return int(end + (start - end) * left**3), step % self.every == 0

    def settled(self, total: int) -> int:
        """The step from which the budget is that of the end."""
        return min(total - round(self.final * total) + 1, total)

    @torch.no_grad()
    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States = NOTHING) -> None:
        """Update the importance of every entry; at the steps of `at` zero the lambdas that are not among the best."""
        found = dict(cores(parts))
        scores: dict[str, Tensor] = {}
        for name, core in found.items():
            leaves: dict[str, Tensor] = {"core": core.core.value, "up": core.frame.up, "down": core.frame.down}  # type: ignore[dict-item]
            importance = {leaf: self._importance(f"{name}.{leaf}", value, memory) for leaf, value in leaves.items()}
            scores[name] = triplets(**importance)
        start = sum(s.numel() for s in scores.values())
        budget, now = self.at(step, total, start, min(start, self.target * len(scores)))
        if now:
            for name, mask in kept(scores, budget).items():
                value: Tensor = found[name].core.value  # type: ignore[assignment]
                value.mul_(mask.to(value.device, value.dtype))

    def _importance(self, key: str, value: Tensor, memory: dict[str, Tensor]) -> Tensor:
        pair = memory.get(key)
        if pair is None:
            pair = torch.zeros(2, *value.shape, device=value.device, dtype=value.dtype)
        if value.grad is not None:
            pair = torch.stack(smoothed(pair[0], pair[1], value, value.grad, self.beta1, self.beta2))
        memory[key] = pair
        return pair[0] * pair[1]
