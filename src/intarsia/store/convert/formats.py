"""`FORMATS`: which method of which peer is read, written and checked against what; `table` renders it for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: how a conversion is verified
Check = Literal["peft", "outputs"]
CHECKS: Mapping[Check, str] = {
    "peft": "logits of peft 0.21 itself within 1e-5 (of logits up to 1), its file back to the byte where it is the same method, and logits of peft with our file",
    "outputs": "outputs of the peer itself, kept beside the samples, within 1e-5; what is read is written to the same tensors and fields, and read again bit by bit",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One method of one peer.

    Attributes:
        kind: the peer's name of it (`peft_type`, `architecture`).
        reads: as what it is read.
        writes: as what a module of ours is written; empty for not at all.
        check: how reading is verified; what is written is read back and compared in any case.
        limits: what is refused or reported.
    """

    kind: str
    reads: str
    writes: str
    check: Check
    limits: str = ""


FORMATS: Mapping[str, tuple[Format, ...]] = {
    "peft": (
        Format("LORA", "LoRA, rsLoRA, DoRA, of layers and embeddings, with rows of embeddings", "the same", "peft",
               "starts that change the base: PiSSA and OLoRA need weights= and double the rank, CorDA, LoftQ and LoRA-GA only once converted by peft; "
               "no convolutions, no target_parameters"),
        Format("ADALORA", "AdaLoRA", "AdaLoRA", "peft"),
        Format("IA3", "(IA)^3", "(IA)^3", "peft", "not at parts of fused projections"),
        Format("LOHA", "LoHa", "LoHa", "peft"),
        Format("LOKR", "LoKr", "LoKr", "peft", "decompose_both: factors of the left side are multiplied out"),
        Format("VERA", "VeRA, its sides stored", "VeRA", "peft", "needs save_projection=True"),
        Format("PVERA", "VeRA of the means", "", "peft", "needs save_projection=True; written as VERA"),
        Format("RANDLORA", "a full change of each matrix", "", "peft", "needs save_projection=True"),
        Format("VBLORA", "the low-rank product it is", "", "peft", "not save_only_topk_weights; written as LORA"),
        Format("OFT", "OFT", "OFT", "peft"),
        Format("BOFT", "BOFT", "BOFT", "peft", "one butterfly factor: peft has more only with its CUDA extension"),
        Format("HRA", "HRA", "HRA", "peft", "apply_GS: written without it"),
        Format("MISS", "MiSS", "MiSS", "peft", "not bat; mini: its block is repeated"),
        Format("FOURIERFT", "FourierFT", "FourierFT", "peft", "positions follow from torch's generator"),
        Format("C3A", "C3A", "C3A", "peft"),
        Format("GRALORA", "blocks of LoRA", "GraLoRA", "peft", "not hybrid_r"),
        Format("DELORA", "the low-rank product it is", "", "peft", "written as LORA"),
        Format("ROAD", "RoAd-1; road_2 and road_4 as a matrix with two numbers in a row", "RoAd", "peft"),
        Format("HIRA", "HiRA", "HiRA", "peft"),
        Format("SHIRA", "a sparse change", "sparse changes of matrices", "peft", "as many entries as a rank gives: zeros beside fewer"),
        Format("SUPERTUNING", "a sparse change", "the same", "peft", "not with a LoRA beside it"),
        Format("BEFT", "shifts of outputs", "shifts, BitFit of linear layers", "peft"),
        Format("TRAINABLE_TOKENS", "a sparse change of embedding rows", "the same", "peft", "needs weights="),
        Format("LN_TUNING", "norms", "norms", "peft", "needs weights="),
        Format("PROMPT_TUNING", "prompt", "prompt", "peft", "encoders: pooled at another token, reported"),
        Format("P_TUNING", "prompt", "what was read from it", "peft", "the network is not in the file; else written as PROMPT_TUNING"),
        Format("CPT", "prompt", "what was read from it", "peft"),
        Format("PREFIX_TUNING", "prefix", "prefix", "peft", "positions are made up for (give model=); two stacks: the decoder's self-attention, as peft has it"),
        Format("CARTRIDGE", "prefix", "what was read from it", "peft"),
        Format("ADAPTION_PROMPT", "gated prefix", "", "peft", "needs weights="),
    ),
    "AdapterHub": (
        Format("bottleneck", "adapters with gates, norms and scales, Compacter, PHM, invertible adapters (NICE)", "the same", "outputs",
               "not GLOW (adapters' own cannot run), no scaling per channel; an invertible adapter of two stacks changes the encoder's embeddings only"),
        Format("lora", "LoRA with or without a gate, (IA)^3 at outputs, adapters' own DoRA, VeRA as the low-rank product it is", "the same; VeRA as LoRA", "outputs",
               "q, k, v and both feed-forward layers (up, down); DoRA of the paper is another formula and is refused; no gated (IA)^3 or DoRA"),
        Format("prefix_tuning", "prefix, plain or with its network, with or without a gate", "the same", "outputs",
               "all layers of a stack; T5: a text's relative positions move as in adapters (shifts=True); no two gates"),
        Format("prompt_tuning", "prompt behind the norm of the embeddings", "the same", "outputs", "encoders that normalise their embeddings; outputs are those of the text's tokens"),
        Format("reft", "LoReFT, NoReFT, DiReFT (subtract=False)", "the same; DiReFT as the NoReFT it equals", "outputs",
               "a file does not say that it is a DiReFT; a decoder's text is edited as far as the call's prompt= reaches"),
        Format("union", "several of these in one (MAM, UniPELT, MAD-X)", "the same", "outputs", "one of a kind"),
        Format("fusion", "a router over the adapters' changes; setups as expressions", "the same, with its members", "outputs",
               "Stack, Fuse, Average, BatchSplit; not Parallel and Split, fusions of parallel adapters, stacks of LoRA or of several invertible adapters, which mean something else there"),
        Format("heads", "classification, multi-label, regression, tagging, masked, causal and sequence-to-sequence language models, and those of a model class", "the same", "outputs",
               "left out by name: question answering, multiple choice, images, dependency parsing, heads that pool a pooler or an encoder-decoder; ours that pool by the mean"),
    ),
    "composable-sft": (
        Format("sparse difference", "changes of entries, heads", "changes of whole parameters, heads", "outputs", "a pickle, by permission; heads need weights="),
    ),
}


def table() -> str:
    """The rows as markdown."""
    lines: list[str] = []
    for peer, rows in FORMATS.items():
        lines += [f"## {peer}", "", "| kind | read as | written from | reading checked by | limits |", "|---|---|---|---|---|"]
        lines += [f"| `{row.kind}` | {row.reads} | {row.writes or '-'} | {row.check} | {row.limits} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, "Checks: " + "; ".join(f"*{name}*: {text}" for name, text in CHECKS.items()) + "."])
