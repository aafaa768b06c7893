"""`read_adapterhub`: a folder written by AdapterHub's `adapters` (1.x) as a module.

With h the sub-layer's output and x its skip connection, a bottleneck there is one of ours at the same place:

| theirs | ours |
|---|---|
| `original_ln_before`, `residual_before_ln=True` (seq_bn) | reads `normed`, adds to h |
| neither LN (double_seq_bn) | reads `self`, adds to h |
| `is_parallel` (par_bn) | reads `residual` (also in pre-LN models, where the paper reads what the sub-layer reads) |
| `residual_before_ln=False` | its own skip connection is what it reads |
| `original_ln_after=False` behind `original_ln_before` | at the layer norm's output |

LoRA and its kin are in `adapterhub_lora.py`, heads in `adapterhub_heads.py`, all else (prefixes, prompts, ReFT, invertible adapters,
hypercomplex layers) in `adapterhub_kinds.py`.  What has no equal here is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, listing, nearest
from intarsia.modules.card import Card
from intarsia.modules.module import Module
from intarsia.patches import Add, Bottleneck, Dense, FactorSpec, FormSpec, Gated, Scaled
from intarsia.sites.address import Site, SiteMap
from intarsia.sites.fingerprint import Fingerprint
from intarsia.store.convert.adapterhub_heads import read_head
from intarsia.store.convert.adapterhub_kinds import (
    Reading,
    Slots,
    activation,
    hypercomplex,
    invertible,
    prefixes,
    prompts,
    refts,
    site_at,
)
from intarsia.store.convert.adapterhub_legacy import modern, renamed
from intarsia.store.convert.adapterhub_lora import loras
from intarsia.store.convert.detect import CONFIG, HEAD_CONFIG, WEIGHTS
from intarsia.store.convert.folder import as_float, check_fields, read_config, read_tensors, sound
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.pieces import Piece, together
from intarsia.store.convert.report import Report

#: where bottlenecks hang, by the end of the key in front of `.adapters.NAME.`: our sub-layer
SLOTS: Slots = tuple((re.compile(rf"(?:\w+\.)?{pattern}"), site) for pattern, site in (
    (r"encoder\.layer\.(\d+)\.attention\.output", "{}.attn"),
    (r"encoder\.layer\.(\d+)\.output", "{}.ffn"),
    (r"(?:h|layers|transformer\.layer)\.(\d+)\.attention_adapters", "{}.attn"),
    (r"(?:h|layers|transformer\.layer)\.(\d+)\.output_adapters", "{}.ffn"),
    (r"encoder\.block\.(\d+)\.layer\.0", "encoder.{}.attn"),
    (r"encoder\.block\.(\d+)\.layer\.1", "encoder.{}.ffn"),
    (r"decoder\.block\.(\d+)\.layer\.0", "decoder.{}.attn"),
    (r"decoder\.block\.(\d+)\.layer\.1", "decoder.{}.xattn"),
    (r"decoder\.block\.(\d+)\.layer\.2", "decoder.{}.ffn"),
    (r"(encoder|decoder)\.layers\.(\d+)\.attention_adapters", "{}.{}.attn"),
    (r"(encoder|decoder)\.layers\.(\d+)\.cross_attention_adapters", "{}.{}.xattn"),
    (r"(encoder|decoder)\.layers\.(\d+)\.output_adapters", "{}.{}.ffn"),
))  # fmt: skip
_TRAINING = {"dropout", "init_weights", "init_weights_seed", "stochastic_depth", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init",
             "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "factorized_phm_W", "factorized_phm_rule", "dtype",
             "bottleneck_size"}  # fmt: skip
_BOTTLENECK = {"adapter_residual_before_ln", "cross_adapter", "inv_adapter", "inv_adapter_reduction_factor", "is_parallel", "leave_out", "ln_after",
               "ln_before", "mh_adapter", "non_linearity", "original_ln_after", "original_ln_before", "output_adapter", "phm_layer",
               "reduction_factor", "residual_before_ln", "scaling", "use_gating"}  # fmt: skip
_LORA = {"alpha", "attn_matrices", "composition_mode", "intermediate_lora", "leave_out", "output_lora", "r", "selfattn_lora", "use_dora", "use_gating",
         "vera_b", "vera_d"}  # fmt: skip
_PREFIX = {"cross_prefix", "encoder_prefix", "flat", "leave_out", "non_linearity", "prefix_length", "shared_gating", "use_gating"}
_PROMPT = {"combine", "prompt_init", "prompt_init_text", "prompt_length", "random_uniform_scale"}
_REFT = {"layers", "non_linearity", "orthogonality", "output_reft", "prefix_positions", "r", "suffix_positions", "tied_weights"}
FIELDS: Mapping[str, set[str]] = {"bottleneck": _BOTTLENECK, "lora": _LORA, "prefix_tuning": _PREFIX, "prompt_tuning": _PROMPT, "reft": _REFT}
TOP = {"config", "config_id", "hidden_size", "model_class", "model_name", "model_type", "name", "type", "version"}


def read_adapterhub(
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base: Fingerprint,
    name: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
    subtract: bool | None = None,
    allow_pickle: bool = False,
) -> tuple[Module, Report]:
    """Read `adapter_config.json` and `adapter.safetensors`, and the head beside them.

    Args:
        sites: of the model it is for, `resolve(model)`.
        base: fingerprint of that model; the file does not say which it belongs to.
        name: of the module; None for the adapter's.
        weights: `model.state_dict()`, for language-model heads (tied or not) and heads of a model class of transformers.
        config: `model.config`, for what heads leave to the model (epsilon of norms, dropout).
        subtract: whether an edit (ReFT) subtracts what stood in its subspace: False for a DiReFT, which files do not tell from a
            NoReFT; None for what adapters makes of the file.
        allow_pickle: where there is only `pytorch_adapter.bin`, open it in a restricted process (with a warning).

    Raises:
        StoreError: a file is missing; pickled weights are refused unless allowed.
        ModuleError: a field, method or tensor that is not understood, or a layer that the model lacks.
    """
    with sound(os.fspath(folder)):
        return _read(Path(folder), sites, base, name, weights, config, subtract, allow_pickle)


def _read(
    folder: Path, sites: SiteMap, base: Fingerprint, name: str | None, weights: Mapping[str, Tensor] | None, model: Any, subtract: bool | None, allow_pickle: bool
) -> tuple[Module, Report]:
    raw = read_config(folder, CONFIG)
    source = str(folder / CONFIG)
    check_fields(raw, TOP, f"{source}: a configuration of adapters")
    raw, note = modern(raw, source)
    config, adapter, version = raw["config"], raw.get("name"), str(raw.get("version") or "adapter-transformers")
    if not isinstance(adapter, str) or not adapter:
        raise ModuleError(f"{source}: 'name' is a string, found {adapter!r}")
    tensors = renamed({key: as_float(t) for key, t in read_tensors(folder, *WEIGHTS["adapterhub"], allow_pickle).items()})
    modules = [key.partition(f".loras.{adapter}.")[0] for key in tensors if f".loras.{adapter}." in key]
    reading = Reading(adapter, Paths(sites, modules), sites, tensors, subtract=subtract)
    reading.notes |= {note: None} if note else {}
    parts = config["configs"] if config.get("architecture") == "union" else [config]
    kinds = [str(part.get("architecture") or "bottleneck") for part in parts]
    if len(set(kinds)) != len(kinds):
        raise ModuleError(f"{source}: a union of {listing(kinds)}; two of one kind cannot be told apart by their keys")
    for kind, part in zip(kinds, parts):
        _check(kind, part, source)
        {"bottleneck": _bottlenecks, "lora": loras, "prefix_tuning": prefixes, "prompt_tuning": prompts, "reft": refts}[kind](reading, part)
    if reading.tensors:
        raise ModuleError(f"{folder}: {len(reading.tensors)} tensors that its configuration does not explain: {listing(sorted(reading.tensors), 4)}")
    if not reading.pieces:
        raise ModuleError(f"{folder}: it holds no tensors of adapter {adapter!r}")
    labels: tuple[str, ...] | None = None
    left_out: list[str] = []
    if (folder / HEAD_CONFIG).exists():
        labels, left_out = read_head(reading, folder, allow_pickle, str(raw.get("model_type")), weights, model)
    method, ours = together("+".join(kinds), reading.pieces, source=f"adapters {version.removeprefix('adapters.')}, {'+'.join(kinds)}")
    card = Card(base=str(raw.get("model_name") or ""), method=method.name, description=f"Read from files of {version}.")
    module = Module(name or adapter, method, {**ours, **reading.tied}, base, labels=labels, card=card)
    return module, Report(str(folder), "+".join(kinds), reading.carried, tuple(left_out), tuple(reading.notes))


def _check(kind: str, config: Mapping[str, Any], source: str) -> None:
    """Refuse methods and fields that are not understood."""
    if kind not in FIELDS:
        raise ModuleError(f"{source}: architecture {kind!r} is not read{nearest(kind, FIELDS)}; read are {listing(FIELDS)}")
    check_fields(config, FIELDS[kind] | _TRAINING | {"architecture"}, f"{source}: {kind}")
    for key in ("shared_W_phm", "factorized_phm_rule"):
        if config.get(key) and config.get("phm_layer"):
            raise ModuleError(f"{source}: {key}={config[key]!r} of hypercomplex layers is not read")


def site_of(reading: Reading, slot: str) -> Site:
    """The sub-layer that a key's front part names."""
    return site_at(reading, SLOTS, slot, "adapters")


