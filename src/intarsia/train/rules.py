"""What a method's policy does while its module is trained: penalties, rules on gradients and between steps, layers left out.

The trainer calls `Rules` at its points of a step; the rules themselves are data (`intarsia.methods.Policy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intarsia.host import Host
from intarsia.methods import dropped_layers
from intarsia.methods.method import Stage
from intarsia.patches import Form


class Rules:
    """The policy of one module in training.

    Args:
        seed: of the recipe; everything that is drawn follows from it and the step, so that a resumed run draws the same.
        total: optimiser steps of the training.
    """

    def __init__(self, host: Host, name: str, seed: int, total: int) -> None:
        self.host = host
        self.name = name
        self.seed = seed
        self.total = total
        self.policy = host.method(name).policy
        self.memory: list[dict[str, Tensor]] = [{} for _ in self.policy.steps]
        self._due = False

    def begin_step(self, step: int) -> None:
        """A new optimiser step: its penalty is due with the first piece, and rules that watch it are told."""
        self._due = True
        for rule, memory in zip(self.policy.steps, self.memory):
            begin = getattr(rule, "begin", None)
            if begin is not None:
                begin(step, self.host.forms(self.name), memory)

    @property
    def settled(self) -> int:
        """The first step whose tensors have the form that the policy ends with."""
        return max((rule.settled(self.total) for rule in self.policy.steps if hasattr(rule, "settled")), default=0)

    @property
    def stages(self) -> list[Stage]:
        """Where the learning-rate schedule begins anew, in order."""
        found = [stage for rule in self.policy.steps if hasattr(rule, "stages") for stage in rule.stages(self.total)]
        return sorted(found, key=lambda stage: stage.begin)

    @property
    def due(self) -> bool:
        """Whether this step's penalty is still to come."""
        return self._due

    def penalty(self) -> Tensor | None:
        """The terms that the method adds to the loss, [], once per step on every process: gradients are averaged over these."""
        if not self._due:
            return None
        self._due = False
        return self.host.penalty(self.name)

    def context(self, step: int) -> Mapping[str, Any]:
        """What a step (counted from 1) adds to the call's context."""
        return dropped_layers(self.policy, self.seed, step)

    def before_step(self, step: int) -> None:
        """Change gradients before the optimiser and its moments see them."""
        for rule in self.policy.gradients:
            rule.before_step(step, self.seed, self._parameters())

    def after_step(self, step: int, optimiser: Any) -> None:
        """Change tensors after the optimiser, before gradients are cleared."""
        forms: Mapping[str, Form] = self.host.forms(self.name) if self.policy.steps else {}
        for rule, memory in zip(self.policy.steps, self.memory):
            rule.after_step(step, self.total, forms, memory, optimiser.state)

    def _parameters(self) -> Mapping[str, Any]:
        return self.host.parameters(self.name)

    def state(self) -> dict[str, Tensor]:
        """What the rules remember, for a checkpoint."""
        return {f"{number}/{key}": value for number, memory in enumerate(self.memory) for key, value in memory.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint remembers."""
        for memory in self.memory:
            memory.clear()
        for key, value in state.items():
            number, _, name = key.partition("/")
            self.memory[int(number)][name] = value
