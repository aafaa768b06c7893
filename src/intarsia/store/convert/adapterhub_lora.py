"""AdapterHub's LoRA family: LoRA with or without a gate, (IA)^3, DoRA, VeRA, as ours.

| theirs | ours |
|---|---|
| W x + b + s B A x | `Affine` under `Add(s)`; a gate takes the place of s |
| `composition_mode="scale"` ((IA)^3) | `Const` under `Mul`, at outputs, which scales the bias too |
| m / ||W + B A|| * (W x + b + s B A x) (DoRA) | `Renorm` that leaves s out of the norm and scales the bias |
| (`vera_B` B `vera_D` A) x, both diagonals dense (VeRA) | the low-rank product it is |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.patches import Add, Affine, Const, FormSpec, Gated, LowRank, Mul, Renorm
from intarsia.sites.address import Site
from intarsia.store.convert.adapterhub_kinds import Reading
from intarsia.store.convert.pieces import Piece


def loras(reading: Reading, config: Mapping[str, Any]) -> None:
    """All LoRA-like changes of a file."""
    scaled, gated, vera = config["composition_mode"] == "scale", bool(config["use_gating"]), config.get("vera_d") is not None or config.get("vera_b") is not None
    dora = bool(config.get("use_dora"))
    if not scaled and config["composition_mode"] != "add":
        raise ModuleError(f"composition_mode={config['composition_mode']!r} is not read; 'add' and 'scale' are")
    if (scaled or dora) and gated:
        raise ModuleError(f"a gated {'(IA)^3' if scaled else 'DoRA'} is not read")
    needed = {"lora_B"} if scaled else {"vera_D", "vera_B"} if vera else {"lora_A", "lora_B"}
    needed = needed | ({"gate.weight", "gate.bias"} if gated else set()) | ({"m.weight"} if dora else set())
    shared = _shared(reading) if vera else {}
    for path, leaves in reading.groups("loras").items():
        found = reading.paths.split(f"{path}.x")
        if found is None or found[1] != "x":
            raise ModuleError(f"{path}: {reading.sites.model} has no such module; is this the model it was trained on?")
        lead = f"{path}.loras.{reading.name}."
        if leaves != needed:
            raise ModuleError(f"{lead}: expected the tensors {listing(sorted(needed))}, found {listing(sorted(leaves))}")
        tensors = {leaf: reading.take(lead + leaf) for leaf in sorted(leaves)}
        if vera:
            up = tensors.pop("vera_B") @ shared["lora_B"] @ tensors.pop("vera_D")
            tensors |= {"lora_A": shared["lora_A"].clone(), "lora_B": up}
        for site, part in _parts(reading, config, found[0], tensors):
            reading.pieces.append(_scaled(config, site, part) if scaled else _lora(config, site, part))
    if vera:
        reading.notes["VeRA is read as the low-rank product that it is (adapters trains full matrices in the place of its diagonals)"] = None


def _shared(reading: Reading) -> dict[str, Tensor]:
    """The pair of matrices that all layers of a VeRA share."""
    mark = f"shared_parameters.{reading.name}."
    keys = {key.partition(mark)[2]: key for key in reading.tensors if mark in key}
    if set(keys) != {"lora_A", "lora_B"}:
        raise ModuleError(f"{mark}*: VeRA shares lora_A and lora_B, found {listing(sorted(keys)) or 'none'} (adapters drops them for models without a head class)")
    return {leaf: reading.take(key) for leaf, key in keys.items()}


def _parts(reading: Reading, config: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> list[tuple[Site, dict[str, Tensor]]]:
    """The sites of a module and their share of its tensors; a fused projection has one share for each matrix named."""
    sites = [site for site in reading.paths.out.get(path, []) if site.view is not None]
    if not sites:
        return [(reading.paths.linear(path), tensors)]
    matrices = [m for m in ("q", "k", "v") if m in config["attn_matrices"]]
    by_word = {site.name.rpartition(".")[2]: site for site in sites}
    count = len(matrices)
    shares = {leaf: tensor.chunk(count) for leaf, tensor in tensors.items()}
    if any(m not in by_word for m in matrices) or any(len(share) != count for share in shares.values()):
        raise ModuleError(f"{path}: {listing(matrices)} are not the parts of this projection ({listing(by_word)}), or do not divide its tensors")
    return [(by_word[m], {leaf: share[i] for leaf, share in shares.items()}) for i, m in enumerate(matrices)]


def _scaled(config: Mapping[str, Any], site: Site, tensors: dict[str, Tensor]) -> Piece:
    return Piece(site.name, "scale", Const("ones"), Mul(), "out", {"value": tensors["lora_B"][:, 0] * float(config["alpha"])})


def _lora(config: Mapping[str, Any], site: Site, tensors: dict[str, Tensor]) -> Piece:
    rank = tensors["lora_A"].shape[0]
    if rank != config["r"]:
        raise ModuleError(f"{site.name}: the configuration says rank {config['r']}, the tensors have rank {rank}")
    ours = {"factor.down": tensors["lora_A"], "factor.up": tensors["lora_B"]}
    if config.get("use_dora"):
        dora = Renorm(LowRank(rank), float(config["alpha"]) / rank, float(config["dropout"]), scaled_norm=False, whole=True)
        return Piece(site.name, "dora", dora, Add(), "out", {**ours, "magnitude": tensors["m.weight"][:, 0]})
    form: FormSpec = Affine(LowRank(rank), float(config["dropout"]))
    if not config["use_gating"]:
        return Piece(site.name, "lora", form, Add(float(config["alpha"]) / rank), "out", ours)
    gate = {"gate": tensors["gate.weight"][0], "gate_bias": tensors["gate.bias"]}
    return Piece(site.name, "lora", Gated(form, masked=False), Add(), "out", {**{f"inner.{k}": t for k, t in ours.items()}, **gate})
