"""`write_peft`: a module as a folder that peft (and servers that read its files) can load.

The configuration has every field that peft 0.21 writes, keys sorted; lists that peft writes in the order of a hash are sorted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, SiteError, listing
from intarsia.methods.method import Patch
from intarsia.modules.module import Module
from intarsia.patches import Add, Affine, Attend, Const, Core, Dense, Diag, Free, Head, LowRank, Matrix, Sparse, Tokens
from intarsia.sites.address import Site, SiteMap
from intarsia.store.convert.folder import as_float, json_bytes, tensor_bytes, write_folder
from intarsia.store.convert.paths import Paths, suffixes
from intarsia.store.convert.peft_config import DEFAULTS, written
from intarsia.store.convert.peft_kinds import KINDS, Fields, Kind
from intarsia.store.convert.peft_origin import narrowed, origin, same_file
from intarsia.store.convert.peft_read import CONFIG, PREFIX, ROWS, WEIGHTS, assemble
from intarsia.store.convert.report import Report

#: what peft saves and expects with each task class
TASK_HEADS: Mapping[str, tuple[str, ...]] = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
#: methods whose peft class also takes GPT-2's transposed layers
_TRANSPOSED = ("LORA", "IA3", "FOURIERFT", "HIRA", "LN_TUNING")
_ADVICE = "fold it into the base, or keep it as a module"


@dataclass
class _Layer:
    """What peft will hold for one module path."""

    kind: Kind
    fields: Fields
    tensors: dict[str, Tensor]


@dataclass
class _Writing:
    paths: Paths
    weights: Mapping[str, Tensor] | None
    uniform: bool = False
    layers: dict[str, list[tuple[Site, _Layer]]] = field(default_factory=dict)
    values: dict[tuple[str, str], tuple[Site, Tensor]] = field(default_factory=dict)
    biases: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[Site, dict[int, Tensor]]] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    replaced: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def write_peft(
    module: Module,
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    weights: Mapping[str, Tensor] | None = None,
    task_type: str | None = None,
    base_name: str | None = None,
    uniform: bool = False,
) -> Report:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the card as `README.md` into a new folder.

    Args:
        sites: of the model it is for; module paths in the file are this model's.
        weights: `model.state_dict()`, needed where peft stores a parameter's new value and the module its change.
        task_type: `CAUSAL_LM`, `SEQ_CLS` ... for peft's task classes.
        base_name: name of the base in the configuration; None for the card's.
        uniform: one rank and a scale of 1 for all layers, by zeros beside the factors and scales multiplied into them: servers
            read no patterns. Only for LoRA.

    Raises:
        ModuleError: a patch has no form in peft, or parts of it would be different methods there; nothing is written.
        StoreError: the folder already holds such files.
    """
    before = {} if uniform else origin(module)
    task_type, base_name = task_type or before.get("task_type"), base_name or before.get("base_model_name_or_path") or module.card.base or None
    writing = _Writing(Paths(sites), weights, uniform)
    prompts: dict[Patch, dict[str, dict[str, Tensor]]] = {}
    for (site_name, patch), tensors in _by_place(module, writing).items():
        if isinstance(patch.form, Tokens | Attend):
            prompts.setdefault(patch, {})[site_name] = tensors
            continue
        try:
            site = sites[site_name]
        except SiteError as error:
            raise ModuleError(f"{module.name!r} does not fit this model: {error}") from None
        _place(writing, site, patch, tensors)
    _expected_heads(writing, task_type, before.get("modules_to_save") or ())
    others = any(not site.name.startswith("head.") for site, _ in writing.values.values())
    if writing.rows and (prompts or writing.layers or writing.biases or writing.values or len(writing.rows) > 1):
        raise ModuleError(f"{module.name!r} is more than new rows of one embedding; peft keeps one method per folder; {_ADVICE}")
    if prompts and (writing.layers or writing.biases or others or len(prompts) > 1):
        raise ModuleError(f"{module.name!r} is more than a prompt or prefix; peft keeps one method per folder")
    if prompts:
        patch, found = next(iter(prompts.items()))
        kind, fields, tensors = _prompt(writing, sites, patch, found)
        tensors |= {key.replace(PREFIX, "base_model.", 1): tensor for key, tensor in _values(writing, kind, {}, fields).items()}
    elif writing.rows:
        kind, fields, tensors = _embedding_rows(writing, *next(iter(writing.rows.values())))
    else:
        kind, fields, tensors = _layers(module, writing)
    fields["task_type"] = task_type
    fields["base_model_name_or_path"] = base_name
    tensors = narrowed(module, tensors)
    config = written(kind, **fields)
    if before and same_file(module, tensors):
        earlier = {**before, "task_type": task_type, "base_model_name_or_path": base_name}
        config = earlier if _gives(earlier, tensors, module, sites, weights) else config
    for what, there in (("label names", module.labels), ("the context", module.context), ("required modules", module.requires)):
        if there:
            writing.left_out.append(f"{what} ({listing(map(str, there), 4)}): peft's files have no place for it")
    write_folder(folder, {CONFIG: json_bytes(config), WEIGHTS: tensor_bytes(tensors), "README.md": module.card.to_markdown().encode()})
    return Report(module.name, str(config["peft_type"]), len(tensors), tuple(writing.left_out), tuple(writing.notes))


