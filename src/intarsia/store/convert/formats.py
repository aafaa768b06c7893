"""`FORMATS`: which method of which peer is read, written and checked against what; `table` renders it for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: how a conversion is verified
Check = Literal["outputs", "weights", "tensors"]
CHECKS: Mapping[Check, str] = {
    "outputs": "outputs of the peer itself, kept beside the samples, within 2e-5",
    "weights": "logits of the weights that the sample stands for, by the peer's published formula, within 1e-5",
    "tensors": "every number at its place",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One method of one peer.

    Attributes:
        kind: the peer's name of it (`peft_type`, `architecture`).
        reads: as what it is read; empty for not at all.
        writes: as what a module of ours is written; empty for not at all.
        check: how reading is verified; what is written is read back and compared in any case.
        limits: what is refused or reported.
    """

    kind: str
    reads: str
    writes: str
    check: Check
    limits: str = ""


_PRODUCT = "the low-rank product it is"
FORMATS: Mapping[str, tuple[Format, ...]] = {
    "peft": (
        Format("LORA", "LoRA, rsLoRA, DoRA", "LoRA, DoRA, AdaLoRA (as LoRA)", "weights", "PiSSA, OLoRA, CorDA, LoftQ: only once converted by peft; no convolutions, no target_parameters"),
        Format("ADALORA", "AdaLoRA", "", "weights", "written as LORA"),
        Format("IA3", "(IA)^3", "(IA)^3", "weights", "not at parts of fused projections"),
        Format("LOHA", "LoHa", "LoHa", "weights"),
        Format("LOKR", "LoKr", "LoKr", "weights"),
        Format("VERA", _PRODUCT, "", "weights", "needs save_projection=True"),
        Format("OFT", "OFT", "OFT", "weights"),
        Format("BOFT", "OFT and a gain", "", "weights", "one butterfly factor"),
        Format("HRA", "HRA", "HRA", "weights", "even numbers of reflections"),
        Format("MISS", "MiSS", "MiSS", "weights", "not bat, not mini"),
        Format("FOURIERFT", "FourierFT", "FourierFT", "weights", "positions follow from torch's generator"),
        Format("C3A", "C3A", "C3A", "weights"),
        Format("GRALORA", "blocks of LoRA", "", "weights"),
        Format("DELORA", _PRODUCT, "", "weights"),
        Format("ROAD", "RoAd-1", "RoAd-1", "weights", "not road_2, road_4"),
        Format("HIRA", "HiRA", "HiRA", "weights"),
        Format("SHIRA", "a sparse change", "", "weights"),
        Format("TRAINABLE_TOKENS", "a sparse change of embedding rows", "the same", "weights", "needs weights="),
        Format("LN_TUNING", "norms", "norms", "weights", "needs weights="),
        Format("PROMPT_TUNING", "prompt", "prompt", "weights", "encoders: pooled at another token, reported"),
        Format("P_TUNING", "prompt", "", "weights", "the network is not in the file; written as PROMPT_TUNING"),
        Format("PREFIX_TUNING", "prefix", "prefix", "tensors", "one stack; peft moves positions, reported"),
    ),
    "AdapterHub": (
        Format("bottleneck", "adapters, Compacter, PHM", "adapters", "outputs", "no invertible adapters; Compacter is not written"),
        Format("lora", "LoRA, (IA)^3", "LoRA, multipliers at outputs", "outputs", "DoRA and VeRA have other formulas there: refused; written at q, k, v and, without a gate, the feed-forward layers"),
        Format("prefix_tuning", "prefix, plain or with its network", "plain prefix, one stack", "outputs", "no gate; relative positions (T5): refused"),
        Format("reft", "LoReFT, NoReFT", "", "outputs", "DiReFT is stored as NoReFT, reported; T5's decoder: prompt only, reported"),
        Format("prompt_tuning", "", "", "tensors", "refused: the prompt stands behind the embedding norm, without positions"),
        Format("heads", "tagging heads of one layer", "", "outputs", "others are left out and reported"),
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
        lines += [f"| `{row.kind}` | {row.reads or '-'} | {row.writes or '-'} | {row.check if row.reads else '-'} | {row.limits} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, "Checks: " + "; ".join(f"*{name}*: {text}" for name, text in CHECKS.items()) + "."])
