"""Networks beside the frozen one."""

from __future__ import annotations

from intarsia.methods.method import Method, Patch, Policy, row
from intarsia.patches import Ladder, Set


@row("lst", equation="head input = U LN(s), s_i = block_i(m_i s + (1 - m_i) D_i h_i)", source="Sung, Cho & Bansal 2022, arXiv 2206.06522")
def lst(
    reduction: int = 8,
    head_size: int = 8,
    expansion: float = 4.0,
    skip_every: int = 4,
    temperature: float = 0.1,
    dropout: float = 0.0,
) -> Method:
    """Ladder side-tuning: a narrow transformer fed by all blocks of the base gives the input of its head.

    No gradient enters the base, which therefore keeps no activations.
    """
    form = Ladder(reduction, head_size, expansion, skip_every, temperature, dropout=dropout)
    return Method("lst", (Patch("side", "head.in", form, Set()),), Policy(learning_rate=3e-3))


__all__ = ["lst"]
