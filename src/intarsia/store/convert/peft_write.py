"""`write_peft`: a module as a folder that peft (and servers that read its files) can load.

The configuration has every field that peft 0.21 writes, keys sorted; lists that peft writes in the order of a hash are sorted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import ModuleError, SiteError, listing
from intarsia.methods.method import Patch
from intarsia.modules.module import Module
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Const,
    Core,
    Dense,
    LowRank,
    Matrix,
    Rows,
    Sparse,
    Tokens,
)
from intarsia.sites.address import Site, SiteMap
from intarsia.store.convert.detect import CONFIG, WEIGHTS
from intarsia.store.convert.folder import as_float, json_bytes, sound, tensor_bytes, tidy, write_folder
from intarsia.store.convert.paths import Paths, suffixes
from intarsia.store.convert.peft_config import DEFAULTS, check, written
from intarsia.store.convert.peft_finish import Written, finished
from intarsia.store.convert.peft_heads import write_head
from intarsia.store.convert.peft_kind import Fields
from intarsia.store.convert.peft_kinds import KINDS
from intarsia.store.convert.peft_origin import narrowed, origin, same_file
from intarsia.store.convert.peft_prompts import write_prompt
from intarsia.store.convert.peft_random import DIAGONAL, DOWN, GAIN, UP, common, diagonal, framed, with_sides
from intarsia.store.convert.peft_read import PREFIX, ROWS, assemble
from intarsia.store.convert.pieces import check_alone
from intarsia.store.convert.report import Report, beside
from intarsia.store.convert.values import value_at

#: what peft saves and expects with each task class
TASK_HEADS: Mapping[str, tuple[str, ...]] = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
#: names of layers that peft saves whole beside a LoRA of them
EMBEDDINGS = ("embed_tokens", "lm_head")
#: methods whose peft class also takes GPT-2's transposed layers
_TRANSPOSED = ("LORA", "ADALORA", "IA3", "VERA", "FOURIERFT", "GRALORA", "HIRA", "LN_TUNING")
_ADVICE = "fold it into the base, or keep it as a module"


@dataclass
class _Writing:
    paths: Paths
    weights: Mapping[str, Tensor] | None
    uniform: bool = False
    prefer: str = ""
    max_rank: int | None = None
    layers: dict[str, list[tuple[Site, Written]]] = field(default_factory=dict)
    values: dict[tuple[str, str], tuple[Site, Tensor]] = field(default_factory=dict)
    biases: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[Site, dict[int, Tensor]]] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)
    all_biases: bool = False
    replaced: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def write_peft(
    module: Module,
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    weights: Mapping[str, Tensor] | None = None,
    model: PreTrainedModel | None = None,
    task_type: str | None = None,
    base_name: str | None = None,
    uniform: bool = False,
    max_rank: int | None = None,
) -> Report:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the card as `README.md` into a new folder.

    Args:
        sites: of the model it is for; module paths in the file are this model's.
        weights: `model.state_dict()`, needed where peft stores a parameter's new value and the module its change.
        model: the model itself; prefixes are for positions that it knows (see `peft_prompts.py`).
        task_type: `CAUSAL_LM`, `SEQ_CLS` ... for peft's task classes.
        base_name: name of the base in the configuration; None for the card's.
        uniform: one rank and a scale of 1 for all layers, by zeros beside the factors and scales multiplied into them: servers
            read no patterns. Only for LoRA.
        max_rank: of such a folder; a higher one is refused.

    Raises:
        ModuleError: a patch has no form in peft, or parts of it would be different methods there; nothing is written.
        StoreError: the folder already holds such files.
    """
    before = {} if uniform else origin(module)
    task_type, base_name = task_type or before.get("task_type"), base_name or before.get("base_model_name_or_path") or module.card.base or None
    writing = _Writing(Paths(sites), weights, uniform, max_rank=max_rank)
    prompts: dict[Patch, dict[str, dict[str, Tensor]]] = {}
    places = _by_place(module, writing)
    parts = any(name in sites and sites[name].view is not None for name, _ in places)
    writing.prefer = "LORA" if parts else _preferred(module, before, uniform)
    places = _sides_given(writing, sites, places)
    for (site_name, patch), tensors in places.items():
        if isinstance(patch.form, Tokens | Attend):
            prompts.setdefault(patch, {})[site_name] = tensors
            continue
        try:
            site = sites[site_name]
        except SiteError as error:
            raise ModuleError(f"{module.name!r} does not fit this model: {error}") from None
        _place(writing, site, patch, tensors)
    writing.all_biases = before.get("bias") == "all"
    _expected_heads(writing, task_type, before.get("modules_to_save") or ())
    table = next((place for place, (site, _) in writing.values.items() if "embed.position" in site.name), None)
    moved = writing.values.pop(table) if prompts and table is not None else None
    others = any(not site.name.startswith("head.") for site, _ in writing.values.values())
    if writing.rows and (prompts or ((writing.biases or writing.values) and not writing.layers) or (len(writing.rows) > 1 and not writing.layers)):
        raise ModuleError(f"{module.name!r} is more than new rows of one embedding; peft keeps one method per folder; {_ADVICE}")
    if prompts and (writing.layers or writing.biases or others or len(prompts) > 1):
        raise ModuleError(f"{module.name!r} is more than a prompt or prefix; peft keeps one method per folder")
    if prompts:
        patch, found = next(iter(prompts.items()))
        prompt = write_prompt(patch, found, moved, sites, weights, model)
        kind, fields, tensors = prompt.kind, prompt.fields, prompt.tensors
        writing.notes |= dict.fromkeys(prompt.notes)
        tensors |= {key.replace(PREFIX, "base_model.", 1): tensor for key, tensor in _values(writing, kind, {}, fields).items()}
    elif writing.rows and not writing.layers:
        kind, fields, tensors = _embedding_rows(writing, *next(iter(writing.rows.values())))
    else:
        kind, fields, tensors = _layers(module, writing)
    fields["task_type"] = task_type
    fields["base_model_name_or_path"] = base_name
    tensors = narrowed(module, tensors)
    config = written(kind, **fields)
    if before and same_file(module, tensors):
        earlier = {**before, "task_type": task_type, "base_model_name_or_path": base_name}
        config = earlier if _gives(earlier, tensors, module, sites, weights, model) else config
    labels = None if module.labels == tuple(f"LABEL_{i}" for i in range(len(module.labels or ()))) else module.labels
    writing.left_out += beside(module, labels, "peft's files have no place for it")
    write_folder(folder, {CONFIG: json_bytes(config), WEIGHTS["peft"][0]: tensor_bytes(tensors), "README.md": module.card.to_markdown().encode()})
    return Report(module.name, str(config["peft_type"]), len(tensors), tuple(writing.left_out), tuple(writing.notes))