def _bottlenecks(reading: Reading, config: Mapping[str, Any]) -> None:
    if config.get("inv_adapter"):
        invertible(reading, config)
    for slot, leaves in reading.groups("adapters").items():
        site = site_of(reading, slot)
        lead = f"{slot}.adapters.{reading.name}."
        first = "adapter_down.1" if config["ln_before"] else "adapter_down.0"
        names: dict[str, str] = {}
        if not config["phm_layer"]:
            names = {f"{first}.weight": "down.value", f"{first}.bias": "down_bias", "adapter_up.weight": "up.value", "adapter_up.bias": "up_bias"}
        if config["ln_before"]:
            for leaf in ("weight", "bias"):
                names[f"adapter_norm_before.{leaf}"] = f"norm_in.{leaf}"
                if f"adapter_down.0.{leaf}" in leaves and not torch.equal(
                    reading.take(f"{lead}adapter_down.0.{leaf}"), reading.tensors[f"{lead}adapter_norm_before.{leaf}"]
                ):
                    raise ModuleError(f"{lead}adapter_down.0.{leaf} is not the copy of adapter_norm_before.{leaf} that it should be")
        if config["ln_after"]:
            names |= {f"adapter_norm_after.{leaf}": f"norm_out.{leaf}" for leaf in ("weight", "bias")}
        missing = [name for name in names if lead + name not in reading.tensors]
        if missing:
            raise ModuleError(f"{lead}: tensors are missing: {listing(missing)}")
        ours = {our: reading.take(lead + theirs) for theirs, our in names.items()}
        factor: FactorSpec = Dense()
        if config["phm_layer"]:
            factor, products = hypercomplex(reading, config, lead, first)
            ours |= products
        reading.pieces.append(_bottleneck(reading, config, site, lead, ours, factor))