def _gives(config: Mapping[str, Any], tensors: Mapping[str, Tensor], module: Module, sites: SiteMap, weights: Mapping[str, Tensor] | None) -> bool:
    """Whether a configuration with these tensors is read as the module, apart from its head."""
    try:
        again, _ = assemble(config, tensors, sites, module.base, module.name, weights, module.name)
    except ModuleError:
        return False
    patches = {patch for patch in module.method.patches if patch.port != "logits"}
    names = {patch.name for patch in patches}
    mine = {key: t for key, t in module.tensors.items() if key.partition("/")[2].partition(".")[0] in names}
    alike = again.tensors.keys() == mine.keys() and set(again.method.patches) == patches
    return alike and all(torch.allclose(as_float(t), as_float(mine[key]).to(as_float(t).dtype), rtol=1e-5, atol=1e-7) for key, t in again.tensors.items())


def _expected_heads(writing: _Writing, task_type: str | None, saved: Iterable[str]) -> None:
    """peft's task classes expect the model's own head in the file, changed or not, and so does what a file said before."""
    for word in (*TASK_HEADS.get(task_type or "", ()), *saved):
        writing.heads |= {path for path in writing.paths.known if f".{word}." in f".{path}."}


def _by_place(module: Module, writing: _Writing) -> dict[tuple[str, Patch], dict[str, Tensor]]:
    """Tensors by site and patch; a head is left out."""
    patches = {patch.name: patch for patch in module.method.patches}
    found: dict[tuple[str, Patch], dict[str, Tensor]] = {}
    for key, tensor in module.tensors.items():
        site, _, rest = key.partition("/")
        name, _, leaf = rest.partition(".")
        if site == "tied" or name not in patches:
            raise ModuleError(f"{key!r} is shared by all sites; peft has no place for it. Take the module with host.extract(name, flatten=True)")
        if patches[name].port == "logits" and _token_head(writing, patches[name], module, site, name):
            continue
        if patches[name].port == "logits":
            text = f"{key} {tuple(tensor.shape)}: a head on the final hidden states; peft keeps only the model class's own"
            writing.left_out.append(text)
            continue
        found.setdefault((site, patches[name]), {})[leaf] = tensor
    return found


def _token_head(writing: _Writing, patch: Patch, module: Module, site: str, name: str) -> bool:
    """Whether a head over every token is the model's own linear classifier, which then takes its values."""
    form = patch.form
    if not (isinstance(form, Head) and form.pooling == "token"):
        return False
    found = {leaf: as_float(module.tensors[f"{site}/{name}.{leaf}"]) for leaf in ("weight", "bias")}
    if form.standardise:  # centre and scale go into the linear map
        found["weight"] = found["weight"] * module.tensors[f"{site}/{name}.scale"]
        found["bias"] = found["bias"] - found["weight"] @ module.tensors[f"{site}/{name}.mean"]
    for path in sorted(writing.paths.known):
        if path in TASK_HEADS["TOKEN_CLS"] and (path, "bias") in writing.paths.params and writing.paths.weight(path).shape == tuple(found["weight"].shape):
            writing.heads.add(path)
            writing.replaced |= {(path, leaf): tensor for leaf, tensor in found.items()}
            return True
    return False


