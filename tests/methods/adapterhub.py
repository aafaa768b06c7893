"""AdapterHub's tensors and configurations in our terms, as far as the parity tests need: one function per kind of method.

Each takes the tensors of a checkpoint, one configuration and the model's sites, and returns patches with their tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.methods import Patch
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Bottleneck,
    Concat,
    Const,
    Gated,
    Kron,
    LowRank,
    Mul,
    Scaled,
    SubspaceEdit,
)
from intarsia.sites.address import SiteMap

Tensors = dict[str, Tensor]
Found = tuple[list[Patch], Tensors]
ACTIVATIONS = {"relu": "relu", "swish": "silu", "gelu": "gelu", "tanh": "tanh", None: "identity"}
#: where adapters sit: path of the block's list -> path below a block -> our role
PLACES: dict[str, dict[str, str]] = {
    "encoder.layer": {"attention.output.adapters": "attn", "output.adapters": "ffn"},
    "h": {"attention_adapters.adapters": "attn", "output_adapters.adapters": "ffn"},
    "layers": {"attention_adapters.adapters": "attn", "output_adapters.adapters": "ffn"},
    "encoder.block": {"layer.0.adapters": "attn", "layer.1.adapters": "ffn"},
    "decoder.block": {"layer.0.adapters": "attn", "layer.1.adapters": "xattn", "layer.2.adapters": "ffn"},
}
STACKS = {"encoder.block": "encoder.", "decoder.block": "decoder."}


def load(folder: Path) -> tuple[Tensors, list[dict[str, Any]], str]:
    """Tensors (named as in the base model), configurations and name of a checkpoint."""
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else load_file(folder / "adapter.safetensors")
    for prefix in ("bert.", "roberta.", "transformer.", "model."):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    parts = config["config"].get("configs", [config["config"]])
    return tensors, parts, config["name"]


def below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def convert(tensors: Tensors, config: dict[str, Any], name: str, sites: SiteMap, case: str) -> Found:
    kind = config.get("architecture")
    if kind == "lora":
        return lora(tensors, config, name, sites)
    if kind == "prefix_tuning":
        return prefix(tensors, config, name, sites)
    if kind == "reft":
        return reft(tensors, config, name, sites, subtract=case != "direft")
    return adapters(tensors, config, name, sites)


def adapters(tensors: Tensors, config: dict[str, Any], name: str, sites: SiteMap) -> Found:
    patches: list[Patch] = []
    found: Tensors = {}
    for blocks, places in PLACES.items():
        for path, role in places.items():
            for layer in range(max(sites.layers.values())):
                part = below(tensors, f"{blocks}.{layer}.{path}.{name}.")
                site = f"{STACKS.get(blocks, '')}{layer}.{role}"
                if not part or site not in sites:
                    continue
                patch = f"adapter{len(patches)}"
                after = not config["original_ln_after"]  # behind the whole add-and-norm, instead of before it
                site = f"{site}.norm" if after and sites[site].norm is not None else site
                form, mine = bottleneck(part, config, "self" if site.endswith(".norm") else None)
                op = Add(1.0 if config["scaling"] == "learned" else float(config["scaling"]))
                patches.append(Patch(patch, site, form, op))
                found |= {f"{site}/{patch}.{k}": v for k, v in mine.items()}
    rule = tensors.get(f"shared_parameters.{name}.phm_rule")
    if rule is not None:
        found[f"tied/kron.{len(rule)}.left"] = rule.mT
    return patches, found


def bottleneck(part: Tensors, config: dict[str, Any], reading: Any) -> tuple[Any, Tensors]:
    before, after = config["ln_before"], config["ln_after"]
    down, up = f"adapter_down.{int(before)}", "adapter_up"
    mine: Tensors = {}
    if config["phm_layer"]:
        shared, rank = config["shared_phm_rule"], config["phm_rank"] if config["factorized_phm_W"] else None
        factor: Any = Kron(config["phm_dim"], rank, shared)
        for role, path in (("down", down), ("up", up)):
            mine |= {f"{role}.{k}": v for k, v in kron(below(part, f"{path}.")).items()}
            mine[f"{role}_bias"] = part[f"{path}.b"]
        width = len(mine["down_bias"])
        arguments: dict[str, Any] = {"factor": factor}
    else:
        for role, path in (("down", down), ("up", up)):
            mine |= {f"{role}.value": part[f"{path}.weight"], f"{role}_bias": part[f"{path}.bias"]}
        width, arguments = len(mine["down_bias"]), {}
    norm = {(False, False): "none", (True, False): "in", (False, True): "out", (True, True): "both"}[before, after]
    if before:
        mine |= {"norm_in.weight": part["adapter_down.0.weight"], "norm_in.bias": part["adapter_down.0.bias"]}
    if after:
        mine |= {"norm_out.weight": part["adapter_norm_after.weight"], "norm_out.bias": part["adapter_norm_after.bias"]}
    residual = "self"
    if config["adapter_residual_before_ln"] and after:
        residual = "inside"
    elif not config["residual_before_ln"] and config["original_ln_after"]:
        residual = "read"
    # beside a pre-norm sub-layer AdapterHub reads the stream, He et al. what the sub-layer reads
    reading = reading or ("residual" if config["is_parallel"] else "normed" if config["original_ln_before"] else "self")
    form: Any = Bottleneck(
        width, activation=ACTIVATIONS[config["non_linearity"]], read=reading, norm=norm, residual=residual, **arguments
    )
    if config["scaling"] == "learned":
        form, mine = Scaled(form), {**{f"inner.{k}": v for k, v in mine.items()}, "scale": part["scaling"]}
    if config["use_gating"]:
        form, mine = Gated(form, reading, masked=False), {**{f"inner.{k}": v for k, v in mine.items()}, **gate(part, 0)}
    return form, mine


def kron(part: Tensors) -> Tensors:
    """Ours is [out, in], theirs multiplies from the right: everything is transposed."""
    mine = {"rule.left": part["phm_rule"].mT} if "phm_rule" in part else {}
    if "W" in part:
        return {**mine, "up": part["W"].mT}
    return {**mine, "up": part["W_right"].mT, "down": part["W_left"].mT}


def gate(part: Tensors, row: int) -> Tensors:
    return {"gate": part["gate.weight"][row], "gate_bias": part["gate.bias"][row : row + 1]}


def lora(tensors: Tensors, config: dict[str, Any], name: str, sites: SiteMap) -> Found:
    patches: list[Patch] = []
    found: Tensors = {}
    rank, scaling = config["r"], config["composition_mode"] == "scale"
    for path in dict.fromkeys(k.split(".loras.")[0] for k in tensors if ".loras." in k):
        part = below(tensors, f"{path}.loras.{name}.")
        here = [s for s in sites.values() if s.path == path and s.port == "out"]
        fused = [s for s in here if s.view is not None]
        wanted = [s for s in fused if s.name.rpartition(".")[2] in config["attn_matrices"]] or [s for s in here if s.name.count(".") > 1][:1]
        for row, site in enumerate(wanted):
            patch = f"lora{len(patches)}"
            up = part["lora_B"].chunk(len(wanted))[row]
            if scaling:
                patches.append(Patch(patch, site.name, Const("ones"), Mul()))
                found[f"{site.name}/{patch}.value"] = up[:, 0]
                continue
            mine = {"factor.down": part["lora_A"].chunk(len(wanted))[row], "factor.up": up}
            form: Any = Affine(LowRank(rank))
            if config["use_gating"]:
                form, mine = Gated(form, "input", masked=False), {**{f"inner.{k}": v for k, v in mine.items()}, **gate(part, row)}
            patches.append(Patch(patch, site.name, form, Add(1.0 if config["use_gating"] else config["alpha"] / rank)))
            found |= {f"{site.name}/{patch}.{k}": v for k, v in mine.items()}
    return patches, found


def prefix(tensors: Tensors, config: dict[str, Any], name: str, sites: SiteMap) -> Found:
    patches: list[Patch] = []
    found: Tensors = {}
    length = config["prefix_length"]
    kinds = [("", "attn", "self_prefix")]
    if "encoder" in sites.layers:
        kinds = [("encoder.", "attn", "encoder_prefix"), ("decoder.", "attn", "self_prefix"), ("decoder.", "xattn", "cross_prefix")]
    for stack, role, theirs in kinds:
        part = below(tensors, f"prefix_tuning.prefix_tunings.{name}.{theirs}.")
        layers = sites.layers[stack.rstrip(".")]
        for layer in range(layers):
            site = sites[f"{stack}{layer}.{role}.mem"]
            patch = f"prefix_{theirs}"
            heads, size = site.heads  # type: ignore[misc]
            flat = config["flat"]
            if flat:
                both = part["control_trans"].view(length, 2 * layers, heads, size)[:, 2 * layer : 2 * layer + 2]
                keys, values = both.permute(1, 2, 0, 3)
                mine = {"keys": keys, "values": values}
            else:
                weight = part["control_trans.2.weight"].unflatten(0, (layers, -1))[layer]
                mine = {"weight": weight, "bias": part["control_trans.2.bias"].unflatten(0, (layers, -1))[layer]}
            form: Any = Attend(length, None if flat else config["bottleneck_size"])
            if config["use_gating"]:
                where = next((k for k in tensors if ".prefix_gates." in k and _is_of(k, stack, layer, role)), "")
                gates = below(tensors, where.rpartition("weight")[0])
                form = Gated(form, "reads", masked=False)
                mine = {**{f"inner.{k}": v for k, v in mine.items()}, "gate": gates["weight"][0], "gate_bias": gates["bias"][:1]}
            if layer == 0:
                patches.append(Patch(patch, f"{stack}{{{','.join(map(str, range(layers)))}}}.{role}.mem", form, Concat(), port="mem"))
            found |= {f"{site.name}/{patch}.{k}": v for k, v in mine.items()}
        if not config["flat"]:
            tied = f"tied/prefix.{stack}{role}"
            found |= {f"{tied}.embedding": part["wte.weight"], f"{tied}.weight": part["control_trans.0.weight"]}
            found[f"{tied}.bias"] = part["control_trans.0.bias"]
    return patches, found


def _is_of(key: str, stack: str, layer: int, role: str) -> bool:
    words = key.split(".")
    there = key.startswith(stack) if stack else True
    number = next(w for w in words if w.isdecimal())
    return there and number == str(layer) and (("EncDec" in key) == (role == "xattn")) and key.endswith("weight")


def reft(tensors: Tensors, config: dict[str, Any], name: str, sites: SiteMap, subtract: bool) -> Found:
    patches: list[Patch] = []
    found: Tensors = {}
    form = SubspaceEdit(
        config["r"],
        config["prefix_positions"],
        config["suffix_positions"],
        tied=config["tied_weights"],
        subtract=subtract,
        orthonormal=config["orthogonality"],
        activation=ACTIVATIONS[config["non_linearity"]],
    )
    for blocks in PLACES:
        for layer in range(max(sites.layers.values())):
            part = below(tensors, f"{blocks}.{layer}.reft_layer.refts.{name}.units.")
            site = f"{STACKS.get(blocks, '')}{layer}"
            if not part or site not in sites:
                continue
            patch = f"edit{len(patches)}"
            patches.append(Patch(patch, site, form))
            for number, unit in enumerate(("edit",) if form.tied else ("first", "last")):
                if unit in form.names():
                    mine = below(part, f"{number}.")
                    found |= {
                        f"{site}/{patch}.units.{unit}.projection": projection(mine),
                        f"{site}/{patch}.units.{unit}.source": mine["learned_source.weight"],
                        f"{site}/{patch}.units.{unit}.bias": mine["learned_source.bias"],
                    }
    return patches, found


def projection(part: Tensors) -> Tensor:
    """R, as torch's orthogonal parametrisation makes it."""
    if "projection.weight" in part:
        return part["projection.weight"]
    rank, width = part["projection.parametrizations.weight.original"].shape
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, rank, bias=False))
    linear.load_state_dict(below(part, "projection."))
    return linear.weight.detach()
