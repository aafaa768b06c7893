"""The adapter family beyond Houlsby, Pfeiffer and parallel: where they are dropped, how their matrices are given, what
generates them, and edits of the residual stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from intarsia.errors import SpecError
from intarsia.methods.insertion import Insertion
from intarsia.methods.method import METHODS, Method, Patch, Policy, row
from intarsia.methods.rows import norm_patch
from intarsia.patches import Bottleneck, Coupling, FactorSpec, Hyper, Kron, LowRank, SubspaceEdit

HOULSBY = "attn, ffn"


def adapters(
    name: str,
    form: Bottleneck,
    policy: Policy,
    norms: bool = True,
    insertion: str = "sequential",
    at: str = HOULSBY,
    scale: float = 1.0,
    layers: str | None = None,
) -> Method:
    """A method of adapters, with all layer norms trained along."""
    patches = Insertion(insertion, at, scale, norm=form.norm, layers=layers).patches(form)
    return Method(name, (*patches, norm_patch()) if norms else patches, policy)


@row("mh_parallel", equation="head_i' = head_i + s relu(D x + b) U_i", source="He et al. 2021, arXiv 2110.04366")
def mh_parallel(
    width: int = 30,
    scale: float = 1.0,
    activation: str = "relu",
    at: str = "attn.heads",
    layers: str | None = None,
    learn_scale: bool = False,
    dropout: float = 0.0,
) -> Method:
    """Multi-head parallel adapter: reads what the attention reads, adds to what its heads give.

    The heads share D, and each has its own U_i of size width x d_head; side by side these are one matrix.
    """
    form = Bottleneck(width, activation=activation, init="kaiming", zero_up=True, dropout=dropout)
    patches = Insertion("parallel", at, scale, learn_scale, layers=layers).patches(form)
    return Method("mh_parallel", patches, Policy(learning_rate=5e-4))


@row("adapterdrop", equation="adapters in the layers above the lowest n", source="Rücklé et al. 2021, arXiv 2010.11918")
def adapterdrop(
    base: str = "pfeiffer", lowest: int = 5, robust: bool = False, reduction: float = 16.0, width: int | None = None
) -> Method:
    """Adapters without the lowest layers: fixed, or (`robust`) a new number of them at every training step.

    A robust module has adapters everywhere; each step leaves out the lowest n ~ U{0 ... lowest}, and afterwards a call may:
    `host.using("m", drop_layers=n)`.
    """
    if lowest < 0:
        raise SpecError(f"lowest counts layers, found {lowest}")
    settings: dict[str, object] = {"reduction": reduction, "width": width}
    if not robust:
        settings["layers"] = f"{lowest}:"
    method = METHODS[base].build(**settings)
    return Method("adapterdrop", method.patches, replace(method.policy, drop_layers=lowest if robust else 0))


@row("phm_adapter", equation="U = sum_i A_i (x) B_i, D likewise, A and B full", source="Mahabadi et al. 2021, arXiv 2106.04647")
def phm_adapter(
    width: int | None = 24,
    reduction: float = 32.0,
    n: int = 12,
    activation: str = "gelu_new",
    norms: bool = True,
    insertion: str = "sequential",
    at: str = HOULSBY,
    scale: float = 1.0,
    layers: str | None = None,
) -> Method:
    """Houlsby adapters whose matrices are sums of Kronecker products, each with factors of its own."""
    form = Bottleneck(width, reduction, activation, factor=Kron(n, rank=None, share=False), init="phm")
    return adapters("phm_adapter", form, Policy(learning_rate=3e-3), norms, insertion, at, scale, layers)


@row("compacter", equation="U = sum_i A_i (x) (s_i t_i^T), A shared by all", source="Mahabadi et al. 2021, arXiv 2106.04647")
def compacter(
    width: int | None = 24,
    reduction: float = 32.0,
    n: int = 4,
    rank: int = 1,
    norms: bool = True,
    insertion: str = "sequential",
    at: str = HOULSBY,
    scale: float = 1.0,
    layers: str | None = None,
) -> Method:
    """Houlsby adapters of Kronecker products with rank-1 factors; one A for all layers, sites and projections."""
    form = Bottleneck(width, reduction, "gelu_new", factor=Kron(n, rank, share=True), init="phm")
    return adapters("compacter", form, Policy(learning_rate=3e-3), norms, insertion, at, scale, layers)


@row("compacter_pp", equation="Compacter after the FFN only", source="Mahabadi et al. 2021, arXiv 2106.04647")
def compacter_pp(
    width: int | None = 24,
    reduction: float = 32.0,
    n: int = 4,
    rank: int = 1,
    norms: bool = True,
    insertion: str = "sequential",
    at: str = "ffn",
    scale: float = 1.0,
    layers: str | None = None,
) -> Method:
    """Compacter with one adapter per layer."""
    return replace(compacter(width, reduction, n, rank, norms, insertion, at, scale, layers), name="compacter_pp")


@row("adapter_lowrank", equation="D = a b^T, U = c e^T", source="baseline of Mahabadi et al. 2021, arXiv 2106.04647")
def adapter_lowrank(
    width: int | None = 24,
    reduction: float = 32.0,
    rank: int = 1,
    norms: bool = True,
    insertion: str = "sequential",
    at: str = HOULSBY,
    scale: float = 1.0,
    layers: str | None = None,
) -> Method:
    """Houlsby adapters whose matrices are low-rank: what Compacter is without Kronecker products."""
    form = Bottleneck(width, reduction, "gelu_new", factor=LowRank(rank, down_init="glorot"), init="glorot")
    return adapters("adapter_lowrank", form, Policy(learning_rate=3e-3), norms, insertion, at, scale, layers)


def _hyperformer(name: str, width: int, factor: FactorSpec, norms: bool, at: str, layers: str | None) -> Method:
    form = Bottleneck(width, activation="gelu_new", factor=factor, vectors=factor, init="zeros", norm="out")
    return adapters(name, form, Policy(learning_rate=3e-4, flatten=False), norms, at=at, layers=layers)


@row("hyperformer", equation="h' = h + LN_t(U_t gelu(D_t h)), all of it linear in z_t", source="Mahabadi et al. 2021, arXiv 2106.04489")
def hyperformer(
    tasks: tuple[str, ...] = ("task",),
    width: int = 24,
    embedding: int = 64,
    norms: bool = True,
    at: str = HOULSBY,
    layers: str | None = None,
) -> Method:
    """Adapters generated from an embedding of the task, by one network per layer and site.

    The call names the task, or one per row: `host.using("m", task=...)`; `extract(..., flatten=True, task=...)` gives the
    ordinary adapters of one task.
    """
    return _hyperformer("hyperformer", width, Hyper(tuple(tasks), width=embedding), norms, at, layers)


@row("hyperformer_pp", equation="as HyperFormer, linear in LN(MLP([z_t; layer; site]))", source="Mahabadi et al. 2021, arXiv 2106.04489")
def hyperformer_pp(
    tasks: tuple[str, ...] = ("task",),
    width: int = 24,
    embedding: int = 64,
    hidden: int = 128,
    norms: bool = True,
    at: str = HOULSBY,
    layers: str | None = None,
) -> Method:
    """Adapters generated from embeddings of task, layer and site, by one network per stack."""
    factor = Hyper(tuple(tasks), ("task", "layer", "site"), embedding, hidden)
    return _hyperformer("hyperformer_pp", width, factor, norms, at, layers)


@row("madx", equation="y = [x1 + F(x2); x2 + G(y1)] behind the embeddings, x again before the LM head; Pfeiffer adapters", source="Pfeiffer et al. 2020, arXiv 2005.00052")
def madx(
    reduction: float = 2.0,
    width: int | None = None,
    invertible: bool = True,
    invertible_reduction: float = 2.0,
    activation: str = "relu",
    insertion: str = "sequential",
    at: str = "ffn",
    stem: str = "stem",
    layers: str | None = None,
) -> Method:
    """Language adapter of MAD-X: Pfeiffer adapters, and an invertible one at the embeddings that is undone before the LM head."""
    patches = Insertion(insertion, at, layers=layers).patches(Bottleneck(width, reduction, activation, "normed"))
    coupling = Patch("invertible", stem, Coupling(invertible_reduction, activation), port="in")
    return Method("madx", (coupling, *patches) if invertible else patches, Policy(learning_rate=1e-4))


def _reft(name: str, form: SubspaceEdit, at: str, layers: str | None) -> Method:
    return Method(name, (Patch("edit", at, form, layers=layers),), Policy(learning_rate=9e-4))


@row("loreft", equation="h' = h + R^T (W h + b - R h), R R^T = I", source="Wu et al. 2024, arXiv 2404.03592")
def loreft(
    rank: int = 8,
    first: int = 7,
    last: int = 7,
    tied: bool = True,
    layers: str | None = None,
    dropout: float = 0.0,
    init: Literal["paper", "identity"] = "paper",
    at: str = "#",
) -> Method:
    """Edits of the residual stream in a low-rank subspace, at the first and last tokens of the prompt."""
    return _reft("loreft", SubspaceEdit(rank, first, last, tied=tied, dropout=dropout, init=init), at, layers)


@row("noreft", equation="h' = h + R^T (W h + b - R h), R free", source="Wu et al. 2024, arXiv 2404.03592")
def noreft(
    rank: int = 8,
    first: int = 7,
    last: int = 7,
    tied: bool = True,
    layers: str | None = None,
    dropout: float = 0.0,
    init: Literal["paper", "identity"] = "paper",
    at: str = "#",
) -> Method:
    """LoReFT without the constraint on the subspace."""
    form = SubspaceEdit(rank, first, last, tied=tied, orthonormal=False, dropout=dropout, init=init)
    return _reft("noreft", form, at, layers)


@row("direft", equation="h' = h + R^T (W h + b)", source="Wu et al. 2024, arXiv 2404.03592")
def direft(
    rank: int = 8,
    first: int = 7,
    last: int = 7,
    tied: bool = True,
    layers: str | None = None,
    dropout: float = 0.0,
    at: str = "#",
) -> Method:
    """ReFT as LoRA on the residual stream: neither constraint nor subtraction."""
    form = SubspaceEdit(rank, first, last, tied=tied, orthonormal=False, subtract=False, dropout=dropout)
    return _reft("direft", form, at, layers)


__all__ = [
    "adapter_lowrank",
    "adapterdrop",
    "compacter",
    "compacter_pp",
    "direft",
    "hyperformer",
    "hyperformer_pp",
    "loreft",
    "madx",
    "mh_parallel",
    "noreft",
    "phm_adapter",
]