def _place(writing: _Writing, site: Site, patch: Patch, tensors: dict[str, Tensor]) -> None:
    """File one patch at one site under its module path."""
    form, op = patch.form, patch.op
    if isinstance(form, Matrix) and isinstance(form.factor, Dense) and isinstance(op, Add):
        writing.values[site.path, site.param or "weight"] = (site, tensors["factor.value"] * op.scale)
        return
    if isinstance(form, Matrix) and isinstance(form.factor, Sparse) and isinstance(op, Add):
        writing.rows[site.name] = (site, _rows_of(site, tensors["factor.index"], tensors["factor.values"] * op.scale))
        return
    if isinstance(form, Affine) and isinstance(form.factor, Core) and isinstance(form.factor.frame, Free) and isinstance(form.factor.core, Diag):
        gain = tensors.get("factor.gain")
        up = tensors["factor.frame.up"] * tensors["factor.core.value"]
        tensors = {"factor.up": up if gain is None else up * gain[:, None], "factor.down": tensors["factor.frame.down"]}
        patch = Patch(patch.name, patch.at, Affine(LowRank(up.shape[1]), form.dropout), op, patch.port)
        writing.notes["its diagonal is multiplied into the out-factor: the same outputs as a LoRA"] = None
    for kind in KINDS:
        fields = kind.write(patch) if kind.write is not None and kind.port == patch.port else None
        if fields is None:
            continue
        if isinstance(form, Const) and isinstance(op, Add):
            writing.biases[site.path] = (op.scale, tensors["value"])
        else:
            writing.layers.setdefault(site.path, []).append((site, _Layer(kind, fields, kind.theirs(tensors))))
            if kind.port == "in" or kind.patch == "scale_input":
                writing.inner.add(site.path)
        return
    raise ModuleError(f"patch {patch.name!r} at {site.name} ({type(form).__name__} under {type(op).__name__}) has no form in peft; {_ADVICE}")


def _rows_of(site: Site, index: Tensor, values: Tensor) -> dict[int, Tensor]:
    """Whole rows by number, if the entries are that."""
    width = site.shape[-1]
    rows = index.long()[::width] // width
    whole = len(site.shape) == 2 and not site.transposed and site.view is None and len(index) % width == 0
    if not whole or not torch.equal(index.long(), (rows[:, None] * width + torch.arange(width)).flatten()):
        raise ModuleError(f"{site.name}: single entries have no form in peft that is written (whole rows of an embedding have); {_ADVICE}")
    return dict(zip(rows.tolist(), values.view(-1, width)))


def _embedding_rows(writing: _Writing, site: Site, rows: Mapping[int, Tensor]) -> tuple[str, Fields, dict[str, Tensor]]:
    """New rows of an embedding, repeated for every matrix tied to it."""
    if not rows or ".embed." not in f".{site.name}":
        raise ModuleError(f"{site.name}: peft trains rows of embeddings only; {_ADVICE}")
    old = _base_value(writing, site.path, site.param or "weight")
    if old is None:
        raise ModuleError(f"weights has no {site.path}.{site.param}; give model.state_dict() of the model whose sites these are")
    new = torch.stack([(old[row] + change).to(old.dtype) for row, change in rows.items()])
    owners = [path for path, _ in site.owners] or [site.path]
    target = next((path for path in owners if path == "shared"), site.path)
    return "TRAINABLE_TOKENS", {"token_indices": list(rows), "target_modules": [target.split(".")[-1]]}, {
        f"{PREFIX}{path}.{ROWS}": new.clone() for path in owners
    }


