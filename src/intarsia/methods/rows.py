"""The methods of the foundation, one row each; `union` combines them.

Sources are given per row; where paper and released code differ the docstring says which is followed.
"""

from __future__ import annotations

from intarsia.methods.insertion import Insertion
from intarsia.methods.method import Method, Patch, Policy, row
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Bottleneck,
    Concat,
    Const,
    LowRank,
    Matrix,
    Mul,
    Tokens,
)

#: every layer norm of a model: `*` covers the norms of sub-layers as well as of embeddings and the last one
NORMS = "**.norm.{weight,bias}"


def norm_patch() -> Patch:
    """Train all layer norms along, as many adapter papers do."""
    return Patch("norm", NORMS, Matrix(), port="weight", tag="norm")


@row("full", equation="W' = W + D, D dense, for every parameter", source="Devlin et al. 2019, arXiv 1810.04805")
def full() -> Method:
    """Every parameter of the model, as a dense difference."""
    return Method("full", (Patch("delta", "**", Matrix(), port="weight"),), Policy(learning_rate=5e-5, decay=0.01))


@row("head", equation="only new outputs on the frozen features", source="linear probe")
def head() -> Method:
    """Nothing but the task's head on frozen features."""
    return Method("head", (), Policy(learning_rate=5e-3))


@row("freeze_k", equation="W' = W + D in the last k blocks", source="Lee, Tang & Lin 2019, arXiv 1911.03090")
def freeze_k(k: int = 3) -> Method:
    """Full fine-tuning of the last k blocks of each stack."""
    return Method(
        "freeze_k",
        (Patch("delta", "**", Matrix(), port="weight", layers=f"-{k}:"),),
        Policy(learning_rate=5e-5, decay=0.01),
    )


@row("ln", equation="gamma' = gamma + d, beta' = beta + e", source="Qi et al. 2022; Houlsby et al. 2019, section 3.4")
def ln() -> Method:
    """Gain and bias of every layer norm."""
    return Method("ln", (norm_patch(),), Policy(learning_rate=1e-3))


#: where BitFit makes biases for models without
CREATED = "{attn,xattn}.{q,k,v,o}, ffn.{gate,up,down}"


@row("bitfit", equation="b' = b + d for every bias vector", source="Ben-Zaken et al. 2022, arXiv 2106.10199")
def bitfit(at: str = "**.bias", create: bool = False) -> Method:
    """Every bias vector of the model; with `create`, a new one at every linear layer, or at the outputs `at` (for models without biases)."""
    if create:
        patch = Patch("shift", CREATED if at == "**.bias" else at, Const(), Add())
    else:
        patch = Patch("shift", at, Matrix(), port="weight")
    return Method("bitfit", (patch,), Policy(learning_rate=1e-3))


@row("lora", equation="y' = W x + (alpha / r) B A x", source="Hu et al. 2021, arXiv 2106.09685")
def lora(
    rank: int = 8, alpha: float = 16.0, at: str = "{attn,xattn}.{q,v}", dropout: float = 0.0, layers: str | None = None
) -> Method:
    """Low-rank change of linear layers (initialised as the released code: A kaiming-uniform, B zero)."""
    patch = Patch("lora", at, Affine(LowRank(rank), dropout), Add(alpha / rank), layers=layers)
    return Method("lora", (patch,), Policy(learning_rate=5e-4))


@row("ia3", equation="k' = l_k * k, v' = l_v * v, W_2 (l_ff * act)", source="Liu et al. 2022, arXiv 2205.05638")
def ia3(layers: str | None = None) -> Method:
    """Rescaling of keys, values and the feed-forward activation."""
    return Method(
        "ia3",
        (
            Patch("scale", "{attn,xattn}.{k,v}", Const("ones"), Mul(), layers=layers),
            Patch("scale_ffn", "ffn.act", Const("ones"), Mul(), port="in", layers=layers),
        ),
        Policy(learning_rate=3e-3),
    )


@row("houlsby", equation="h' = h + U gelu(D h + b) + c after attention and FFN", source="Houlsby et al. 2019, arXiv 1902.00751")
def houlsby(
    width: int | None = 64,
    reduction: float = 16.0,
    activation: str = "gelu",
    norms: bool = True,
    init: str = "houlsby",
    layers: str | None = None,
    insertion: str = "sequential",
    at: str = "attn, ffn",
    scale: float = 1.0,
    learn_scale: bool = False,
    norm: str = "none",
    residual: str = "self",
    dropout: float = 0.0,
) -> Method:
    """Two serial adapters per layer; layer norms are trained along (`norms`), as in the paper (initial std 1e-2)."""
    form = Bottleneck(width, reduction, activation, "self", init=init, dropout=dropout)
    patches = Insertion(insertion, at, scale, learn_scale, norm, residual, layers).patches(form)
    return Method("houlsby", (*patches, norm_patch()) if norms else patches, Policy(learning_rate=3e-4))


