"""`read_peft`: a folder written by peft as a module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import METHODS, Policy
from intarsia.modules.card import Card
from intarsia.modules.module import Module
from intarsia.patches import Add, Affine, Diag, FormSpec, LowRank, Matrix, OpSpec, Rot, Sparse
from intarsia.sites.address import Site, SiteMap
from intarsia.sites.fingerprint import Fingerprint
from intarsia.store.convert.detect import CONFIG, WEIGHTS
from intarsia.store.convert.folder import as_float, read_config, read_tensors, sound
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.peft_config import Config, check
from intarsia.store.convert.peft_heads import of_heads, read_head
from intarsia.store.convert.peft_kind import Layer
from intarsia.store.convert.peft_kinds import KINDS, STARTS, rebased
from intarsia.store.convert.peft_origin import kept
from intarsia.store.convert.peft_prompts import EMBEDDINGS, PROMPTS, Read, read_adaption, read_prompt
from intarsia.store.convert.pieces import Piece, sparse_leaves, together
from intarsia.store.convert.report import Report
from intarsia.store.convert.values import base_value, change_at, exact_change

PREFIX = "base_model.model."
#: names under which peft stores a parameter's new value itself, below the module it belongs to
VALUES = {"weight": "weight", "bias": "bias", "base_layer.bias": "bias", "base_layer.weight": "weight", "ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
ROWS = "trainable_tokens_delta"
#: tensors that belong to the whole file
_SHARED = {"VERA": ("vera_A", "vera_B"), "PVERA": ("pvera_A", "pvera_B"), "RANDLORA": ("randlora_A", "randlora_B"), "VBLORA": ("vblora_vector_bank",)}


@dataclass
class _Reading:
    """A file while it is being read."""

    config: Config
    paths: Paths
    shared: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None
    pieces: list[Piece] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    carried: int = 0
    heads: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def read_peft(
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base: Fingerprint,
    name: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    model: PreTrainedModel | None = None,
    allow_pickle: bool = False,
) -> tuple[Module, Report]:
    """Read `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        sites: of the model it is for, `resolve(model)`.
        base: fingerprint of that model; the file does not say which it belongs to.
        name: of the module; None for the folder's name.
        weights: `model.state_dict()`.  peft stores the new value of a head, norm or bias, and a module its change; without
            the base's value such tensors are left out and reported.
        model: the model itself; prefixes are for positions that it knows (see `peft_prompts.py`).
        allow_pickle: where there is only `adapter_model.bin`, open it in a restricted process (with a warning).

    Raises:
        StoreError: a file is missing; pickled weights are refused unless allowed.
        ModuleError: unknown field, method or tensor; a layer that the model lacks; layers of the model that the file lacks.
    """
    path = Path(folder)
    with sound(os.fspath(folder)):
        raw = read_config(path, CONFIG)
        config = check(raw, str(path / CONFIG))
        return assemble(config, read_tensors(path, *WEIGHTS["peft"], allow_pickle), sites, base, name or path.resolve().name, weights, str(folder), model)


def assemble(
    config: Config,
    found: Mapping[str, Tensor],
    sites: SiteMap,
    base: Fingerprint,
    name: str,
    weights: Mapping[str, Tensor] | None,
    source: str,
    model: PreTrainedModel | None = None,
) -> tuple[Module, Report]:
    """A module of a configuration and the tensors of a file."""
    tensors = {key: as_float(t) if t.is_floating_point() else t for key, t in found.items()}
    inner = {key.removeprefix(PREFIX): t for key, t in tensors.items() if key.startswith(PREFIX)}
    outer = {key: t for key, t in tensors.items() if not key.startswith(PREFIX)}
    shared = {key.removeprefix("base_model."): t for key, t in outer.items()}
    if config.kind in PROMPTS:
        inner |= {key: t for key, t in shared.items() if key != EMBEDDINGS}
    reading = _Reading(config, Paths(sites, inner), shared, weights)
    if config.kind in PROMPTS:
        _add_prompt(reading, read_prompt(config, shared, sites, weights, model), 1)
    else:
        unused = sorted(key for key in shared if key not in _SHARED.get(config.kind, ()))
        if unused:
            raise ModuleError(f"{source}: tensors that belong to no layer and to no known part of {config.kind}: {listing(unused)}")
        reading.carried += len(shared)
    if config.kind == "ADAPTION_PROMPT":
        _add_prompt(reading, read_adaption(inner, sites, weights), len(inner))
        inner = {}
    layers = _by_layer(reading, inner, source)
    for path, members in layers.items():
        _read_layer(reading, path, members)
    if config.kind not in (*PROMPTS, "ADAPTION_PROMPT"):
        _check_complete(reading, layers)
    labels = _read_heads(reading, model)
    if not reading.pieces:
        raise ModuleError(f"{source}: nothing in it can be carried: {'; '.join(reading.left_out) or 'it holds no tensors'}")
    method, ours = together(_method_name(config), reading.pieces, _policy(config), f"peft {config['peft_version']}, {config.kind}")
    text = f"Read from files of peft {config['peft_version']}."
    card = Card(base=str(config["base_model_name_or_path"] or ""), method=method.name, description=text, recipe=kept(config.values, found))
    module = Module(name, method, ours, base, labels, card=card)
    return module, Report(source, config.kind, reading.carried, tuple(reading.left_out), tuple(reading.notes))


def _add_prompt(reading: _Reading, prompt: Read, carried: int) -> None:
    reading.carried += carried
    reading.pieces += prompt.pieces
    reading.notes |= dict.fromkeys(prompt.notes)


def _method_name(config: Config) -> str:
    if config.kind == "LORA":
        return "dora" if config["use_dora"] else "rslora" if config["use_rslora"] else "lora"
    return {"LN_TUNING": "ln", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}.get(config.kind, config.kind.lower())


def _policy(config: Config) -> Policy:
    name = _method_name(config)
    return Policy(learning_rate=METHODS[name].build().policy.learning_rate) if name in METHODS else Policy()


def _read_heads(reading: _Reading, model: PreTrainedModel | None) -> tuple[str, ...] | None:
    """A head for a model without one, and its label names."""
    if not reading.heads:
        return None
    known = of_heads(reading.heads)
    prompted = any(piece.port == "seq" for piece in reading.pieces)
    name, config = reading.paths.sites.model, None if model is None else model.config
    found = read_head(reading.config["task_type"], {key: reading.heads[key] for key in known}, name, config) if known else None
    if found is not None and prompted and getattr(found[0].form, "pooling", "") == "first":
        found = None
    lost = [key for key in reading.heads if found is None or key not in known]
    reading.left_out += [f"{key} {tuple(reading.heads[key].shape)}: this model has no such module; load the class with that head, or train a head here" for key in lost]
    if found is None:
        return None
    piece, labels = found
    reading.pieces.append(piece)
    reading.carried += len(known)
    reading.notes[f"its head answers by {len(labels)} labels, whose names peft's files do not hold: {listing(labels, 4)}"] = None
    return labels


def _without_copies(reading: _Reading, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that peft keeps twice when it keeps all biases: of a saved module, and of the base's own in its place."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = key.replace(".modules_to_save.default.", ".")
        if ".original_module." in f".{key}" or (plain != key and torch.equal(tensors.get(plain, tensor), tensor) and plain in tensors):
            reading.carried += 1
            reading.notes["tensors that peft keeps twice are read once"] = None
        else:
            found[key] = tensor
    return found


def _by_layer(reading: _Reading, tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by module path of the model; heads that the model lacks are left out, other strangers refused."""
    layers: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    saved = reading.config.get("modules_to_save") or ()
    for key, tensor in _without_copies(reading, tensors).items():
        found = reading.paths.split(key)
        if found is not None and found[1]:
            layers.setdefault(found[0], {})[found[1]] = tensor
        elif any(f".{word}." in f".{key}" for word in saved):
            reading.heads[key] = tensor
        else:
            strange.append(key)
    if strange:
        raise ModuleError(
            f"{source}: {len(strange)} of {len(tensors)} tensors are for modules that {reading.paths.sites.model} lacks: {listing(strange, 4)}; "
            "is this the model it was trained on?"
        )
    return layers


def _read_layer(reading: _Reading, path: str, tensors: dict[str, Tensor]) -> None:
    tensors = dict(tensors)
    if reading.config.kind == "TRAINABLE_TOKENS" and ROWS in tensors:
        _read_rows(reading, path, tensors.pop(ROWS), reading.config["token_indices"])
    if f"token_adapter.{ROWS}" in tensors:
        _read_rows(reading, path, tensors.pop(f"token_adapter.{ROWS}"), _chosen(reading, path))
    rest = set(tensors)
    if not rest <= VALUES.keys():
        site = reading.paths.weight(path)
        shape = tuple(reversed(site.shape)) if site.transposed else site.shape
        if len(shape) != 2:
            raise ModuleError(f"{path}: the weight there has shape {site.shape}; only matrices are read ({listing(sorted(rest))})")
        layer = rebased(reading.config, Layer(path, (shape[0], shape[1]), tensors, reading.shared, _weight(reading, site)))
        if layer.added:
            reading.notes[_start_note(str(reading.config["init_lora_weights"]))] = None
        if reading.config.kind == "ADALORA" and "lora_E" in tensors and not len(tensors["lora_E"]):
            reading.carried += 3
            return  # all ranks of this layer were pruned
        if "lora_embedding_A" in tensors and len(site.owners) > 1:
            if path == "shared":
                reading.carried += 2
                reading.notes[f"peft's forward never uses its change of {path}, which the stacks read under names of their own; it is not carried"] = None
                return
            reading.notes[f"peft changes what {path} looks up and not the head that is tied to it; here both change, so logits differ"] = None
        for kind in KINDS:
            if not kind.takes(reading.config, layer):
                continue
            rest -= kind.uses(layer)
            reading.carried += len(kind.uses(layer))
            form, op = kind.read(reading.config, layer)
            if kind.note:
                reading.notes[kind.note] = None
            ours = kind.ours(reading.config, layer)
            if kind.port == "out" and path not in reading.paths.out and isinstance(form, Affine) and isinstance(form.factor, LowRank) and isinstance(op, Add):
                reading.pieces.append(Piece(site.name, kind.patch, Matrix(form.factor), op, "weight", ours))  # a layer inside the head
            elif kind.port == "out":
                reading.pieces.append(Piece(reading.paths.linear(path).name, kind.patch, form, op, "out", ours))
            elif kind.port == "weight":
                reading.pieces.append(Piece(site.name, kind.patch, form, op, "weight", ours))
            else:
                reading.pieces.append(_at_entry(reading, path, kind.patch, form, op, ours))
    for name in sorted(rest & VALUES.keys()):
        _read_value(reading, path, VALUES[name], tensors[name])
        rest.discard(name)
    if rest:
        raise ModuleError(f"{path}: tensors that {reading.config.kind} does not have, or that lack their partner: {listing(sorted(rest))}")


def _weight(reading: _Reading, site: Site) -> Tensor | None:
    """The base's own weight at a site, [out, in]."""
    found = None if reading.weights is None else reading.weights.get(f"{site.path}.{site.param}")
    return None if found is None else found.detach().cpu().T if site.transposed else found.detach().cpu()


def _start_note(start: str) -> str:
    text = f"it starts from {start!r}: what peft takes from the base's weights when it loads the file is in the module, at twice the rank"
    return text if start in STARTS else f"{text}; peft finds it by random numbers, anew at each load, and here it is the exact one"


def _chosen(reading: _Reading, path: str) -> object:
    """Which rows of an embedding are trained beside a LoRA: a list for the input embedding, or a list for each named module."""
    named = reading.config.get("trainable_token_indices")
    if not isinstance(named, Mapping):
        return named
    words = {path, *(owner for owner, _ in reading.paths.weight(path).owners)}
    return next((chosen for name, chosen in named.items() if any(word == name or word.endswith(f".{name}") for word in words)), None)


def _read_rows(reading: _Reading, path: str, rows: Tensor, chosen: object) -> None:
    """New rows [n, d] of an embedding, which every matrix tied to it repeats: a sparse change of the one parameter."""
    site = reading.paths.weight(path)
    known = reading.rows.get(site.name)
    if known is not None and not torch.equal(known, rows):
        raise ModuleError(f"{path}.{ROWS} differs from the same rows of a matrix tied to it")
    reading.carried += 1
    if known is not None:
        return
    if any(owner != path and (owner, "bias") in reading.paths.params for owner, _ in site.owners):
        reading.notes["peft 0.21 loses the bias of a head that is tied to an embedding with trained rows, and its logits differ by it"] = None
    reading.rows[site.name] = rows
    if reading.weights is None:
        reading.left_out.append(f"{path}.{ROWS} {tuple(rows.shape)}: peft stores new rows and a module their change; give weights=model.state_dict() to carry it")
        return
    if len(site.shape) != 2 or site.transposed or not isinstance(chosen, list) or not all(type(i) is int and 0 <= i < site.shape[0] for i in chosen):
        raise ModuleError(f"{path}: token_indices={str(chosen)[:80]} are no list of rows of a matrix of shape {site.shape}")
    index = torch.tensor(chosen, dtype=torch.int64)
    width = site.shape[1]
    if len(index.unique()) != len(index) or tuple(rows.shape) != (len(index), width):
        raise ModuleError(f"{path}.{ROWS} has shape {tuple(rows.shape)}; {len(chosen)} different rows of {width} are expected")
    index, order = index.sort()
    change = exact_change(rows[order], base_value(reading.weights, site)[index])
    flat = (index[:, None] * width + torch.arange(width)).flatten()
    form = Matrix(Sparse(max(len(index), 1) / site.shape[0]))
    reading.pieces.append(Piece(site.name, "rows", form, Add(), "weight", sparse_leaves(flat, change.flatten(), site.shape[0] * width)))


def _at_entry(reading: _Reading, path: str, name: str, form: FormSpec, op: OpSpec, ours: dict[str, Tensor]) -> Piece:
    """A rescaled input; where the input is no site, the same as a change of the weight's columns."""
    site = reading.paths.entry(path)
    if site is not None:
        return Piece(site.name, name, form, op, "in", ours)
    return Piece(reading.paths.weight(path).name, f"{name}put", Affine(Diag(1.0), read="self"), Rot(), "weight", {"factor.value": ours["value"]})


def _read_value(reading: _Reading, path: str, param: str, value: Tensor) -> None:
    """A parameter's new value, as the difference from the base's."""
    site = reading.paths.weight(path, param)
    if reading.weights is None:
        reading.left_out.append(
            f"{path}.{param} {tuple(value.shape)}: peft stores its new value and a module its change; give weights=model.state_dict() to carry it"
        )
        return
    change = change_at(site, value, base_value(reading.weights, site, value))
    reading.carried += 1
    if not change.any():
        return
    tag = "norm" if path.split(".")[-1] in (reading.config.get("target_modules") or ()) and reading.config.kind == "LN_TUNING" else ""
    saved = path.split(".")[-1] in (reading.config.get("modules_to_save") or ())
    name = "norm" if tag else "saved" if saved else "bias"
    reading.pieces.append(Piece(site.name, name, Matrix(), Add(), "weight", {"factor.value": change}, tag or ("head" if saved else "")))


def _check_complete(reading: _Reading, layers: Mapping[str, object]) -> None:
    """Layers that the configuration names and the file lacks; only where the configuration names them by plain ends."""
    config = reading.config
    targets = config["target_modules"]
    if not isinstance(targets, list) or any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        reading.notes["which layers it is for is given by a pattern, so that missing ones cannot be told from unwanted ones"] = None
        return
    named = [p for p in reading.paths.out if any(p == t or p.endswith(f".{t}") for t in targets)]
    missing = [path for path in named if path not in layers]
    if missing:
        raise ModuleError(f"the file lacks {len(missing)} of {len(named)} layers that its configuration names: {listing(missing, 4)}")