def _layers(module: Module, writing: _Writing) -> tuple[str, Fields, dict[str, Tensor]]:
    """Configuration and tensors of a method that changes layers."""
    kinds = sorted({layer.kind.peft_type for members in writing.layers.values() for _, layer in members})
    if len(kinds) > 1:
        raise ModuleError(f"{module.name!r} would be {listing(kinds)} in peft, which keeps one method per folder")
    if writing.uniform and kinds != ["LORA"]:
        raise ModuleError(f"{module.name!r} ({module.method.name}) would be {listing(kinds) or 'no method'} in peft; servers of LoRA folders read LORA")
    if not kinds:
        return _only_values(module, writing)
    kind = kinds[0]
    if writing.uniform:
        _fold_scales(module, writing)
    layers = {path: _joined(writing, path, members) for path, members in writing.layers.items()}
    if writing.uniform:
        layers = _evened(layers)
    tensors = {f"{PREFIX}{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors.items()}
    fields = _fields(kind, layers)
    fields["target_modules"] = suffixes(layers, writing.paths.known)
    if kind == "IA3":  # peft wants the one list to be part of the other, word for word
        outer, inner = (suffixes(paths, writing.paths.known) if paths else [] for paths in (set(layers) - writing.inner, writing.inner))
        fields["target_modules"], fields["feedforward_modules"] = sorted({*outer, *inner}), inner
    if "fan_in_fan_out" in DEFAULTS[kind]:
        fields["fan_in_fan_out"] = any(writing.paths.weight(path).transposed for path in layers)
    if kind not in _TRANSPOSED and any(writing.paths.weight(path).transposed for path in layers):
        writing.notes[f"peft's {kind} does not load on this model's transposed (Conv1D) layers"] = None
    if writing.biases:
        tensors |= _lora_biases(writing, kind, layers, fields)
    tensors |= _values(writing, kind, layers, fields)
    return kind, fields, tensors


def _joined(writing: _Writing, path: str, members: list[tuple[Site, _Layer]]) -> _Layer:
    """One layer of the parts of a fused projection: the ranks side by side, zeros where a part does not write."""
    site, first = members[0]
    if len(members) == 1 and site.view is None:
        return first
    views = [s.view for s, _ in members]
    same = len({(tuple(sorted((key, value) for key, value in m.fields.items() if key != "r")), m.kind.patch) for _, m in members}) == 1
    if None in views or first.kind.patch != "lora" or first.kind.peft_type != "LORA" or not same or len(set(views)) != len(views):
        raise ModuleError(
            f"{path}: {len(members)} patches at this layer ({listing(s.name for s, _ in members)}) are no single {first.kind.peft_type} there; add "
            "patches of one layer up first: intarsia.modules.arithmetic.scale(module, 1.0)"
        )
    whole = writing.paths.weight(path)
    out = whole.shape[1] if whole.transposed else whole.shape[0]
    ups: list[Tensor] = []
    for part, layer in members:
        view = part.view
        assert view is not None
        narrow = layer.tensors["lora_B.weight"]
        wide = narrow.new_zeros(view.groups, out // view.groups, narrow.shape[1])
        wide[:, view.start : view.start + view.width] = narrow.unflatten(0, (view.groups, view.width))
        ups.append(wide.flatten(0, 1))
    down = torch.cat([layer.tensors["lora_A.weight"] for _, layer in members])
    writing.notes["parts of fused projections lie side by side, so that the rank there is the sum of theirs"] = None
    return _Layer(first.kind, {**first.fields, "r": down.shape[0]}, {"lora_A.weight": down, "lora_B.weight": torch.cat(ups, 1)})


def _fold_scales(module: Module, writing: _Writing) -> None:
    """Every LoRA with the scale 1, which its out-factor takes over."""
    odd = {path for path, _ in writing.values} | set(writing.biases)
    odd |= {path for path, members in writing.layers.items() for _, layer in members if layer.kind.patch != "lora"}
    if odd:
        raise ModuleError(f"{module.name!r} is more than LoRA at {listing(sorted(odd), 4)}, which servers of LoRA folders do not read; {_ADVICE}")
    for members in writing.layers.values():
        for index, (site, layer) in enumerate(members):
            up = layer.tensors["lora_B.weight"] * float(layer.fields["scale"])
            fields = {**layer.fields, "scale": 1.0, "lora_dropout": 0.0}
            members[index] = site, _Layer(layer.kind, fields, {**layer.tensors, "lora_B.weight": up})


def _evened(layers: Mapping[str, _Layer]) -> dict[str, _Layer]:
    """The same products with one rank: zeros beside the factors."""
    rank = max(layer.tensors["lora_A.weight"].shape[0] for layer in layers.values())
    found: dict[str, _Layer] = {}
    for path, layer in layers.items():
        down, up = layer.tensors["lora_A.weight"], layer.tensors["lora_B.weight"]
        more = rank - down.shape[0]
        down, up = torch.cat([down, down.new_zeros(more, down.shape[1])]), torch.cat([up, up.new_zeros(up.shape[0], more)], 1)
        found[path] = _Layer(layer.kind, {**layer.fields, "r": rank}, {"lora_A.weight": down, "lora_B.weight": up})
    return found


def _fields(kind: str, layers: Mapping[str, _Layer]) -> Fields:
    """Fields of the configuration: the most common rank and alpha, the others by module path."""
    alpha_name = "lora_alpha" if kind == "LORA" else "alpha"
    per_layer = {path: dict(layer.fields) for path, layer in layers.items()}
    patterned: dict[str, dict[str, Any]] = {"r": {}, alpha_name: {}}
    for path, fields in per_layer.items():
        scale = fields.pop("scale", None)
        if kind == "LOKR":
            tensors = layers[path].tensors
            fields["r"] = tensors["lokr_w2_b"].shape[0] if "lokr_w2_b" in tensors else max(tensors["lokr_w2"].shape)
        if "r" in fields and "rank_pattern" in DEFAULTS[kind]:
            patterned["r"][path] = fields.pop("r")
        if scale is not None:
            patterned[alpha_name][path] = _tidy(scale * patterned["r"][path])
    rest = list(per_layer.values())
    for other in rest[1:]:
        odd = [key for key in rest[0] if other.get(key) != rest[0][key]]
        if odd and odd != ["lora_dropout"]:
            raise ModuleError(f"peft has one {listing(odd)} for all layers of a {kind}, here they differ: {rest[0][odd[0]]} and {other.get(odd[0])}")
    result = dict(rest[0])
    for name, pattern in (("r", "rank_pattern"), (alpha_name, "alpha_pattern")):
        if patterned[name]:
            common = Counter(patterned[name].values()).most_common(1)[0][0]
            result[name] = common
            result[pattern] = {path: value for path, value in sorted(patterned[name].items()) if value != common}
    return result


def _tidy(value: float) -> float | int:
    """A whole number where rounding alone keeps it from being one."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def _lora_biases(writing: _Writing, kind: str, layers: Mapping[str, _Layer], fields: Fields) -> dict[str, Tensor]:
    """`lora_B.bias` for every layer: zero where a layer has none."""
    alone = sorted(set(writing.biases) - set(layers))
    if kind != "LORA" or alone or fields.get("use_dora"):
        raise ModuleError(f"a trained shift at {listing(alone or sorted(writing.biases), 4)} has no form in peft beside {kind} without a LoRA there; {_ADVICE}")
    fields["lora_bias"] = True
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        scale = float(layer.fields["scale"])
        own, value = writing.biases.get(path, (0.0, torch.zeros(layer.tensors["lora_B.weight"].shape[0])))
        if own and not scale:
            raise ModuleError(f"{path}: a shift beside a LoRA of scale 0 has no form in peft; {_ADVICE}")
        found[f"{PREFIX}{path}.lora_B.bias"] = value * (own / scale) if own != scale else value
    return found


def _base_value(writing: _Writing, path: str, param: str) -> Tensor | None:
    if writing.weights is None:
        raise ModuleError(f"{path}.{param}: peft stores its new value and a module its change; give weights=model.state_dict()")
    found = writing.weights.get(f"{path}.{param}")
    return None if found is None else as_float(found.detach().cpu())


def _new_value(writing: _Writing, path: str, param: str) -> Tensor | None:
    """A parameter's value with its change, None if the model has no such parameter."""
    if (path, param) in writing.replaced:
        return writing.replaced[path, param]
    old = _base_value(writing, path, param)
    if (path, param) not in writing.values:
        return old
    site, change = writing.values[path, param]
    if site.view is not None or old is None:
        raise ModuleError(f"{site.name}: a part of a fused parameter, or one that weights= does not have, is not written")
    return (old + (change.T if site.transposed and change.dim() == 2 else change)).to(old.dtype)


def _values(writing: _Writing, kind: str, layers: Mapping[str, _Layer], fields: Fields) -> dict[str, Tensor]:
    """New values beside a method: LoRA's own biases, and whole modules (`modules_to_save`)."""
    found: dict[str, Tensor] = {}
    own = {path for path, param in writing.values if path in layers and param == "bias"}
    wrong = sorted(f"{path}.{param}" for path, param in writing.values if path in layers and param != "bias")
    if wrong or (own and kind != "LORA"):
        raise ModuleError(f"a dense change of {listing(wrong or sorted(own), 4)} beside a {kind} of the same layer has no form in peft; {_ADVICE}")
    if own:
        fields["bias"] = "lora_only"
        for path in layers:
            value = _new_value(writing, path, "bias")
            if value is not None:
                found[f"{PREFIX}{path}.base_layer.bias"] = value
    saved = {_whole_head(path) for path in ({path for path, _ in writing.values} | writing.heads) - set(layers)}
    for path in sorted(path for path in writing.paths.known if path not in layers and any(f"{path}.".startswith(f"{head}.") for head in saved)):
        for param in ("weight", "bias"):
            value = _new_value(writing, path, param)
            if value is not None:
                found[f"{PREFIX}{path}.{param}"] = value
    if saved:
        known = next((list(words) for words in TASK_HEADS.values() if all(path in words for path in saved)), None)
        fields["modules_to_save"] = known or suffixes(saved, writing.paths.known)
    return found


def _whole_head(path: str) -> str:
    """The module that peft saves for one inside a head of several layers."""
    words = path.split(".")
    heads = {word for known in TASK_HEADS.values() for word in known}
    return next((".".join(words[: end + 1]) for end, word in enumerate(words) if word in heads), path)


def _only_values(module: Module, writing: _Writing) -> tuple[str, Fields, dict[str, Tensor]]:
    """Norms, and the model's own head: LN tuning."""
    norms = {path for (path, _), (site, _) in writing.values.items() if ".norm." in f".{site.name}."}
    others = {path for (path, _), (site, _) in writing.values.items() if path not in norms and not site.name.startswith("head.")}
    paths = sorted(norms)
    if not paths or others or writing.biases:
        raise ModuleError(f"{module.name!r} ({module.method.name}) has no form in peft: {_ADVICE}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for param in ("weight", "bias"):
            value = _new_value(writing, path, param)
            if value is not None:
                tensors[f"{PREFIX}{path}.ln_tuning_layers.{param}"] = value
    fields: Fields = {"target_modules": suffixes(paths, writing.paths.known)}
    for path, param in [place for place in writing.values if place[0] in norms]:
        del writing.values[path, param]
    return "LN_TUNING", fields, {**tensors, **_values(writing, "LN_TUNING", {}, fields)}


def _prompt(writing: _Writing, sites: SiteMap, patch: Patch, found: Mapping[str, dict[str, Tensor]]) -> tuple[str, Fields, dict[str, Tensor]]:
    memories = [site for site in sites.values() if site.port == "mem"]
    fields: Fields = {"num_transformer_submodules": 1, "num_layers": max(sites.layers.values())}
    if isinstance(patch.form, Attend):
        return _prefix(writing, patch, memories, found, fields)
    form = patch.form
    assert isinstance(form, Tokens)
    name, tensors = next(iter(found.items()))
    if form.reparameterise is not None or form.where == "after_first" or "embeddings" not in tensors:
        raise ModuleError("peft puts plain embeddings at the start of the sequence; flatten the module, and train it with where='start'")
    value = tensors["embeddings"]
    if form.where == "auto":
        writing.notes["peft puts the prompt at the start; in an encoder this module puts it behind the first token, and outputs differ"] = None
    if sites[name].stack:
        value = torch.cat([value, torch.zeros_like(value)])
        fields["num_transformer_submodules"] = 2
    heads = memories[0].heads[0] if memories and memories[0].heads else None
    fields |= {"num_virtual_tokens": form.length, "token_dim": value.shape[1], "num_attention_heads": heads}
    return "PROMPT_TUNING", fields, {"prompt_embeddings": value}


def _prefix(
    writing: _Writing, patch: Patch, memories: list[Site], found: Mapping[str, dict[str, Tensor]], fields: Fields
) -> tuple[str, Fields, dict[str, Tensor]]:
    form = patch.form
    assert isinstance(form, Attend)
    if form.reparameterise is not None or form.factor is not None or form.mix != "shared":
        raise ModuleError("peft holds plain keys and values in the attention's own softmax; flatten the module: host.extract(name, flatten=True)")
    missing = [site.name for site in memories if site.name not in found]
    if missing or any(site.stack for site in memories):
        raise ModuleError(f"peft's prefix is for all layers of a model with one stack; here it is missing at {listing(missing, 4) or 'none, but there are two stacks'}")
    blocks = torch.stack([found[site.name][leaf] for site in memories for leaf in ("keys", "values")])
    heads, length, size = blocks.shape[1:]
    fields |= {"num_virtual_tokens": length, "token_dim": heads * size, "num_attention_heads": heads, "encoder_hidden_size": heads * size}
    writing.notes[f"peft also moves the tokens' positions by {length}; here they stay, so outputs of models with positions differ"] = None
    return "PREFIX_TUNING", fields, {"prompt_embeddings": blocks.permute(2, 0, 1, 3).reshape(length, -1)}