@row("pfeiffer", equation="h' = h + U relu(D LN(h + x) + b) + c after the FFN", source="Pfeiffer et al. 2020, arXiv 2005.00052")
def pfeiffer(
    reduction: float = 16.0,
    width: int | None = None,
    activation: str = "relu",
    init: str = "bert",
    layers: str | None = None,
    insertion: str = "sequential",
    at: str = "ffn",
    scale: float = 1.0,
    learn_scale: bool = False,
    norm: str = "none",
    residual: str = "self",
    dropout: float = 0.0,
) -> Method:
    """One adapter per layer that reads the FFN's add-and-norm and writes before it."""
    form = Bottleneck(width, reduction, activation, "normed", init=init, dropout=dropout)
    patches = Insertion(insertion, at, scale, learn_scale, norm, residual, layers).patches(form)
    return Method("pfeiffer", patches, Policy(learning_rate=5e-4))


@row("parallel", equation="h' = h + s (U relu(D x + b) + c) beside the FFN", source="He et al. 2021, arXiv 2110.04366")
def parallel(
    reduction: float = 2.0,
    width: int | None = None,
    scale: float = 4.0,
    at: str = "ffn",
    activation: str = "relu",
    layers: str | None = None,
    insertion: str = "parallel",
    learn_scale: bool = False,
    norm: str = "none",
    residual: str = "self",
    dropout: float = 0.0,
) -> Method:
    """Scaled parallel adapter: reads what the sub-layer reads, adds to what it writes."""
    form = Bottleneck(width, reduction, activation, "self", init="kaiming", zero_up=True, dropout=dropout)
    patches = Insertion(insertion, at, scale, learn_scale, norm, residual, layers).patches(form)
    return Method("parallel", patches, Policy(learning_rate=5e-4))


@row("prompt", equation="[P; E(x)]", source="Lester et al. 2021, arXiv 2104.08691")
def prompt(
    length: int = 20,
    init: str = "vocabulary",
    where: str = "auto",
    ids: tuple[int, ...] = (),
    groups: tuple[tuple[int, ...], ...] = (),
) -> Method:
    """Trained embeddings in the token sequence (of the encoder, in models with two stacks).

    They start from drawn rows of the vocabulary, from the pieces of a text (`init="ids"`), or from the labels
    (`init="groups"`: one group of token ids per label, whose rows are averaged).
    """
    form = Tokens(length, where, init, ids=ids, groups=tuple(map(tuple, groups)))  # type: ignore[arg-type]
    return Method("prompt", (Patch("prompt", "seq", form, Concat(), port="seq"),), Policy(learning_rate=1e-2))


@row("prefix", equation="Attn(q, [P_k; K], [P_v; V]) in every layer", source="Li & Liang 2021, arXiv 2101.00190")
def prefix(
    length: int = 30,
    reparameterise: int | None = 512,
    dropout: float = 0.0,
    layers: str | None = None,
    init: str = "unit",
    ids: tuple[int, ...] = (),
    mix: str = "shared",
    relative: bool = False,
) -> Method:
    """Trained keys and values for every attention; the generating network is flattened after training.

    `init="activations"` with the token ids of a text starts from the base's own keys and values of that text;
    `mix="zero_gate"` gives the prefix a softmax of its own, gated from zero (a fresh module is the base).  In T5 prefix
    columns have a relative position bias of 0; with `relative` they have that of standing right in front of the text.
    """
    form = Attend(length, reparameterise, dropout, init, mix, ids, relative=relative)  # type: ignore[arg-type]
    patch = Patch("prefix", "{attn,xattn}.mem", form, Concat(), port="mem", layers=layers)
    rate = 1e-3 if reparameterise else 5e-3
    return Method("prefix", (patch,), Policy(learning_rate=rate, flatten=True))


__all__ = ["bitfit", "freeze_k", "full", "head", "houlsby", "ia3", "ln", "lora", "norm_patch", "parallel", "pfeiffer", "prefix", "prompt"]
