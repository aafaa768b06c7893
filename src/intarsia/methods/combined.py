"""Methods made of others: MAM, UniPELT, PERFECT."""

from __future__ import annotations

from intarsia.methods.method import Group, Method, Patch, Policy, row, union
from intarsia.methods.rows import houlsby, norm_patch, parallel, prefix
from intarsia.patches import Affine, Attend, Bottleneck, Concat, Gated, LowRank, MultiMaskLabels


@row("mam", equation="prefix tuning + scaled parallel adapter beside the FFN", source="He et al. 2021, arXiv 2110.04366")
def mam(
    length: int = 30,
    reparameterise: int | None = 800,
    width: int | None = 512,
    reduction: float = 2.0,
    scale: float = 4.0,
    layers: str | None = None,
) -> Method:
    """Mix-and-match adapter: a short prefix for every attention, a wide parallel adapter beside every FFN."""
    parts = (
        prefix(length, reparameterise, layers=layers),
        parallel(reduction, width, scale, layers=layers),
    )
    return union("mam", *parts, policy=Policy(learning_rate=5e-4, flatten=True))


@row("unipelt", equation="each of adapter, prefix, LoRA times a gate mean_t sigmoid(w . x_t + b)", source="Mao et al. 2022, arXiv 2110.07577")
def unipelt(
    length: int = 10,
    reparameterise: int | None = 512,
    reduction: float = 16.0,
    width: int | None = None,
    rank: int = 8,
    masked: bool = True,
    lora: bool = True,
    layers: str | None = None,
) -> Method:
    """Pfeiffer adapter, prefix and LoRA (q, v), each opened by a gate that looks at the input.

    The gate takes the place of LoRA's alpha / r.  The released code averages gates over padding too: `masked=False`.
    `lora=False` is the paper's variant AP.
    """
    adapter = Gated(Bottleneck(width, reduction, "relu", "normed"), "normed", masked)
    memory = Gated(Attend(length, reparameterise), "reads", masked)
    patches = [
        Patch("adapter", "ffn", adapter, layers=layers),
        Patch("prefix", "attn.mem", memory, Concat(), port="mem", layers=layers),
    ]
    if lora:
        patches.append(Patch("lora", "attn.{q,v}", Gated(Affine(LowRank(rank)), "input", masked), layers=layers))
    return Method("unipelt", tuple(patches), Policy(learning_rate=5e-4, flatten=True))


@row("perfect", equation="adapters + s[y, i] = h_i . L[y, i] over M masks, then nearest prototype", source="Mahabadi et al. 2022, arXiv 2204.01172")
def perfect(
    labels: tuple[str, ...] = (),
    masks: int = 2,
    mask_token: int | None = None,
    reduction: float = 16.0,
    width: int | None = None,
    norms: bool = True,
    label_rate: float = 10.0,
) -> Method:
    """Few-shot classification without patterns: adapters after the FFN, label embeddings over mask tokens, prototypes.

    With `labels` the method has its head; the paper sweeps its learning rate (`label_rate` times 1e-4).
    """
    adapters = houlsby(width, reduction, norms=False, init="houlsby", at="ffn").patches
    policy = Policy(learning_rate=1e-4, groups=(Group("head", rate=label_rate),))
    method = Method("perfect", (*adapters, norm_patch()) if norms else adapters, policy)
    return method.with_head(MultiMaskLabels(tuple(labels), masks, mask_token)) if labels else method


__all__ = ["mam", "perfect", "unipelt"]
