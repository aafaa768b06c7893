"""LoRA and its relatives: products of small matrices, alone, multiplied with each other or with the weight, in blocks.

What is not here: frozen bases with a trained core (`subspace.py`), rotations (`orthogonal.py`).
"""

from __future__ import annotations

import math
import re

from intarsia.methods.budget import Orthonormal, RankBudget
from intarsia.methods.method import Group, Method, Patch, Policy, row
from intarsia.patches import (
    Add,
    Affine,
    Blocks,
    Core,
    Diag,
    Free,
    Gain,
    Hadamard,
    KronPair,
    LowRank,
    Matrix,
    Principal,
    Renorm,
    Sketch,
)

ATTENTION = "{attn,xattn}.{q,v}"
LINEARS = "{attn,xattn}.{q,k,v,o}, ffn.{gate,up,down}"


def weights(at: str) -> str:
    """The weights of the layers that a pattern covers."""
    several = "," in re.sub(r"\{[^{}]*\}", "", at)
    return f"{{{at}}}.weight" if several else f"{at}.weight"


@row("rslora", equation="y' = W x + (alpha / sqrt(r)) B A x", source="Kalajdzievski 2023, arXiv 2312.03732")
def rslora(
    rank: int = 64, alpha: float = 16.0, at: str = ATTENTION, dropout: float = 0.0, layers: str | None = None
) -> Method:
    """LoRA scaled by the root of its rank, so that high ranks learn."""
    patch = Patch("lora", at, Affine(LowRank(rank), dropout), Add(alpha / math.sqrt(rank)), layers=layers)
    return Method("rslora", (patch,), Policy(learning_rate=2e-4))