def _gives(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    module: Module,
    sites: SiteMap,
    weights: Mapping[str, Tensor] | None,
    model: PreTrainedModel | None,
) -> bool:
    """Whether a configuration with these tensors is read as the module, apart from its head."""
    try:
        with sound(module.name):
            again, _ = assemble(check(config, module.name), tensors, sites, module.base, module.name, weights, module.name, model)
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
    own = {name for name, patch in patches.items() if patch.port == "logits" and _own_head(writing, patch, module)}
    found: dict[tuple[str, Patch], dict[str, Tensor]] = {}
    for key, tensor in module.tensors.items():
        site, _, rest = key.partition("/")
        name, _, leaf = rest.partition(".")
        if site == "tied" or name not in patches:
            raise ModuleError(f"{key!r} is shared by all sites; peft has no place for it. Take the module with host.extract(name, flatten=True)")
        if patches[name].port != "logits":
            found.setdefault((site, patches[name]), {})[leaf] = tensor
        elif name not in own:
            writing.left_out.append(f"{key} {tuple(tensor.shape)}: a head on the final hidden states; peft keeps only the model class's own")
    return found


def _own_head(writing: _Writing, patch: Patch, module: Module) -> bool:
    """Whether a head is one that the model's class has, which then takes its values."""
    lead = f"logits/{patch.name}."
    shapes = {place: found[0].shape for place, found in writing.paths.params.items() if found[0].view is None}
    leaves = {key.removeprefix(lead): tensor for key, tensor in module.tensors.items() if key.startswith(lead)}
    found = write_head(patch.form, leaves, writing.paths.sites.model, shapes)
    if found is None:
        return False
    writing.heads |= {path for path, _ in found}
    writing.replaced |= found
    return True


