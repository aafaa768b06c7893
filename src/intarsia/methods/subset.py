"""Methods that train a part of the base's own weights: by rules on gradients, or chosen entries of each tensor."""

from __future__ import annotations

from dataclasses import replace

from intarsia.methods.gradients import ChildGradients
from intarsia.methods.method import Group, Method, Patch, Policy, row
from intarsia.methods.program import Distance, Explore, Probe, WarmUp
from intarsia.methods.rows import full
from intarsia.patches import Add, Affine, LowRank, Matrix, Sparse

ATTENTION = "{attn,xattn}.{q,v}.weight"
LINEARS = "{attn,xattn}.{q,k,v,o}.weight, ffn.{gate,up,down}.weight"
PROJECTIONS = "{attn,xattn}.{q,k,v,o}, ffn.{gate,up,down}"
"""The same as outputs, for what computes beside them."""


def entries(name: str, factor: Sparse, at: str, policy: Policy, layers: str | None = None) -> Method:
    """A sparse difference of the parameters at some sites."""
    return Method(name, (Patch("delta", at, Matrix(factor), port="weight", layers=layers),), policy)


@row("child_tuning_f", equation="g <- g * m / p, m ~ Bernoulli(p) at every step", source="Xu et al. 2021, arXiv 2109.05687")
def child_tuning_f(keep: float = 0.3) -> Method:
    """Full fine-tuning in which each entry gets its gradient with probability `keep` at a step: a regulariser, not a saving."""
    method = full()
    return replace(method, name="child_tuning_f", policy=replace(method.policy, gradients=(ChildGradients(keep),)), source="")


@row("child_tuning_d", equation="W' = W + D on the entries with the largest Fisher information of batches", source="Xu et al. 2021, arXiv 2109.05687")
def child_tuning_d(density: float = 0.3, rows: int = 1024, batch_size: int = 16, at: str = LINEARS) -> Method:
    """The share of the linear layers' entries that batches of the task move most; the others stay, decay and momentum included."""
    policy = Policy(learning_rate=5e-5, program=(Probe(rows, "batch", batch_size),))
    return entries("child_tuning_d", Sparse(density), at, policy)


@row("fish", equation="W' = W + D on the k entries with the largest empirical Fisher information", source="Sung, Nair & Raffel 2021, arXiv 2111.09839")
def fish(density: float = 0.005, rows: int = 1024, at: str = "**") -> Method:
    """A fixed sparse mask: the entries whose squared gradients, example by example, are largest; a head counts among the k."""
    return entries("fish", Sparse(density), at, Policy(learning_rate=2e-4, program=(Probe(rows, "example", head_counts=True),)))


@row("lt_sft", equation="W' = W + D on the k entries that a full fine-tuning moves farthest, from the start again", source="Ansell et al. 2022, arXiv 2110.07560")
def lt_sft(density: float = 0.08, share: float = 0.5, l1: float = 0.0, at: str = LINEARS) -> Method:
    """Lottery-ticket sparse fine-tuning: explore all weights, keep the places, rewind, train these alone; the changes add up."""
    penalties = (Distance(l1),) if l1 else ()
    policy = Policy(learning_rate=1e-4, program=(Explore(share),), penalties=penalties)
    return entries("lt_sft", Sparse(density), at, policy)


@row("shira", equation="W' = W + D on r (m + n) random entries", source="Bhardwaj et al. 2024, arXiv 2406.13175")
def shira(rank: int = 8, seed: int = 0, at: str = ATTENTION, layers: str | None = None) -> Method:
    """As many random entries of each matrix as LoRA of this rank has parameters."""
    return entries("shira", Sparse(rank=rank, seed=seed), at, Policy(learning_rate=1e-3), layers)


@row("rosa", equation="W' = W + (alpha / r) B A + D, D sparse where squared gradients are largest", source="Nikdan et al. 2024, arXiv 2401.04679")
def rosa(rank: int = 16, alpha: float = 16.0, density: float = 0.018, rows: int = 32, warmup: int = 64) -> Method:
    """A low-rank and a sparse change of all projections side by side, each with its learning rate.

    As released: the low-rank part is trained alone for `warmup` steps (at most a quarter of the run's), the gradient of `rows`
    examples beside it chooses the entries, and both parts start anew.  `warmup=0` looks at the untouched model.
    """
    lora = Patch("lora", PROJECTIONS, Affine(LowRank(rank)), Add(alpha / rank), tag="low_rank")
    sparse = Patch("delta", LINEARS, Matrix(Sparse(density, scope="site")), port="weight")
    probe = Probe(rows, "batch", rows)
    program = (WarmUp(warmup), probe) if warmup else (probe,)
    return Method("rosa", (lora, sparse), Policy(learning_rate=2e-4, groups=(Group("low_rank", 3.5),), program=program))