@row("lora_plus", equation="as LoRA, with rate(B) = ratio * rate(A)", source="Hayou, Ghosh & Yu 2024, arXiv 2402.12354")
def lora_plus(
    rank: int = 8,
    alpha: float = 16.0,
    ratio: float = 16.0,
    at: str = ATTENTION,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """LoRA whose out-factor learns faster than its in-factor."""
    patch = Patch("lora", at, Affine(LowRank(rank), dropout), Add(alpha / rank), layers=layers)
    return Method("lora_plus", (patch,), Policy(learning_rate=2e-4, groups=(Group(":out", ratio),)))


@row("lora_fa", equation="y' = W x + (alpha / r) B A x, A frozen", source="Zhang et al. 2023, arXiv 2308.03303")
def lora_fa(
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    at: str = ATTENTION,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """LoRA with a frozen random in-factor that is drawn from a seed and not stored."""
    patch = Patch("lora", at, Affine(Sketch(rank, seed), dropout), Add(alpha / rank), layers=layers)
    return Method("lora_fa", (patch,), Policy(learning_rate=1e-3))


@row("miss", equation="y' = W x + B [I I ... I] x", source="Kang & Yin 2024, arXiv 2409.15371")
def miss(rank: int = 64, at: str = ATTENTION, dropout: float = 0.0, layers: str | None = None) -> Method:
    """One trained matrix shared by all slices of the input: LoRA-FA with tiled identities for A."""
    patch = Patch("shards", at, Affine(Sketch(rank, draw="tiled"), dropout), layers=layers)
    return Method("miss", (patch,), Policy(learning_rate=1e-3))


@row("dora", equation="W' = m * (W + s B A) / ||W + s B A|| by rows", source="Liu et al. 2024, arXiv 2402.09353")
def dora(
    rank: int = 16,
    alpha: float | None = None,
    at: str = ATTENTION,
    dropout: float = 0.0,
    detach: bool = True,
    layers: str | None = None,
) -> Method:
    """Direction by LoRA (alpha = 2 r), length by a trained vector; the norm is a constant for the gradient (`detach`)."""
    scale = (2.0 * rank if alpha is None else alpha) / rank
    patch = Patch("dora", at, Renorm(LowRank(rank), scale, dropout, detach), layers=layers)
    return Method("dora", (patch,), Policy(learning_rate=2e-4))


@row("pissa", equation="W' = W + s (B A - B0 A0), B0 A0 from the SVD of W", source="Meng et al. 2024, arXiv 2404.02948")
def pissa(
    rank: int = 16,
    alpha: float | None = None,
    start: str = "major",
    at: str = LINEARS,
    layers: str | None = None,
) -> Method:
    """LoRA that starts as the main part of the weight (alpha = r); kept as a product of rank 2 r on the untouched base.

    With `start="minor"` it is MiLoRA, with `"qr"` OLoRA.
    """
    scale = (rank if alpha is None else alpha) / rank
    factor = Principal(rank, start, scale)  # type: ignore[arg-type]
    patch = Patch("lora", at, Affine(factor), Add(scale), layers=layers)
    return Method("pissa", (patch,), Policy(learning_rate=1e-4, flatten=True))


@row("adalora", equation="W' = W + (alpha / r) P diag(lambda) Q, rank by importance", source="Zhang et al. 2023, arXiv 2303.10512")
def adalora(
    rank: int = 12,
    target: int = 8,
    alpha: float = 16.0,
    orthogonality: float = 0.1,
    warmup: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    at: str = LINEARS,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """Singular-value form whose rank is cut, during training, where it matters least."""
    form = Affine(Core(rank, Free(), Diag()), dropout)
    patch = Patch("lora", at, form, Add(alpha / (rank + 1e-5)), layers=layers)
    rules = RankBudget(target, warmup, final, every)
    policy = Policy(learning_rate=1e-3, penalties=(Orthonormal(orthogonality),), steps=(rules,))
    return Method("adalora", (patch,), policy)


@row("hira", equation="W' = W * (1 + B A) entry by entry", source="Huang et al. 2025, ICLR, openreview TwJrTz9cRS")
def hira(rank: int = 32, at: str = ATTENTION, layers: str | None = None) -> Method:
    """A low-rank product multiplied into the weight: a change of full rank."""
    patch = Patch("hira", weights(at), Matrix(LowRank(rank)), Gain(), port="weight", layers=layers)
    return Method("hira", (patch,), Policy(learning_rate=1e-3))


@row("loha", equation="W' = W + (alpha / r) (B A) * (D C) entry by entry", source="Hyeon-Woo et al. 2022, arXiv 2108.06098")
def loha(rank: int = 8, alpha: float = 16.0, at: str = ATTENTION, layers: str | None = None) -> Method:
    """The entrywise product of two low-rank products: rank up to r^2."""
    factor = Hadamard((LowRank(rank, "unit"), LowRank(rank, "unit")), ("loha", "zeros"))
    patch = Patch("loha", weights(at), Matrix(factor), Add(alpha / rank), port="weight", layers=layers)
    return Method("loha", (patch,), Policy(learning_rate=5e-4))


@row("lokr", equation="W' = W + (alpha / r) A (x) (C D)", source="Yeh et al. 2023, arXiv 2309.14859; KronA, arXiv 2212.10650")
def lokr(
    rank: int | None = 8,
    alpha: float = 16.0,
    limit: int | None = None,
    at: str = ATTENTION,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """A Kronecker product of two small matrices, the larger one of low rank (`rank=None`: full)."""
    form = Affine(KronPair(rank, limit), dropout)
    patch = Patch("lokr", at, form, Add(1.0 if rank is None else alpha / rank), layers=layers)
    return Method("lokr", (patch,), Policy(learning_rate=1e-3))


@row("gralora", equation="W' = W + (alpha / r) [B_ij A_ij] over a k x k grid", source="Jung et al. 2025, arXiv 2505.20355")
def gralora(
    rank: int = 32,
    grid: int = 2,
    alpha: float = 64.0,
    at: str = ATTENTION,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """LoRA in k x k blocks of rank r / k each: as many parameters, up to k times the rank."""
    form = Affine(Blocks(grid, grid, LowRank(max(1, rank // grid))), dropout)
    return Method("gralora", (Patch("lora", at, form, Add(alpha / rank), layers=layers),), Policy(learning_rate=2e-4))