def _preferred(module: Module, before: Mapping[str, Any], uniform: bool) -> str:
    """Which of peft's methods a patch becomes that several would hold."""
    patches = [patch for patch in module.method.patches if patch.port != "logits"]
    factors = [patch.form.factor for patch in patches if isinstance(patch.form, Affine | Matrix)]
    if uniform or any(isinstance(factor, LowRank) for factor in factors):
        return "LORA"
    if any(isinstance(patch.form, Matrix) and isinstance(patch.form.factor, Rows) for patch in patches):
        return "BOFT"
    return str(before.get("peft_type", ""))


def _sides_given(writing: _Writing, sites: SiteMap, places: Mapping[tuple[str, Patch], dict[str, Tensor]]) -> dict[tuple[str, Patch], dict[str, Tensor]]:
    """VeRA's sides at each site; where they are no cuts of one pair, or peft has no place for VeRA, the low-rank product."""
    found = {place: tensors for place, tensors in places.items() if not framed(place[1])}
    patches = list(dict.fromkeys(patch for _, patch in places if framed(patch)))
    for patch in patches:
        mine = {site: tensors for (site, other), tensors in places.items() if other == patch}
        try:
            shapes = {site: (sites[site].features, _shape(writing, sites[site])[1]) for site in mine}
        except SiteError as error:
            raise ModuleError(f"the module does not fit this model: {error}") from None
        given = with_sides(patch, {site: (tensors, shapes[site]) for site, tensors in mine.items()})
        whole = all(sites[site].view is None for site in mine)
        if len(patches) == 1 and whole and writing.prefer != "LORA" and common(given.values()):
            found |= {(site, patch): tensors for site, tensors in given.items()}
            continue
        for site, tensors in given.items():
            found[site, _product_patch(patch)] = _product(writing, tensors)
    return found


def _product_patch(patch: Patch) -> Patch:
    form = patch.form
    assert isinstance(form, Affine) and isinstance(form.factor, Core) and form.factor.rank is not None
    return replace(patch, form=Affine(LowRank(form.factor.rank), form.dropout))


