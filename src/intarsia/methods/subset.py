"""Methods that train a part of the base's own weights: by rules on gradients, or a chosen part of each tensor."""

from __future__ import annotations

from dataclasses import replace

from intarsia.methods.gradients import ChildGradients
from intarsia.methods.method import Method, row
from intarsia.methods.rows import full


@row("child_tuning_f", equation="g <- g * m / p, m ~ Bernoulli(p) at every step", source="Xu et al. 2021, arXiv 2109.05687")
def child_tuning_f(keep: float = 0.3) -> Method:
    """Full fine-tuning in which each entry gets its gradient with probability `keep` at a step: a regulariser, not a saving."""
    method = full()
    return replace(method, name="child_tuning_f", policy=replace(method.policy, gradients=(ChildGradients(keep),)), source="")
