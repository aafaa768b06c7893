"""`write_adapterhub`: a module as a folder of AdapterHub's `adapters` (1.x), its head beside it.

One folder there has one configuration per kind for all layers: what differs between layers other than an adapter's width is refused.
Several kinds in one module become a union.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import Patch
from intarsia.modules.module import Module
from intarsia.patches import Add, Affine, Attend, Const, Dense, Gated, Matrix, Mul, Renorm, SubspaceEdit, Tokens
from intarsia.sites.address import SiteMap
from intarsia.store.convert.adapterhub_heads import static_head, written_head
from intarsia.store.convert.adapterhub_parts import VERSION, Fields, Item, Writing
from intarsia.store.convert.adapterhub_write_bottleneck import bottlenecks, shared_rules
from intarsia.store.convert.adapterhub_write_lora import loras, scales
from intarsia.store.convert.adapterhub_write_soft import prefixes, prompts, refts
from intarsia.store.convert.detect import CONFIG, WEIGHTS
from intarsia.store.convert.folder import json_bytes, tensor_bytes, write_folder
from intarsia.store.convert.pieces import check_alone
from intarsia.store.convert.report import Report, beside
from intarsia.store.convert.values import base_value, value_at

Writer = Callable[[Writing, Sequence[Item]], tuple[Fields, dict[str, Tensor]]]


def write_adapterhub(
    module: Module,
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    model_type: str,
    name: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
) -> Report:
    """Write `adapter_config.json`, `adapter.safetensors`, the head's two files and the card as `README.md` into a new folder.

    Args:
        sites: of the model it is for; paths in the file are this model's.
        model_type: `model.config.model_type`.
        name: of the adapter, plain letters, digits, `_` and `-`, as it stands in every key; None for the module's.
        weights: `model.state_dict()`, for heads that are tied to the base's embeddings or are the class's own.
        config: `model.config`, for what heads leave to the model.

    Raises:
        ModuleError: a patch has no form there, or layers differ in more than an adapter's width; nothing is written.
        StoreError: the folder already holds such files.
    """
    name = name or module.name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ModuleError(f"{name!r} would stand in every key of the file: give name= of letters, digits, '_' and '-'")
    places, tied = _places(module, sites)
    missing = [site for site, _ in places if site not in sites]
    if missing or not places:
        raise ModuleError(f"{module.name!r} does not fit this model: it lacks {listing(missing)}" if missing else f"{module.name!r} holds nothing to write")
    writing = Writing(sites, name, model_type, tied)
    document: dict[str, Any] = {"hidden_size": max(site.features for site in sites.values() if site.name.endswith("attn")), "model_class": sites.model,
                                "model_name": module.card.base or None, "model_type": model_type, "name": name, "version": VERSION}  # fmt: skip
    files, left_out, count = _heads(sites, places, document, weights, config)
    groups: dict[Writer, list[Item]] = {}
    order = {patch: number for number, patch in enumerate(module.method.patches)}
    for (site, patch), tensors in sorted(places.items(), key=lambda place: order[place[0][1]]):
        if patch.port != "logits" and not _of_class(patch):
            items = groups.setdefault(_writer(patch), [])
            check_alone([item[0].name for item in items], site, site)
            items.append((sites[site], patch, tensors))
    parts: list[Fields] = []
    stored: dict[str, Tensor] = {}
    for write, items in groups.items():
        fields, tensors = write(writing, items)
        parts.append(fields)
        stored |= tensors
    stored |= shared_rules(writing)
    if writing.tied or not parts:
        what = f"{listing(writing.tied)}: shared by all sites; take the module with host.extract(name, flatten=True)" if writing.tied else "it holds nothing but a head"
        raise ModuleError(f"{module.name!r} is not written: {what}")
    left_out += beside(module, None, "the files have no place for it")
    if module.labels and not files:
        left_out.append(f"label names ({listing(module.labels, 4)}): they are the head's, and it is left out")
    document["config"] = parts[0] if len(parts) == 1 else {"architecture": "union", "configs": parts}
    write_folder(folder, {CONFIG: json_bytes(document), WEIGHTS["adapterhub"][0]: tensor_bytes(stored), **files, "README.md": module.card.to_markdown().encode()})
    kind = "+".join(str(part.get("architecture") or "bottleneck") for part in parts)
    return Report(module.name, kind, len(stored) + count, tuple(left_out), tuple(writing.notes))


def _places(module: Module, sites: SiteMap) -> tuple[dict[tuple[str, Patch], dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and patch, and those that all sites share."""
    patches = {patch.name: patch for patch in module.method.patches}
    places: dict[tuple[str, Patch], dict[str, Tensor]] = {}
    tied: dict[str, Tensor] = {}
    for key, tensor in module.tensors.items():
        site, _, rest = key.partition("/")
        patch = patches.get(rest.partition(".")[0])
        if site == "tied":
            tied[key] = tensor
        elif patch is None:
            raise ModuleError(f"{key!r} belongs to no patch of its method")
        else:
            places.setdefault((site, patch), {})[rest.partition(".")[2]] = tensor
    for patch in module.method.patches:  # patches whose tensors are all shared, or that have none
        if not any(own is patch for _, own in places):
            places |= {(site.name, patch): {} for site in sites.select(patch.at, layers=patch.layers, port=patch.port)}
    return places, tied