def _bottleneck(
    reading: Reading, config: Mapping[str, Any], site: Site, lead: str, ours: dict[str, Tensor], factor: FactorSpec
) -> Piece:
    before, after, residual = config["original_ln_before"], config["original_ln_after"], config["residual_before_ln"]
    parallel, scaling = config["is_parallel"], config["scaling"]
    if residual == "post_add" or (not after and (parallel or not before or residual)):
        raise ModuleError(f"residual_before_ln={residual!r} with original_ln_before={before}, original_ln_after={after} adds the skip connection in a way no adapter here does")
    own = "self"
    if config["ln_after"] and not parallel and config["adapter_residual_before_ln"]:
        own = "inside"
    elif not residual and not parallel and before and after:
        own = "read"
    read = "residual" if parallel else "normed" if before else "self"
    if not after and site.norm is not None:  # a post-LN model whose last norm is left out: behind the norm
        site, read = reading.sites[f"{site.name}.norm"], "self"
    if own == "inside" and (before or scaling != 1.0):
        raise ModuleError("adapter_residual_before_ln under ln_after is read only without original_ln_before and with scaling 1")
    norm = {(False, False): "none", (True, False): "in", (False, True): "out", (True, True): "both"}[bool(config["ln_before"]), bool(config["ln_after"])]
    form: FormSpec = Bottleneck(
        len(ours["down_bias"]), activation=activation(config["non_linearity"]), read=read, dropout=float(config["dropout"]),  # type: ignore[arg-type]
        norm=norm, residual=own, factor=factor,  # type: ignore[arg-type]
    )  # fmt: skip
    scale = 1.0
    if config["use_gating"]:
        if own != "self" or norm in ("out", "both") or scaling == "learned":
            raise ModuleError("a gated adapter is read only with its plain skip connection, without a norm behind it and with a fixed scaling")
        form = Gated(form, read, masked=False)  # type: ignore[arg-type]
        ours = {f"inner.{leaf}": tensor for leaf, tensor in ours.items()}
        ours |= {"gate": reading.take(f"{lead}gate.weight")[0], "gate_bias": reading.take(f"{lead}gate.bias")}
    if scaling == "learned":
        if own != "self" or norm in ("out", "both"):
            raise ModuleError("a learned scaling inside a norm or beside another skip connection is not read")
        form = Scaled(form)
        ours = {**{f"inner.{leaf}": tensor for leaf, tensor in ours.items()}, "scale": reading.take(f"{lead}scaling")}
    elif isinstance(scaling, int | float) and not isinstance(scaling, bool):
        scale = float(scaling)
    else:
        raise ModuleError(f"scaling={scaling!r} is not read; a number or 'learned' is")
    if scale != 1.0 and (own != "self" or norm in ("out", "both")):
        raise ModuleError(f"scaling={scale} inside a norm or beside another skip connection is not read")
    return Piece(site.name, "adapter", form, Add(scale), "out", ours)
