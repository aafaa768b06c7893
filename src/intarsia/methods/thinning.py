"""Rules between steps that thin what a module trains: projection, pruning in rounds.

| rule | at | does |
|---|---|---|
| `Project` | once, after a share of the steps | keeps the largest gated differences of all tensors (diff pruning) |
| `Prune` | the ends of all rounds but the last | takes away a share of what is left, by abs(weight), and rewinds the rest (lottery tickets) |

All choices are exact in number; ties go to the first by order of the sites and position.  What they remember is in the
checkpoint, so an interrupted training makes the same choices.  After each choice the optimiser's moments and the
learning-rate schedule begin anew (`stages`).  Penalty of the gates: `L0`.
What is not here: entries that move (`regrow.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.methods.method import Stage, States
from intarsia.patches.masks import HardConcreteFactor, TicketForm
from intarsia.patches.matrix import MatrixForm
from intarsia.patches.sparse import best


def gated(parts: Sequence[nn.Module]) -> Iterator[HardConcreteFactor]:
    """The factors under gates among forms."""
    return (form.factor for form in parts if isinstance(form, MatrixForm) and isinstance(form.factor, HardConcreteFactor))


@register("l0")
@dataclass(frozen=True, slots=True)
class L0:
    """weight * expected number of changed entries (Louizos et al. 2018, arXiv 1712.01312), until they are chosen.

    Attributes:
        official: add the chances of an entry's and its tensor's gate, as the released code of diff pruning does, instead of
            multiplying them, as the paper does.
    """

    weight: float = 1.25e-7
    official: bool = False

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        terms = [f.expected_entries(self.official) for f in gated(parts) if not f.projected]
        return torch.stack(terms).sum() * self.weight if terms else None


def clear(states: States, parameters: Sequence[nn.Parameter]) -> None:
    """Forget an optimiser's moments of some parameters: what follows begins like a fresh optimiser."""
    for parameter in parameters:
        for value in states.get(parameter, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


@register("project")
@dataclass(frozen=True, slots=True)
class Project:
    """Attributes:
    density: share of all entries that may differ from the base, exact in number: floor(density * size).
    share: of the steps before the choice; the others train the chosen entries.
    rate: multiplies the learning rate of these steps (the paper: 1e-5 before, 5e-5 then).
    """

    density: float = 0.005
    share: float = 0.5
    rate: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0 or not 0.0 < self.share < 1.0:
            raise SpecError(f"a projection needs a density above 0 and at most 1 and a share of the steps between 0 and 1, found {self}")

    def settled(self, total: int) -> int:
        """The step after which the entries stay."""
        return max(1, round(self.share * total))

    def stages(self, total: int) -> list[Stage]:
        """The training of the chosen entries is one of its own."""
        return [Stage(self.settled(total), rate=self.rate)]

    @torch.no_grad()
    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States) -> None:
        if step != self.settled(total):
            return
        factors = {str(i): f for i, f in enumerate(gated(list(parts.values())))}
        count = int(self.density * sum(f.value.numel() for f in factors.values()) + 1e-9)
        sizes = {key: (f.value * f.gates(False)).abs().flatten().cpu() for key, f in factors.items()}
        for key, index in best(sizes, count).items():
            kept = torch.zeros(sizes[key].numel(), dtype=torch.bool)
            kept[index] = True
            factor = factors[key]
            factor.project(kept.view(factor.value.shape).to(factor.value.device))
            clear(states, list(factor.parameters()))


@register("prune")
@dataclass(frozen=True, slots=True)
class Prune:
    """Iterative magnitude pruning over all tensors together.

    Attributes:
        rounds: of training; between two of them `share` of the entries left is taken away.
        share: per round.
        late: rewind to the values after this many steps instead of to the start (Frankle et al. 2020, arXiv 1912.05671).
    """

    rounds: int = 4
    share: float = 0.2
    late: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or not 0.0 < self.share < 1.0 or self.late < 0:
            raise SpecError(f"pruning needs at least 2 rounds, a share between 0 and 1 and late >= 0, found {self}")

    def ends(self, total: int) -> list[int]:
        """Steps after which entries are taken away.

        Raises:
            SpecError: the training is too short for the rounds, or its first round for the step to rewind to.
        """
        first = total // self.rounds
        if first <= self.late:
            raise SpecError(f"{self.rounds} rounds in {total} steps have {first} steps each, and pruning rewinds to step {self.late}; train longer or in fewer rounds")
        return [total * r // self.rounds for r in range(1, self.rounds)]

    def settled(self, total: int) -> int:
        """The step after which the entries stay."""
        return self.ends(total)[-1]

    def stages(self, total: int) -> list[Stage]:
        """Every round is trained like the first, from the step it is rewound to."""
        return [Stage(end, skip=self.late) for end in self.ends(total)]

    @torch.no_grad()
    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States) -> None:
        forms = {name: form for name, form in parts.items() if isinstance(form, TicketForm)}
        if self.late and step == self.late:
            memory.update({name: form.value.detach().clone() for name, form in forms.items()})
        if step not in self.ends(total):
            return
        left = sum(int(form.mask.sum()) for form in forms.values())
        scores = {}
        for name, form in forms.items():
            assert isinstance(form.start, Tensor), "a step comes after a forward pass"
            size = (form.start.to(form.value) + form.value).abs()
            scores[name] = torch.where(form.mask, size, -1.0).flatten().cpu()
        for name, index in best(scores, left - int(self.share * left)).items():
            form = forms[name]
            mask = torch.zeros(form.mask.numel(), dtype=torch.bool)
            mask[index] = True
            form.thin(mask.view(form.mask.shape).to(form.mask.device), memory.get(name))
            clear(states, [form.value])