def _of_class(patch: Patch) -> bool:
    """Whether a patch is the head of a model class, as changes of its parameters."""
    return patch.port == "weight" and patch.tag == "head" and isinstance(patch.form, Matrix) and isinstance(patch.form.factor, Dense) and isinstance(patch.op, Add)


def _heads(
    sites: SiteMap, places: Mapping[tuple[str, Patch], dict[str, Tensor]], document: Mapping[str, Any], weights: Mapping[str, Tensor] | None, config: Any
) -> tuple[dict[str, bytes], list[str], int]:
    """Files of the head, what is left out of it, and how many tensors it has."""
    files: dict[str, bytes] = {}
    left_out: list[str] = []
    count = 0
    own: dict[str, Tensor] = {}
    for (site, patch), tensors in places.items():
        reason = ""
        if patch.port == "logits":
            embed = sites.get("embed.weight")
            rows = None if weights is None or embed is None else weights.get(f"{embed.path}.{embed.param}")
            files, reason = written_head(patch, tensors, str(document["model_type"]), str(document["name"]), rows, config)
            count += len(tensors) if files else 0
        elif _of_class(patch):
            place = sites[site]
            param = f"{place.path}.{place.param}"
            if weights is None:
                reason = f"{param} is stored as its new value, and a module holds its change: give weights=model.state_dict()"
            else:
                assert isinstance(patch.op, Add)
                check_alone(own, param, param)
                own[param] = value_at(place, tensors["factor.value"] * patch.op.scale, base_value(weights, place))
        if reason:
            left_out.append(f"the head ({len(tensors)} tensors): {reason}")
    if own:
        files, count = static_head(own, document, config), count + len(own)
    return files, left_out, count


def _writer(patch: Patch) -> Writer:
    """How a patch is written."""
    form = patch.form.form if isinstance(patch.form, Gated) else patch.form
    if patch.port == "weight":
        raise ModuleError(f"patch {patch.name!r} changes parameters of the base ({patch.at}), which adapters has no place for: merge them into the base, or train without them")
    if isinstance(form, Attend):
        return prefixes
    if isinstance(form, Tokens):
        return prompts
    if isinstance(form, SubspaceEdit):
        return refts
    if isinstance(form, Const) and form.factor is None and isinstance(patch.op, Mul):
        if patch.port != "out":
            raise ModuleError(f"patch {patch.name!r} rescales what a layer reads ({patch.at}), where adapters' (IA)^3 rescales outputs")
        return scales
    return loras if isinstance(form, Affine | Renorm) else bottlenecks
