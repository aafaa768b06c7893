"""`Recipe`: every hyper-parameter of a training, as a value that is validated, stored and compared on resuming.

What a paper prescribes for a method (its learning rate, its weight decay) is the method's `Policy`; a recipe overrides it
only where a field is set.  What is not here: where data and results lie (`config.py`), and the loop (`loop.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from intarsia._codec import register
from intarsia.errors import UsageError

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Optimiser = Literal["adamw", "sgd"]
Trunk = Literal["fp32", "bf16", "int8", "off"]


@register("recipe")
@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters of a training.

    Attributes:
        learning_rate: of the method's main group; None for the method's own (`Policy.learning_rate`).
        head_learning_rate: of a new head; None for 5e-3 (language-model head: 1e-3).  A head at the modules' small rate
            stays a constant predictor on bases whose features share a large common component.
        weight_decay: of the main group's matrices; None for the method's own.  Vectors and heads never decay.
        epochs: passes over the training data; a fraction is allowed.
        max_steps: number of optimiser steps; if set, `epochs` does not count.
        batch_size: examples of one optimiser step, over all processes and pieces.
        accumulation: pieces in which each process computes its share of a step, one after the other.  It saves memory
            and changes neither the loss nor the update.
        warmup: share of the steps in which the learning rate rises from zero.
        schedule: how the learning rate falls afterwards.
        optimiser: `adamw` (betas 0.9, 0.999) or plain `sgd`.
        clip: largest norm of the gradient; None for no clipping.
        seed: of the order of the examples and of dropout.  Initial values have their own seed (`Host.add`).
        eval_every: steps between evaluations on the dev set; None for once per epoch.
        eval_batch_size: examples of one forward pass in evaluation.
        patience: stop after so many evaluations without a better dev metric; None never stops early.
        select_best: give back the tensors of the best evaluation, not the last ones.
        save_every: steps between checkpoints; None for one with each evaluation (without dev data: per epoch).
        keep: number of checkpoints to keep.
        log_every: steps between lines of the log.
        precision: `bf16` computes the forward pass in bfloat16; tensors stay in float32.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        base_dropout: dropout inside the frozen base while training, as it was pretrained; False runs the base as in
            evaluation.
        group_by_length: batches of examples of similar length (less padding); the grouping is shuffled per epoch.
        trunk: how the states below the first trained block are kept, where they can be computed once per example instead of
            once per epoch (`train/trunk.py`): `fp32` (exact), `bf16`, `int8`, or `off`.
        calibration_rows: examples on which a new head measures centre and scale of its features.
        max_length: tokens per example; None leaves it to the task.
    """

    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float | None = None
    epochs: float = 5.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.06
    schedule: Schedule = "linear"
    optimiser: Optimiser = "adamw"
    clip: float | None = 1.0
    seed: int = 0
    eval_every: int | None = None
    eval_batch_size: int = 64
    patience: int | None = None
    select_best: bool = True
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    base_dropout: bool = True
    group_by_length: bool = True
    trunk: Trunk = "fp32"
    calibration_rows: int = 512
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation", "eval_every", "eval_batch_size", "patience", "save_every",
                     "keep", "log_every", "calibration_rows", "max_length"):  # fmt: skip
            self._number(name, int, low=1)
        self._number("seed", int, low=0, high=2**63 - 1)
        for name in ("learning_rate", "head_learning_rate", "epochs", "clip"):
            self._number(name, float, above=0.0)
        self._number("weight_decay", float, low=0.0)
        self._number("warmup", float, low=0.0, below=1.0)
        self._choice("schedule", ("linear", "cosine", "constant"))
        self._choice("precision", ("fp32", "bf16"))
        self._choice("optimiser", ("adamw", "sgd"))
        self._choice("trunk", ("fp32", "bf16", "int8", "off"))
        for name in ("select_best", "gradient_checkpointing", "base_dropout", "group_by_length"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"recipe: {name} is true or false, found {getattr(self, name)!r}")
        if self.accumulation > self.batch_size:
            raise UsageError(
                f"recipe: accumulation={self.accumulation} cuts a step of batch_size={self.batch_size} examples into empty "
                "pieces; batch_size counts all examples of a step, so it is at least accumulation"
            )
        if self.gradient_checkpointing and not self.base_dropout:
            raise UsageError(
                "recipe: gradient_checkpointing needs base_dropout=true; layers recompute in training mode only"
            )

    def values(self) -> dict[str, Any]:
        """All values by name, defaults too."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _number(
        self,
        name: str,
        kind: type,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        if value is None and "None" in str(_HINTS[name]):
            return
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or not (low <= value <= high and above < value < below):
            bounds = [(low, "at least"), (high, "at most"), (above, "more than"), (below, "less than")]
            wanted = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))
            raise UsageError(f"recipe: {name} is {'a whole number' if kind is int else 'a number'}, {wanted}; found {value!r}")

    def _choice(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise UsageError(f"recipe: {name} is one of {', '.join(known)}; found {getattr(self, name)!r}")


_HINTS = {field.name: field.type for field in fields(Recipe)}
