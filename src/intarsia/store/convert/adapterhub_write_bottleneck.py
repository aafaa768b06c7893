"""Bottleneck adapters, Compacter and invertible adapters as tensors and fields of AdapterHub's `adapters`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import Patch
from intarsia.patches import Add, Bottleneck, Coupling, Dense, Gated, Kron, Scaled
from intarsia.sites.address import Site
from intarsia.store.convert.adapterhub import SLOTS
from intarsia.store.convert.adapterhub_kinds import COUPLING, THEIRS
from intarsia.store.convert.adapterhub_legacy import DEFAULTS
from intarsia.store.convert.adapterhub_parts import Fields, Item, Writing, inner, one

#: the slot of a sub-layer from our path of it
_SLOT_OF: Sequence[tuple[re.Pattern[str], str]] = tuple((re.compile(pattern), slot) for pattern, slot in (
    (r"(.*encoder\.layer\.\d+\.attention\.output)\.\w+", "{}"), (r"(.*encoder\.layer\.\d+\.output)\.\w+", "{}"),
    (r"((?:en|de)coder\.block\.\d+\.layer\.\d)\.\w+", "{}"),
    (r"(.*(?:h|layers)\.\d+)\.(?:attn|self_attn)", "{}.attention_adapters"), (r"(.*layers\.\d+)\.encoder_attn", "{}.cross_attention_adapters"),
    (r"(.*(?:h|layers)\.\d+)\.(?:mlp|fc2)", "{}.output_adapters"),
    (r"(.*transformer\.layer\.\d+)\.attention(?:\.out_lin)?", "{}.attention_adapters"), (r"(.*transformer\.layer\.\d+)\.ffn(?:\.lin2)?", "{}.output_adapters"),
))  # fmt: skip
_BOTTLENECK: Mapping[str, Any] = {
    **DEFAULTS["bottleneck"], "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None, "learn_phm": True,
    "mh_adapter": False, "non_linearity": "relu", "output_adapter": False, "phm_bias": True, "phm_c_init": "normal", "phm_init_range": 0.0001,
    "reduction_factor": 16, "stochastic_depth": 0.0,
}  # fmt: skip


def bottlenecks(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """Adapters of all layers, the invertible one at the embeddings among them."""
    sites, name = writing.sites, writing.name
    couplings = [item for item in items if isinstance(item[1].form, Coupling)]
    items = [item for item in items if not isinstance(item[1].form, Coupling)]
    tensors: dict[str, Tensor] = {}
    fields: list[Fields] = []
    widths: dict[tuple[str, int], set[int]] = {}
    used: dict[str, set[tuple[str, int]]] = {}
    hidden = 0
    for site, patch, ours in items:
        behind = site.name.endswith(".norm")
        place = sites[site.name.removesuffix(".norm")] if behind else site
        slot, kind = slot_of(place)
        found, renamed = _bottleneck(writing, site, patch, ours, behind)
        fields.append(found)
        key = (place.stack, int(place.layer or 0))
        widths.setdefault(key, set()).add(_width(renamed))
        hidden = place.features
        if key in used.setdefault(kind, set()):
            raise ModuleError(f"{site.name}: two adapters at one place; adapters has one of a name there")
        used[kind].add(key)
        tensors |= {f"{slot}.adapters.{name}.{leaf}": tensor for leaf, tensor in renamed.items()}
    config = {**_BOTTLENECK, **(one(fields, "adapters") if fields else {})}
    for kind, flag in (("attn", "mh_adapter"), ("ffn", "output_adapter"), ("xattn", "cross_adapter")):
        config[flag] = kind in used
    layers = {key: number for number, key in enumerate(writing.numbers())}
    every = set(widths)
    uneven = [kind for kind, where in used.items() if where != (every if kind != "xattn" else {k for k in every if k[0] == "decoder"})]
    if uneven or any(len(found) > 1 for found in widths.values()):
        raise ModuleError(f"layers with adapters of {listing(sorted(used))} do not have them all, or of unlike width; one configuration cannot say so")
    config["leave_out"] = [number for key, number in layers.items() if key not in every]
    if couplings:
        found, renamed = _coupling(writing, couplings)
        if fields and found["non_linearity"] != config["non_linearity"]:
            raise ModuleError(f"one configuration has one non-linearity, here are {found['non_linearity']!r} (invertible) and {config['non_linearity']!r}")
        config |= found
        tensors |= renamed
    if not fields:
        return config, tensors
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


def slot_of(site: Site) -> tuple[str, str]:
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


def _bottleneck(writing: Writing, site: Site, patch: Patch, ours: Mapping[str, Tensor], behind: bool) -> tuple[Fields, dict[str, Tensor]]:
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
        ours = inner(ours)
        form = form.form
    plain = isinstance(form, Bottleneck) and isinstance(form.factor, Dense | Kron) and form.vectors is None and isinstance(op, Add)
    if not plain or not isinstance(form, Bottleneck) or form.activation not in THEIRS or (fields["scaling"] == "learned" and op != Add()):
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
               "non_linearity": THEIRS[form.activation], "dropout": form.dropout, "ln_before": form.norm in ("in", "both"),
               "ln_after": form.norm in ("out", "both")}  # fmt: skip
    fields |= found
    first = "adapter_down.1" if fields["ln_before"] else "adapter_down.0"
    if isinstance(form.factor, Kron):
        found, products, ours = _hypercomplex(writing, form.factor, first, ours)
        fields |= found
        extra |= products
    names = {"down.value": f"{first}.weight", "down_bias": f"{first}.bias", "up.value": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    for leaf in ("weight", "bias"):
        names |= {f"norm_in.{leaf}": f"adapter_norm_before.{leaf}", f"norm_out.{leaf}": f"adapter_norm_after.{leaf}"}
    renamed = {names[leaf]: tensor for leaf, tensor in ours.items()}
    for leaf in ("weight", "bias"):  # the same tensor stands there twice
        if fields["ln_before"]:
            renamed[f"adapter_down.0.{leaf}"] = renamed[f"adapter_norm_before.{leaf}"].clone()
    return fields, {**renamed, **extra}


def _width(renamed: Mapping[str, Tensor]) -> int:
    """Of the narrow layer."""
    if "adapter_up.weight" in renamed:
        return renamed["adapter_up.weight"].shape[1]
    last = renamed["adapter_up.W_left" if "adapter_up.W_left" in renamed else "adapter_up.W"]
    return last.shape[0] * last.shape[1]


def _hypercomplex(writing: Writing, factor: Kron, first: str, ours: Mapping[str, Tensor]) -> tuple[Fields, dict[str, Tensor], dict[str, Tensor]]:
    """Kronecker factors, transposed since x stands on the left there; a shared rule is written once."""
    left = dict(ours)
    found: dict[str, Tensor] = {}
    for theirs, side in ((first, "down"), ("adapter_up", "up")):
        found[f"{theirs}.b"] = left.pop(f"{side}_bias")
        right = left.pop(f"{side}.up").transpose(1, 2).contiguous()
        if factor.rank is None:
            found[f"{theirs}.W"] = right
        else:
            found |= {f"{theirs}.W_right": right, f"{theirs}.W_left": left.pop(f"{side}.down").transpose(1, 2).contiguous()}
        if not factor.share:
            found[f"{theirs}.phm_rule"] = left.pop(f"{side}.rule.left").transpose(1, 2).contiguous()
    fields = {"phm_layer": True, "phm_dim": factor.n, "phm_rank": factor.rank or 1, "factorized_phm_W": factor.rank is not None, "shared_phm_rule": factor.share}
    return fields, found, left


def _coupling(writing: Writing, couplings: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """The invertible adapter; of two stacks adapters changes the encoder's embeddings only."""
    encoder = "encoder.stem" in writing.sites
    odd = [site.name for site, _, _ in couplings if site.name != ("encoder.stem" if encoder else "stem")]
    form = couplings[0][1].form
    assert isinstance(form, Coupling)
    if odd or form.activation not in THEIRS:
        why = f"it stands at {listing(odd)} too, and adapters changes the encoder's embeddings only (stem='encoder.stem')" if odd else f"it has the activation {form.activation!r}"
        raise ModuleError(f"the invertible adapter has no form in adapters: {why}")
    lead = f"{writing.lead}{'encoder.' if encoder else ''}invertible_adapters.{writing.name}."
    reduction = int(form.reduction) if form.reduction == int(form.reduction) else form.reduction
    fields = {"inv_adapter": "nice", "inv_adapter_reduction_factor": reduction, "non_linearity": THEIRS[form.activation]}
    return fields, {lead + theirs: writing.tied.pop(ours) for theirs, ours in COUPLING.items()}


def shared_rules(writing: Writing) -> dict[str, Tensor]:
    """The Kronecker rule that all layers share."""
    rules = [key for key in writing.tied if key.startswith("tied/kron.")]
    if len(rules) > 1:
        raise ModuleError(f"{listing(rules)}: adapters has one shared rule")
    return {f"{writing.lead}shared_parameters.{writing.name}.phm_rule": writing.tied.pop(key).transpose(1, 2).contiguous() for key in rules}
