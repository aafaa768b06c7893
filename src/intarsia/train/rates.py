"""Learning rates and weight decay per group of parameters (main, head, and a method's own groups), and over time.

A head has its own rate.  Vectors (biases, gains, scales) never decay, nor do heads, whatever the recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intarsia.errors import TrainingError
from intarsia.host import Host
from intarsia.methods import Method
from intarsia.methods.method import Stage
from intarsia.patches import Biaffine, LanguageModelHead
from intarsia.train.recipe import Recipe

HEAD_RATE = 5e-3
"""Of a linear head on standardised features."""
PARSER_RATE = 2e-3
"""Of a biaffine head, as in its paper."""
LM_HEAD_RATE = 1e-3
"""Of a language-model head, which begins near the identity."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Learning rate and weight decay of one group."""

    learning_rate: float
    decay: float


def rates(method: Method, recipe: Recipe) -> dict[str, Rate]:
    """The resolved rates of a method's tags; `""` is the main group."""
    policy = method.policy
    main = recipe.learning_rate if recipe.learning_rate is not None else policy.learning_rate
    decay = recipe.weight_decay if recipe.weight_decay is not None else policy.decay
    found = {"": Rate(main, decay)}
    for group in policy.groups:
        found[group.tag] = Rate(main * group.rate, decay if group.decay is None else group.decay)
    default = {LanguageModelHead: LM_HEAD_RATE, Biaffine: PARSER_RATE}.get(type(method.head), HEAD_RATE)
    if recipe.head_learning_rate is not None:
        found["head"] = Rate(recipe.head_learning_rate, 0.0)
    else:
        found.setdefault("head", Rate(default, 0.0))
    return found


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and to chosen entries of one, not to biases, norms and other vectors."""
    site, _, leaf = name.partition("/")
    entries = leaf.endswith(".values") and site.endswith(".weight") and ".norm." not in f".{site}"
    return parameter.dim() > 1 or entries


def groups(tagged: Mapping[str, Mapping[str, nn.Parameter]], known: Mapping[str, Rate]) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; every parameter is in exactly one.

    Args:
        tagged: parameters by tag and name, see `Host.tagged`.
        known: rates by tag; a tag without its own has those of the main group.
    """
    taken: set[int] = set()
    found: list[dict[str, Any]] = []
    for tag, parameters in tagged.items():
        rate = known.get(tag, known[""])
        fresh = [(k, p) for k, p in parameters.items() if id(p) not in taken and not taken.add(id(p))]  # type: ignore[func-returns-value]
        for wanted in (True, False):
            chosen = [p for k, p in fresh if decays(k, p) == wanted]
            if chosen:
                weight_decay = rate.decay if wanted else 0.0
                found.append({"params": chosen, "lr": rate.learning_rate, "weight_decay": weight_decay, "tag": tag})
    return found


def optimiser_groups(host: Host, name: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups of a module on a host.

    Raises:
        TrainingError: it has nothing to train.
    """
    found = groups(host.tagged(name), rates(host.method(name), recipe))
    if not found:
        raise TrainingError(f"module {name!r} ({host.method(name).name}) has no parameters; give it a head or another method")
    return found


def factor(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the learning rate at a step, counted from 0: never zero, so that no step is wasted.

    Args:
        warmup: steps in which it rises to 1.
        total: steps of the run.
        schedule: `linear` and `cosine` fall towards zero behind the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    gone = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "constant":
        return 1.0
    return 1.0 - gone if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))


def staged(step: int, stages: Sequence[Stage], warmup: float, total: int, schedule: str, scaled: bool = True) -> float:
    """Share of the learning rate at a step, counted from 0, where the schedule begins anew at every stage.

    Args:
        stages: by their beginnings; before the first one the run is a stage of its own.
        warmup: share of a stage's steps in which the rate rises to 1.
        scaled: whether a stage's own factor is for this group.
    """
    begun = [stage for stage in stages if stage.begin <= step]
    now = begun[-1] if begun else Stage(0)
    end = stages[len(begun)].begin if len(begun) < len(stages) else total
    length = max(end - now.begin + now.skip, 1)
    rise = min(round(warmup * length), length - 1)
    return (now.rate if scaled else 1.0) * factor(step - now.begin + now.skip, rise, length, schedule)
