"""Rules between steps that move a fixed number of entries (SpIEL, Ansell et al. 2024, arXiv 2401.16405).

| rule | entries are grown where | remembers |
|---|---|---|
| `Regrow` (AG) | the gradients of a window add up to most, of candidates named by its first step | as many numbers as entries |
| `RegrowByMomenta` (MA) | SM3's accumulators of rows and columns say that gradients are large; no gradient of a whole tensor is taken | rows + columns |

Both drop the entries with the smallest differences; what is grown starts at zero.  The number of entries of a tensor never
changes; ties go to the first by position.  What the rules remember is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.methods.method import States
from intarsia.patches.matrix import MatrixForm
from intarsia.patches.sparse import SparseFactor, best


def exchanged(step: int, total: int, every: int, rate: float, count: int) -> int:
    """Entries out of `count` that are dropped at the end of a step: all at the first choice, then a share that falls linearly to zero."""
    if step % every or step >= total:
        return 0
    return count if step == every else int(rate * (1 - step / total) * count)


def exchange(factor: SparseFactor, grown: Tensor, state: Mapping[str, Any], moments: Mapping[str, Tensor]) -> None:
    """Drop as many of the smallest differences as are grown, and start these at zero.

    Args:
        grown: flat positions that are not among the factor's.
        state: the optimiser's of the values, changed in place.
        moments: of the grown entries, by their name in `state`.
    """
    count = len(grown)
    stay = factor.values.abs().argsort(descending=True, stable=True)[: len(factor.index) - count]
    index = torch.cat((factor.index.long()[stay], grown))
    order = index.argsort()
    for key, value in moments.items():
        if key in state:
            state[key].copy_(torch.cat((state[key][stay], value.to(state[key])))[order])
    zero = torch.zeros(count, dtype=factor.values.dtype, device=factor.values.device)
    factor.values.copy_(torch.cat((factor.values[stay], zero))[order])
    factor.index.copy_(index[order])


def long_enough(every: int, total: int) -> None:
    """Refuse a training in which no entry would move.

    Raises:
        SpecError: it is that short.
    """
    if total <= every:
        raise SpecError(f"entries are exchanged every {every} steps, and this training has {total}; set `every` below that")


@register("regrow")
@dataclass(frozen=True, slots=True)
class Regrow:
    """SpIEL-AG.  The window before a choice collects the gradient of the whole tensor: its first step names as many candidates
    as there are entries, the others add up at these.  Grown entries get the moments that the window's gradients give.

    Attributes:
        every: steps between two choices.
        window: steps whose gradients are collected.
        rate: share of the entries that is exchanged, falling linearly to zero over the run; the first choice exchanges all.
        betas: of the optimiser, for the moments of grown entries.
    """

    every: int = 20
    window: int = 5
    rate: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.window < 1 or self.every < self.window or not 0.0 < self.rate <= 1.0:
            raise SpecError(f"regrowing needs 1 <= window <= every and a rate above 0 and at most 1, found {self}")

    def begin(self, step: int, parts: Mapping[str, nn.Module], memory: Mapping[str, Tensor]) -> None:
        """Before a step's first forward pass: have the gradients of whole tensors collected where the step is in a window."""
        within = self._within(step)
        for factor in _sparse(parts).values():
            factor.collect(within)

    def _within(self, step: int) -> bool:
        return (step - 1) % self.every >= self.every - self.window

    @torch.no_grad()
    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States) -> None:
        long_enough(self.every, total)
        if not self._within(step):
            return
        for name, factor in _sparse(parts).items():
            gradient = _averaged(factor.collected(), factor.values)
            self._note(name, factor, gradient, memory)
            count = exchanged(step, total, self.every, self.rate, len(factor.index))
            if count:
                self._exchange(name, factor, count, memory, states.get(factor.values, {}))
            if step % self.every == 0:
                for key in ("candidates", "sum", "squares"):
                    memory.pop(f"{name}.{key}", None)

    def _note(self, name: str, factor: SparseFactor, gradient: Tensor, memory: dict[str, Tensor]) -> None:
        key = f"{name}.candidates"
        if key not in memory:
            size = gradient.abs()
            size[factor.index.long()] = -1.0  # entries that are there already are no candidates
            fresh = min(len(factor.index), len(size) - len(factor.index))
            memory[key] = size.argsort(descending=True, stable=True)[:fresh].sort().values
            memory[f"{name}.sum"] = torch.zeros(fresh, dtype=gradient.dtype, device=gradient.device)
            memory[f"{name}.squares"] = torch.zeros_like(memory[f"{name}.sum"])
        at = gradient[memory[key]]
        memory[f"{name}.sum"] = memory[f"{name}.sum"] + at
        memory[f"{name}.squares"] = memory[f"{name}.squares"] + at.square()

    def _exchange(self, name: str, factor: SparseFactor, count: int, memory: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        candidates, total, squares = (memory[f"{name}.{key}"] for key in ("candidates", "sum", "squares"))
        grown = total.abs().argsort(descending=True, stable=True)[: min(count, len(candidates))]
        steps = float(state.get("step", 0))
        moments = {
            "exp_avg": total[grown] / self.window * (1 - self.betas[0] ** steps),
            "exp_avg_sq": squares[grown] / self.window * (1 - self.betas[1] ** steps),
        }
        exchange(factor, candidates[grown], state, moments)


@register("regrow_by_momenta")
@dataclass(frozen=True, slots=True)
class RegrowByMomenta:
    """SpIEL-MA.  SM3 (Anil et al. 2019, arXiv 1901.11150) keeps, of the squared gradients of the entries there are, the largest
    sums per row and per column; an entry that is not there is taken to have the product of its row's and its column's.

    The released code trains with SM3 itself.  Here the module's optimiser trains, the accumulators only choose, and grown
    entries get a second moment from them: the smaller one of row and column, per step.

    Attributes:
        every: steps between two choices.
        rate: as in `Regrow`.
        beta: of the optimiser's second moment.
    """

    every: int = 20
    rate: float = 0.2
    beta: float = 0.999

    def __post_init__(self) -> None:
        if self.every < 1 or not 0.0 < self.rate <= 1.0:
            raise SpecError(f"regrowing needs every >= 1 and a rate above 0 and at most 1, found {self}")

    @torch.no_grad()
    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States) -> None:
        long_enough(self.every, total)
        for name, factor in _sparse(parts).items():
            width = max(factor.shape[-1], 1)
            line, column = factor.index.long() // width, factor.index.long() % width
            rows, columns = self._accumulated(name, factor, line, column, memory)
            count = exchanged(step, total, self.every, self.rate, len(factor.index))
            if not count:
                continue
            scores = (rows.sqrt()[:, None] * columns.sqrt()).flatten()  # roots: the same order, and no underflow
            scores[factor.index.long()] = -1.0
            grown = best({"": scores.cpu()}, min(count, len(scores) - len(factor.index)))[""].to(factor.index.device)
            state = states.get(factor.values, {})
            second = torch.minimum(rows[grown // width], columns[grown % width]) / step
            moments = {"exp_avg": torch.zeros_like(second), "exp_avg_sq": second * (1 - self.beta ** float(state.get("step", 0)))}
            exchange(factor, grown, state, moments)

    def _accumulated(self, name: str, factor: SparseFactor, line: Tensor, column: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """SM3's accumulators after this step's gradient."""
        lines = prod(factor.shape[:-1])
        rows = memory.get(f"{name}.rows", torch.zeros(lines, device=factor.values.device))
        columns = memory.get(f"{name}.columns", torch.zeros(factor.shape[-1], device=factor.values.device))
        if factor.values.grad is not None:
            sums = torch.minimum(rows[line], columns[column]) + factor.values.grad.float().square()
            rows = rows.scatter_reduce(0, line, sums, "amax")
            columns = columns.scatter_reduce(0, column, sums, "amax")
        memory[f"{name}.rows"], memory[f"{name}.columns"] = rows, columns
        return rows, columns


def _sparse(parts: Mapping[str, nn.Module]) -> dict[str, SparseFactor]:
    return {name: form.factor for name, form in parts.items() if isinstance(form, MatrixForm) and isinstance(form.factor, SparseFactor)}


def _averaged(found: Tensor | None, like: Tensor) -> Tensor:
    """A step's gradient over all processes."""
    assert found is not None, "the rule was not told that the step begins"
    gradient = found.flatten().to(like.dtype)
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
