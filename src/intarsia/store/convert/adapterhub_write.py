"""`write_adapterhub`: bottleneck adapters, LoRA, (IA)^3 and plain prefixes as a folder of AdapterHub's `adapters` (1.x).

One folder there has one configuration for all layers: what differs between layers other than an adapter's width is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import Patch
from intarsia.modules.module import Module
from intarsia.patches import Add, Affine, Attend, Bottleneck, Const, Dense, Gated, LowRank, Mul, Scaled
from intarsia.sites.address import Site, SiteMap
from intarsia.store.convert.adapterhub import CONFIG, SLOTS, WEIGHTS
from intarsia.store.convert.adapterhub_kinds import ACTIVATIONS
from intarsia.store.convert.folder import json_bytes, tensor_bytes, write_folder
from intarsia.store.convert.report import Report

Fields = dict[str, Any]
Item = tuple[Site, Patch, dict[str, Tensor]]
VERSION = "adapters.1.3.0"
#: the slot of a sub-layer from our path of it
_SLOT_OF: Sequence[tuple[re.Pattern[str], str]] = tuple((re.compile(pattern), slot) for pattern, slot in (
    (r"(.*encoder\.layer\.\d+\.attention\.output)\.\w+", "{}"), (r"(.*encoder\.layer\.\d+\.output)\.\w+", "{}"),
    (r"((?:en|de)coder\.block\.\d+\.layer\.\d)\.\w+", "{}"),
    (r"(.*(?:h|layers)\.\d+)\.(?:attn|self_attn)", "{}.attention_adapters"), (r"(.*layers\.\d+)\.encoder_attn", "{}.cross_attention_adapters"),
    (r"(.*(?:h|layers)\.\d+)\.(?:mlp|fc2)", "{}.output_adapters"),
))  # fmt: skip
_THEIRS = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "silu"}
_BOTTLENECK: Mapping[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None, "inv_adapter": None,
    "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False,
    "mh_adapter": False, "non_linearity": "relu", "original_ln_after": True, "original_ln_before": False, "output_adapter": False, "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1, "reduction_factor": 16,
    "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
_PLACES = frozenset((*((sublayer, word) for sublayer in ("attn", "xattn") for word in "qkv"), ("ffn", "up"), ("ffn", "down")))
_LORA: Mapping[str, Any] = {
    "alpha": 8, "architecture": "lora", "attn_matrices": [], "composition_mode": "add", "dropout": 0.0, "dtype": None, "init_weights": "lora",
    "init_weights_seed": None, "intermediate_lora": False, "leave_out": [], "output_lora": False, "r": 8, "selfattn_lora": False, "use_dora": False,
    "use_gating": False, "vera_b": None, "vera_d": None,
}  # fmt: skip


def write_adapterhub(module: Module, folder: str | os.PathLike[str], *, sites: SiteMap, model_type: str, name: str | None = None) -> Report:
    """Write `adapter_config.json`, `adapter.safetensors` and the card as `README.md` into a new folder.

    Args:
        sites: of the model it is for; paths in the file are this model's.
        model_type: `model.config.model_type`.
        name: of the adapter, plain letters, digits, `_` and `-`, as it stands in every key; None for the module's.

    Raises:
        ModuleError: a patch has no form there, or layers differ in more than an adapter's width; nothing is written.
        StoreError: the folder already holds such files.
    """
    name = name or module.name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ModuleError(f"{name!r} would stand in every key of the file: give name= of letters, digits, '_' and '-'")
    patches = {patch.name: patch for patch in module.method.patches}
    left_out: list[str] = []
    places: dict[tuple[str, Patch], dict[str, Tensor]] = {}
    for key, tensor in module.tensors.items():
        site, _, rest = key.partition("/")
        patch = patches.get(rest.partition(".")[0])
        if site == "tied" or patch is None:
            raise ModuleError(f"{key!r} is shared by all sites; take the module with host.extract(name, flatten=True)")
        if patch.port == "logits":
            left_out.append(f"{key} {tuple(tensor.shape)}: heads of adapters belong to its own model classes")
        else:
            places.setdefault((site, patch), {})[rest.partition(".")[2]] = tensor
    for what, there in (("label names", module.labels), ("the context", module.context), ("required modules", module.requires)):
        if there:
            left_out.append(f"{what} ({listing(map(str, there), 4)}): the files have no place for it")
    missing = [site for site, _ in places if site not in sites]
    if missing or not places:
        raise ModuleError(f"{module.name!r} does not fit this model: it lacks {listing(missing)}" if missing else f"{module.name!r} holds nothing to write")
    items = [(sites[site], patch, tensors) for (site, patch), tensors in places.items()]
    kinds = {_kind(patch) for _, patch, _ in items}
    if len(kinds) > 1:
        raise ModuleError(f"{module.name!r} is {listing(sorted(k.__name__.strip('_') for k in kinds))} in adapters; only one method is written")
    config, tensors = kinds.pop()(sites, items, name)
    document = {
        "config": config, "hidden_size": max(site.features for site in sites.values() if site.name.endswith("attn")), "model_class": sites.model,
        "model_name": module.card.base or None, "model_type": model_type, "name": name, "version": VERSION,
    }  # fmt: skip
    write_folder(folder, {CONFIG: json_bytes(document), WEIGHTS: tensor_bytes(tensors), "README.md": module.card.to_markdown().encode()})
    return Report(module.name, str(config.get("architecture", "bottleneck")), len(tensors), tuple(left_out))


def _kind(patch: Patch) -> Callable[[SiteMap, Sequence[Item], str], tuple[Fields, dict[str, Tensor]]]:
    """How a patch is written."""
    form = patch.form.form if isinstance(patch.form, Gated) else patch.form
    if isinstance(form, Attend):
        return _prefixes
    if isinstance(form, Const) and form.factor is None and isinstance(patch.op, Mul) and patch.port == "out":
        return _scales
    return _loras if isinstance(form, Affine) else _bottlenecks


def _one(found: Sequence[Fields], what: str) -> Fields:
    """The fields that all sites share."""
    for other in found[1:]:
        odd = [key for key in found[0] if other[key] != found[0][key]]
        if odd:
            raise ModuleError(f"one configuration is for all {what}, here they differ in {listing(odd)}: {found[0][odd[0]]!r} and {other[odd[0]]!r}")
    return dict(found[0])


def _bottlenecks(sites: SiteMap, items: Sequence[Item], name: str) -> tuple[Fields, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    fields: list[Fields] = []
    widths: dict[tuple[str, int], set[int]] = {}
    used: dict[str, set[tuple[str, int]]] = {}
    hidden = 0
    for site, patch, ours in items:
        behind = site.name.endswith(".norm")
        place = sites[site.name.removesuffix(".norm")] if behind else site
        slot, kind = _slot(place)
        found, renamed = _bottleneck(site, patch, ours, behind)
        fields.append(found)
        key = (place.stack, int(place.layer or 0))
        widths.setdefault(key, set()).add(renamed["adapter_up.weight"].shape[1])
        hidden = place.features
        if key in used.setdefault(kind, set()):
            raise ModuleError(f"{site.name}: two adapters at one place; adapters has one of a name there")
        used[kind].add(key)
        tensors |= {f"{slot}.adapters.{name}.{leaf}": tensor for leaf, tensor in renamed.items()}
    config = {**_BOTTLENECK, **_one(fields, "adapters")}
    for kind, flag in (("attn", "mh_adapter"), ("ffn", "output_adapter"), ("xattn", "cross_adapter")):
        config[flag] = kind in used
    layers = {(stack, index): number for number, (stack, index) in enumerate((s, i) for s, count in sites.layers.items() for i in range(count))}
    every = set(widths)
    uneven = [kind for kind, where in used.items() if where != (every if kind != "xattn" else {k for k in every if k[0] == "decoder"})]
    if uneven or any(len(found) > 1 for found in widths.values()):
        raise ModuleError(f"layers with adapters of {listing(sorted(used))} do not have them all, or of unlike width; one configuration cannot say so")
    config["leave_out"] = [number for key, number in layers.items() if key not in every]
    factors = {str(layers[key]): _reduction(hidden, next(iter(found))) for key, found in sorted(widths.items())}
    common = max(set(factors.values()), key=lambda f: (list(factors.values()).count(f), -f))
    odd = {number: factor for number, factor in factors.items() if factor != common}
    config["reduction_factor"] = {**odd, "default": common} if odd else common
    return config, tensors


def _reduction(hidden: int, width: int) -> float | int:
    """The factor by which adapters finds this width: hidden // factor."""
    factor = hidden // width if hidden % width == 0 else hidden / (width + 0.5)
    assert int(hidden // factor) == width
    return factor


def _slot(site: Site) -> tuple[str, str]:
    """Path of the adapters of a sub-layer, and its kind; it must lead back to the site."""
    for pattern, slot in _SLOT_OF:
        found = pattern.fullmatch(site.path)
        if found:
            path = slot.format(found.group(1))
            for known, ours in SLOTS:
                back = known.fullmatch(path)
                if back and ours.format(*back.groups()) == site.name:
                    return path, site.name.rpartition(".")[2]
    raise ModuleError(f"{site.name} ({site.path}): adapters has no bottleneck here that is known")


def _bottleneck(site: Site, patch: Patch, ours: Mapping[str, Tensor], behind: bool) -> tuple[Fields, dict[str, Tensor]]:
    """Fields and tensors of one adapter."""
    form, op = patch.form, patch.op
    fields: Fields = {"scaling": 1.0, "use_gating": False}
    extra: dict[str, Tensor] = {}
    if isinstance(op, Add):
        fields["scaling"] = op.scale
    if isinstance(form, Gated | Scaled):
        gated = isinstance(form, Gated)
        if gated and (form.masked or form.read != getattr(form.form, "read", "")):  # type: ignore[union-attr]
            raise ModuleError(f"{site.name}: adapters' gates read what the adapter reads and count padding; this one does not")
        if gated:
            extra, fields["use_gating"] = {"gate.weight": ours["gate"][None], "gate.bias": ours["gate_bias"]}, True
        else:
            extra, fields["scaling"] = {"scaling": ours["scale"]}, "learned"
        ours = {leaf.removeprefix("inner."): tensor for leaf, tensor in ours.items() if leaf.startswith("inner.")}
        form = form.form
    plain = isinstance(form, Bottleneck) and isinstance(form.factor, Dense) and form.vectors is None and isinstance(op, Add)
    if not plain or not isinstance(form, Bottleneck) or form.activation not in _THEIRS or (fields["scaling"] == "learned" and op != Add()):
        raise ModuleError(f"patch {patch.name!r} at {site.name} ({type(form).__name__} under {type(op).__name__}) has no form in adapters")
    reads = "residual" if form.read == "reads" and site.norm is not None else form.read
    table: Mapping[tuple[str, str, bool], Fields] = {
        ("normed", "self", False): {"original_ln_before": True}, ("self", "self", False): {}, ("residual", "self", False): {"is_parallel": True},
        ("normed", "read", False): {"original_ln_before": True, "residual_before_ln": False},
        ("self", "inside", False): {"ln_after": True, "adapter_residual_before_ln": True},
        ("self", "self", True): {"original_ln_before": True, "residual_before_ln": False, "original_ln_after": False},
    }  # fmt: skip
    found = table.get((reads, form.residual, behind))
    scaled_inside = form.norm in ("out", "both") and (fields["scaling"] != 1.0 or fields["use_gating"])
    if found is None or scaled_inside or (form.residual != "self" and (fields["scaling"] != 1.0 or fields["use_gating"])):
        raise ModuleError(f"{site.name}: an adapter that reads {form.read!r} with the skip connection {form.residual!r}, norm {form.norm!r} and scaling {fields['scaling']} has no form in adapters")
    fields |= {"original_ln_before": False, "residual_before_ln": True, "original_ln_after": True, "is_parallel": False, "adapter_residual_before_ln": False,
               "non_linearity": _THEIRS[form.activation], "dropout": form.dropout, "ln_before": form.norm in ("in", "both"),
               "ln_after": form.norm in ("out", "both")}  # fmt: skip
    fields |= found
    first = "adapter_down.1" if fields["ln_before"] else "adapter_down.0"
    names = {"down.value": f"{first}.weight", "down_bias": f"{first}.bias", "up.value": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    for leaf in ("weight", "bias"):
        names |= {f"norm_in.{leaf}": f"adapter_norm_before.{leaf}", f"norm_out.{leaf}": f"adapter_norm_after.{leaf}"}
    renamed = {names[leaf]: tensor for leaf, tensor in ours.items()}
    for leaf in ("weight", "bias"):  # the same tensor stands there twice
        if fields["ln_before"]:
            renamed[f"adapter_down.0.{leaf}"] = renamed[f"adapter_norm_before.{leaf}"].clone()
    return fields, {**renamed, **extra}


def _loras(sites: SiteMap, items: Sequence[Item], name: str) -> tuple[Fields, dict[str, Tensor]]:
    leaves: list[tuple[Site, dict[str, Tensor]]] = []
    fields: list[Fields] = []
    for site, patch, ours in items:
        form, op = patch.form, patch.op
        plain = isinstance(form, Affine) and form.read == "input" and isinstance(form.factor, LowRank) and isinstance(op, Add)
        if not plain or not isinstance(form, Affine) or not isinstance(form.factor, LowRank) or not isinstance(op, Add):
            raise ModuleError(f"patch {patch.name!r} at {site.name} has no form as a LoRA of adapters")
        alpha = op.scale * form.factor.rank
        fields.append({"r": form.factor.rank, "alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha, "dropout": form.dropout})
        leaves.append((site, {"lora_A": ours["factor.down"], "lora_B": ours["factor.up"]}))
    where, tensors = _at_layers(sites, leaves, name)
    return {**_LORA, **_one(fields, "layers"), **where}, tensors


def _scales(sites: SiteMap, items: Sequence[Item], name: str) -> tuple[Fields, dict[str, Tensor]]:
    """(IA)^3 as adapters has it: at outputs, that of the first feed-forward layer included."""
    where, tensors = _at_layers(sites, [(site, {"lora_B": ours["value"][:, None]}) for site, _, ours in items], name)
    return {**_LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3", **where}, tensors


def _at_layers(sites: SiteMap, leaves: Sequence[tuple[Site, dict[str, Tensor]]], name: str) -> tuple[Fields, dict[str, Tensor]]:
    """Fields that say at which layers, and the tensors there."""
    tensors: dict[str, Tensor] = {}
    words: dict[tuple[str, int], set[str]] = {}
    cross: dict[tuple[str, int], set[str]] = {}
    forward: dict[tuple[str, int], set[str]] = {}
    fused: dict[str, dict[str, dict[str, Tensor]]] = {}
    gated = any(site.name.endswith("ffn.gate") for site in sites.values())
    for site, own in leaves:
        parts = site.name.split(".")
        sublayer, word = (parts[-2], parts[-1]) if len(parts) > 1 else ("", "")
        if site.layer is None or (sublayer, word) not in _PLACES or (sublayer == "ffn" and gated):
            raise ModuleError(f"{site.name}: only q, k and v and, in models without a gate, both feed-forward layers are written; adapters names others differently from model to model")
        {"attn": words, "xattn": cross, "ffn": forward}[sublayer].setdefault((site.stack, site.layer), set()).add(word)
        if site.view is not None:
            fused.setdefault(site.path, {})[word] = own
        else:
            tensors |= {f"{site.path}.loras.{name}.{leaf}": tensor for leaf, tensor in own.items()}
    for path, shares in fused.items():  # side by side, in the order q, k, v
        order = [word for word in "qkv" if word in shares]
        for leaf in shares[order[0]]:
            tensors[f"{path}.loras.{name}.{leaf}"] = torch.cat([shares[word][leaf] for word in order])
    every = {*words, *forward}
    uneven = any(kind and set(kind) != (every if kind is not cross else {k for k in every if k[0] == "decoder"}) for kind in (words, forward, cross))
    if uneven or any(len(set(map(frozenset, found))) > 1 for found in (forward.values(), [*words.values(), *cross.values()])):
        raise ModuleError(f"layers have it at unlike places ({listing(''.join(sorted(w)) for w in [*words.values(), *forward.values()])}); one configuration cannot say so")
    matrices, inner = (next(iter(kind.values()), set()) for kind in (words, forward))
    numbers = [(stack, i) for stack, count in sites.layers.items() for i in range(count)]
    return {
        "selfattn_lora": bool(words), "attn_matrices": [word for word in "qkv" if word in matrices] or ["q", "v"], "intermediate_lora": "up" in inner,
        "output_lora": "down" in inner, "leave_out": [number for number, key in enumerate(numbers) if key not in every],
    }, tensors  # fmt: skip


def _prefixes(sites: SiteMap, items: Sequence[Item], name: str) -> tuple[Fields, dict[str, Tensor]]:
    """[P * 2 * layers * heads * size]: positions first, then key and value of layer 0, of layer 1 ..."""
    memories = [site.name for site in sites.values() if site.port == "mem"]
    if any(sites[memory].stack for memory in memories) or {site.name for site, _, _ in items} != set(memories):
        raise ModuleError("a prefix is written for all layers of a model with one stack")
    by_site = {site.name: ours for site, _, ours in items}
    form = items[0][1].form
    plain = isinstance(form, Attend) and form.reparameterise is None and form.factor is None and form.mix == "shared"
    if not isinstance(form, Attend) or not plain or any(patch.form != form for _, patch, _ in items):
        raise ModuleError("adapters holds plain keys and values of one length in the attention's own softmax; flatten the module: host.extract(name, flatten=True)")
    blocks = torch.stack([by_site[memory][leaf] for memory in memories for leaf in ("keys", "values")])
    config = {"architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": True, "dropout": form.dropout, "encoder_prefix": True, "flat": True,
              "init_weights_seed": None, "leave_out": [], "non_linearity": "tanh", "prefix_length": form.length, "shared_gating": True,
              "use_gating": False}  # fmt: skip
    return config, {f"prefix_tuning.prefix_tunings.{name}.self_prefix.control_trans": blocks.permute(2, 0, 1, 3).reshape(-1)}