def _product(writing: _Writing, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diagonal between two sides, and a gain if there is one, as a LoRA's two factors."""
    gain = tensors.get(GAIN)
    up = tensors[UP] * tensors[DIAGONAL]
    writing.notes["its diagonal is multiplied into the out-factor: the same outputs as a LoRA"] = None
    return {"factor.up": up if gain is None else up * gain[:, None], "factor.down": tensors[DOWN]}


def _shape(writing: _Writing, site: Site) -> tuple[int, int]:
    """(out, in) of the weight that a site belongs to."""
    found = writing.paths.weight(site.path)
    if len(found.shape) != 2:
        raise ModuleError(f"{site.name}: peft changes matrices, and here is one of shape {found.shape}; {_ADVICE}")
    out, inner = reversed(found.shape) if found.transposed else found.shape
    return out, inner


def _place(writing: _Writing, site: Site, patch: Patch, tensors: dict[str, Tensor]) -> None:
    """File one patch at one site under its module path."""
    form, op = patch.form, patch.op
    if isinstance(form, Matrix) and isinstance(form.factor, Dense) and isinstance(op, Add):
        place = (site.path, site.param or "weight")
        check_alone(writing.values, place, site.name)
        writing.values[place] = (site, tensors["factor.value"] * op.scale)
        if patch.tag == "norm" or ".norm." in f".{site.name}.":
            writing.norms.add(site.path)
        return
    if isinstance(form, Matrix) and isinstance(form.factor, Sparse) and isinstance(op, Add) and ".embed." in f".{site.name}":
        check_alone(writing.rows, site.name, site.name)
        writing.rows[site.name] = (site, _rows_of(site, tensors["factor.index"], tensors["factor.values"] * op.scale))
        return
    if diagonal(patch) is not None and writing.prefer == "LORA":
        tensors, patch = _product(writing, tensors), _product_patch(patch)
    for kind in sorted(KINDS, key=lambda kind: kind.peft_type != writing.prefer):
        fits = kind.port == patch.port and kind.table in (None, ".embed." in f".{site.name}")
        fields = kind.write(patch) if kind.write is not None and fits else None
        if fields is None:
            continue
        if isinstance(form, Const) and isinstance(op, Add):
            check_alone(writing.biases, site.path, site.name)
            writing.biases[site.path] = (op.scale, tensors["value"])
        else:
            writing.layers.setdefault(site.path, []).append((site, Written(kind, fields, kind.theirs(patch, tensors, _matrix(writing, site)))))
            if kind.table and len(site.owners) > 1:
                writing.notes[f"peft changes what {site.path} looks up and not the head that is tied to it; here both change, so logits differ"] = None
            if kind.port == "in" or kind.patch == "scale_input":
                writing.inner.add(site.path)
        return
    raise ModuleError(f"patch {patch.name!r} at {site.name} ({type(form).__name__} under {type(op).__name__}) has no form in peft; {_ADVICE}")


def _matrix(writing: _Writing, site: Site) -> tuple[int, int]:
    """(out, in) of the weight there; of a part of a fused projection, of that part."""
    shape = _shape(writing, site)
    return shape if site.view is None else (site.view.features, shape[1])


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
    target, new, owners = _new_rows(writing, site, rows)
    return "TRAINABLE_TOKENS", {"token_indices": list(rows), "target_modules": [target.split(".")[-1]]}, {
        f"{PREFIX}{path}.{ROWS}": new.clone() for path in owners
    }


def _new_rows(writing: _Writing, site: Site, rows: Mapping[int, Tensor]) -> tuple[str, Tensor, list[str]]:
    """The path that peft is told, the rows' new values, and the paths that keep them: all that are tied."""
    old = _base_value(writing, site.path, site.param or "weight")
    if old is None:
        raise ModuleError(f"weights has no {site.path}.{site.param}; give model.state_dict() of the model whose sites these are")
    new = torch.stack([(old[row] + change).to(old.dtype) for row, change in rows.items()])
    owners = [path for path, _ in site.owners] or [site.path]
    if any((path, "bias") in writing.paths.params for path in owners):
        writing.notes["peft 0.21 loses the bias of a head that is tied to an embedding with trained rows, and its logits differ by it"] = None
    return next((path for path in owners if path == "shared"), site.path), new, owners


def _rows_beside(writing: _Writing, kind: str, fields: Fields) -> dict[str, Tensor]:
    """New rows of embeddings beside a LoRA."""
    if writing.rows and (kind != "LORA" or writing.uniform):
        raise ModuleError(f"new rows of an embedding beside a {kind} have no form {'in a folder for servers' if writing.uniform else 'in peft'}; {_ADVICE}")
    found: dict[str, Tensor] = {}
    for site, rows in writing.rows.values():
        target, new, _ = _new_rows(writing, site, rows)
        fields["trainable_token_indices"] = {**(fields.get("trainable_token_indices") or {}), target.split(".")[-1]: list(rows)}
        found[f"{PREFIX}{target}.token_adapter.{ROWS}"] = new
    return found


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
        layers = _evened(layers, writing.max_rank)
    layers, shared = finished(kind, layers, {path: _shape(writing, members[0][0]) for path, members in writing.layers.items()})
    tensors = {f"base_model.{name}": tensor for name, tensor in shared.items()}
    tensors |= {f"{PREFIX}{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors.items()}
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
    tensors |= _rows_beside(writing, kind, fields)
    for path in layers if kind == "LORA" else ():  # peft saves embeddings that it adapts
        if path.split(".")[-1] in EMBEDDINGS:
            value = _base_value(writing, path, "weight")
            tensors |= {} if value is None else {f"{PREFIX}{path}.base_layer.weight": value}
    return kind, fields, tensors


def _joined(writing: _Writing, path: str, members: list[tuple[Site, Written]]) -> Written:
    """One layer of the parts of a fused projection: the ranks side by side, zeros where a part does not write."""
    site, first = members[0]
    if len(members) == 1 and site.view is None and first.kind.peft_type != "BOFT":
        return first
    views = [s.view for s, _ in members]
    if first.kind.peft_type == "BOFT":
        return _rotation_and_gain(path, [layer for _, layer in members], _shape(writing, site))
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
    return Written(first.kind, {**first.fields, "r": down.shape[0]}, {"lora_A.weight": down, "lora_B.weight": torch.cat(ups, 1)})


def _rotation_and_gain(path: str, members: list[Written], shape: tuple[int, int]) -> Written:
    """BOFT's two tensors of a layer; a gain of 1 where a module has none."""
    tensors = {name: tensor for layer in members for name, tensor in layer.tensors.items()}
    fields = {key: value for layer in members for key, value in layer.fields.items()}
    if "boft_R" not in tensors or len(members) != len({layer.kind.patch for layer in members}):
        raise ModuleError(f"{path}: peft's BOFT is one rotation and a gain of each layer; {_ADVICE}")
    return Written(members[0].kind, fields, {"boft_s": tensors["boft_R"].new_ones(shape[0], 1), **tensors})


def _fold_scales(module: Module, writing: _Writing) -> None:
    """Every LoRA with the scale 1, which its out-factor takes over."""
    odd = {path for path, _ in writing.values} | set(writing.biases)
    odd |= {path for path, members in writing.layers.items() for _, layer in members if layer.kind.patch != "lora"}
    odd |= {site.path for site, _ in writing.rows.values()}
    if odd:
        raise ModuleError(f"{module.name!r} is more than LoRA at {listing(sorted(odd), 4)}, which servers of LoRA folders do not read; {_ADVICE}")
    for members in writing.layers.values():
        for index, (site, layer) in enumerate(members):
            up = layer.tensors["lora_B.weight"] * float(layer.fields["scale"])
            fields = {**layer.fields, "scale": 1.0, "lora_dropout": 0.0}
            members[index] = site, Written(layer.kind, fields, {**layer.tensors, "lora_B.weight": up})


def _evened(layers: Mapping[str, Written], limit: int | None) -> dict[str, Written]:
    """The same products with one rank: zeros beside the factors."""
    rank = max(layer.tensors["lora_A.weight"].shape[0] for layer in layers.values())
    if limit is not None and rank > limit:
        raise ModuleError(f"the folder would have rank {rank}, and {limit} is the limit; cut it down (cut=True), or raise the server's limit")
    found: dict[str, Written] = {}
    for path, layer in layers.items():
        down, up = layer.tensors["lora_A.weight"], layer.tensors["lora_B.weight"]
        more = rank - down.shape[0]
        down, up = torch.cat([down, down.new_zeros(more, down.shape[1])]), torch.cat([up, up.new_zeros(up.shape[0], more)], 1)
        found[path] = Written(layer.kind, {**layer.fields, "r": rank}, {"lora_A.weight": down, "lora_B.weight": up})
    return found


def _fields(kind: str, layers: Mapping[str, Written]) -> Fields:
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
            rank = patterned["r"].get(path, fields.get("r"))
            patterned[alpha_name][path] = tidy(scale * rank)
    rest = list(per_layer.values())
    for other in rest[1:]:
        odd = [key for key in rest[0] if other.get(key) != rest[0][key]]
        if odd and odd != ["lora_dropout"]:
            raise ModuleError(f"peft has one {listing(odd)} for all layers of a {kind}, here they differ: {rest[0][odd[0]]} and {other.get(odd[0])}")
    result = dict(rest[0])
    for name, pattern in (("r", "rank_pattern"), (alpha_name, "alpha_pattern")):
        if patterned[name]:
            usual = Counter(patterned[name].values()).most_common(1)[0][0]
            others = {path: value for path, value in sorted(patterned[name].items()) if value != usual}
            if others and pattern not in DEFAULTS[kind]:
                raise ModuleError(f"peft has one {name} for all layers of a {kind}, here they differ: {usual} and {next(iter(others.values()))}")
            result |= {name: usual, **({pattern: others} if pattern in DEFAULTS[kind] else {})}
    return result


def _lora_biases(writing: _Writing, kind: str, layers: Mapping[str, Written], fields: Fields) -> dict[str, Tensor]:
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
    shared = writing.paths.params.get((path, param), [])
    place = (shared[0].path, shared[0].param or "weight") if shared else (path, param)
    if place not in writing.values:
        return old
    site, change = writing.values[place]
    if site.view is not None or old is None:
        raise ModuleError(f"{site.name}: a part of a fused parameter, or one that weights= does not have, is not written")
    return value_at(site, change, old)


def _values(writing: _Writing, kind: str, layers: Mapping[str, Written], fields: Fields) -> dict[str, Tensor]:
    """New values beside a method: LoRA's own biases, and whole modules (`modules_to_save`)."""
    found: dict[str, Tensor] = {}
    if writing.all_biases and kind == "LORA":
        return _every_bias(writing, layers, fields)
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


def _every_bias(writing: _Writing, layers: Mapping[str, Written], fields: Fields) -> dict[str, Tensor]:
    """LoRA with `bias="all"`: the value of each bias of the model, and the heads."""
    fields["bias"] = "all"
    found: dict[str, Tensor] = {}
    heads = {path for path in writing.paths.known if any(f"{path}.".startswith(f"{_whole_head(head)}.") for head in writing.heads)}
    wrong = sorted(path for path, param in writing.values if param != "bias" and path not in heads)
    if wrong:
        raise ModuleError(f"a change of {listing(wrong, 4)} beside a LoRA that keeps all biases has no form in peft; {_ADVICE}")
    for path in sorted(writing.paths.known):
        for param in ("weight", "bias") if path in heads else ("bias",):
            value = _new_value(writing, path, param)
            if value is not None:
                found[f"{PREFIX}{path}.{'base_layer.' if path in layers else ''}{param}"] = value
    if heads:
        fields["modules_to_save"] = suffixes({_whole_head(path) for path in heads}, writing.paths.known)
    return found


def _whole_head(path: str) -> str:
    """The module that peft saves for one inside a head of several layers."""
    words = path.split(".")
    heads = {word for known in TASK_HEADS.values() for word in known}
    return next((".".join(words[: end + 1]) for end, word in enumerate(words) if word in heads), path)


def _only_values(module: Module, writing: _Writing) -> tuple[str, Fields, dict[str, Tensor]]:
    """Norms, and the model's own head: LN tuning."""
    norms = writing.norms
    others = {path for (path, _), (site, _) in writing.values.items() if path not in norms and not site.name.startswith("head.")}
    paths = sorted(norms)
    shifts = _shifts(writing, others) if not paths else {}
    if shifts:
        return "BEFT", *_as_shifts(writing, shifts)
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


def _shifts(writing: _Writing, others: Iterable[str]) -> dict[str, Tensor]:
    """What is added to the outputs of linear layers, if a module does nothing else beside its head: to outputs or to the layers' own biases."""
    found = {path: value * scale for path, (scale, value) in writing.biases.items()}
    for path in others:
        places = [(param, value) for (other, param), value in writing.values.items() if other == path]
        site, value = places[0][1]
        if len(places) > 1 or places[0][0] != "bias" or path not in writing.paths.out or site.view is not None:
            return {}
        found[path] = found[path] + value if path in found else value
    return found


def _as_shifts(writing: _Writing, shifts: Mapping[str, Tensor]) -> tuple[Fields, dict[str, Tensor]]:
    for path in shifts:
        writing.values.pop((path, "bias"), None)
    fields: Fields = {"target_modules": suffixes(shifts, writing.paths.known)}
    tensors = {f"{PREFIX}{path}.beft_bias": value[None] for path, value in shifts.items()}
    if any(writing.paths.weight(path).transposed for path in shifts):
        writing.notes["peft's BEFT does not load on this model's transposed (Conv1D) layers"] = None
    return fields, tensors | _values(writing, "BEFT", {}, fields)
