"""Methods that choose entries of the base's weights while they train: masks, gates, pruning, regrowing; and whole columns."""

from __future__ import annotations

from dataclasses import replace

from intarsia.errors import SpecError
from intarsia.methods.method import Group, Method, Patch, Policy, StepRule, row
from intarsia.methods.regrow import Regrow, RegrowByMomenta
from intarsia.methods.subset import LINEARS, entries
from intarsia.methods.thinning import L0, Project, Prune
from intarsia.patches import Columns, HardConcrete, Matrix, Mul, Rot, Sparse, Ticket, TopMask

OUTPUTS = "{attn,xattn}.o.weight, ffn.down.weight"
INPUTS = "{attn,xattn}.v.weight, ffn.{gate,up}.weight"


@row("s2ft", equation="W' = W + D in the columns of o and down that belong to some heads and channels", source="Yang et al. 2024, arXiv 2412.06289")
def s2ft(
    share: float = 0.02, heads: bool = True, block: int = 1, inputs: bool = False, seed: int = 0, at: str = OUTPUTS, layers: str | None = None
) -> Method:
    """Whole attention heads and feed-forward channels, chosen at random: their columns of the output projections.

    With `inputs` their rows of v, gate and up are trained too.  `heads=False` chooses single columns of o (or `block`s) instead.
    """
    columns = Columns(share, block, seed, heads, coupled=inputs)
    patches = [Patch("delta", at, Matrix(columns), port="weight", layers=layers)]
    if inputs:
        patches.append(Patch("rows", INPUTS, Matrix(replace(columns, rows=True)), port="weight", layers=layers))
    return Method("s2ft", tuple(patches), Policy(learning_rate=2e-4))


@row("supermask", equation="W' = W * 1[abs(S) among the largest], the gradient straight through to S", source="Ramanujan et al. 2020, arXiv 1911.13299; Zhao et al. 2020, arXiv 2004.12406")
def supermask(keep: float = 0.95, at: str = LINEARS, layers: str | None = None) -> Method:
    """Nothing is changed but which weights count; the finished module is one bit a weight."""
    patch = Patch("mask", at, Matrix(TopMask(keep)), Mul(), port="weight", layers=layers)
    return Method("supermask", (patch,), Policy(learning_rate=1e-3, flatten=True))


@row("diff_pruning", equation="W' = W + z * w, z hard-concrete gates; then w alone on the k largest", source="Guo, Rush & Kim 2021, arXiv 2012.07463")
def diff_pruning(
    density: float = 0.005, l0: float = 1.25e-7, structured: bool = True, official: bool = False, share: float = 0.5, at: str = "**"
) -> Method:
    """Gates under an L0 penalty choose the entries in the first `share` of the steps; the others train these alone."""
    patch = Patch("delta", at, Matrix(HardConcrete(structured=structured)), port="weight")
    policy = Policy(
        learning_rate=1e-5, groups=(Group(":gate", 1e4),), flatten=True, penalties=(L0(l0, official),), steps=(Project(density, share),)
    )
    return Method("diff_pruning", (patch,), policy)


@row("lottery", equation="W' = m * (W + D), m thinned in rounds by abs(W + D), D back to the start", source="Frankle & Carbin 2019, arXiv 1803.03635")
def lottery(rounds: int = 4, share: float = 0.2, late: int = 0, at: str = LINEARS) -> Method:
    """Iterative magnitude pruning of the base with rewinding; the learning-rate schedule begins anew in every round."""
    patch = Patch("ticket", at, Ticket(), Rot(), port="weight")
    return Method("lottery", (patch,), Policy(learning_rate=5e-5, steps=(Prune(rounds, share, late),)))


@row("spiel", equation="W' = W + D on k entries, of which some are dropped and others grown every few steps", source="Ansell et al. 2024, arXiv 2401.16405")
def spiel(
    density: float = 0.005, every: int = 20, window: int = 5, rate: float = 0.2, by: str = "gradients", seed: int = 0, at: str = LINEARS
) -> Method:
    """Sparse fine-tuning whose entries move: the smallest go, those with large gradients come.

    These are accumulated over a `window` (`by="gradients"`, SpIEL-AG), or estimated from those of the entries in the same row
    and column (`by="momenta"`, SpIEL-MA), which takes no gradient of a whole matrix.
    """
    if by not in ("gradients", "momenta"):
        raise SpecError(f"spiel grows by gradients or by momenta, found by={by!r}")
    rule: StepRule = Regrow(every, window, rate) if by == "gradients" else RegrowByMomenta(every, rate)
    return entries("spiel", Sparse(density, seed=seed), at, Policy(learning_rate=1e-4, steps=(rule,)))
