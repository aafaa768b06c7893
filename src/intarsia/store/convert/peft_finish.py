"""What peft's files want of all layers together, before they are written: one number of ranks or entries, or one shared pair of sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.store.convert.peft_kind import Fields, Kind
from intarsia.store.convert.peft_random import joined_sides

#: of AdaLoRA: peft adds it to the rank that it divides by
_EPSILON = 1e-5


@dataclass
class Written:
    """What peft will hold for one module path."""

    kind: Kind
    fields: Fields
    tensors: dict[str, Tensor]


def finished(kind: str, layers: Mapping[str, Written], shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Written], dict[str, Tensor]]:
    """The layers as peft wants them, and the tensors that belong to the whole file.

    Args:
        shapes: (out, in) of the weight by module path.
    """
    if kind == "VERA":
        found = {path: replace(layer, tensors=dict(layer.tensors)) for path, layer in layers.items()}
        return found, joined_sides(layer.tensors for layer in found.values())
    if kind == "ROAD" and any(layer.fields["variant"] == "road_4" for layer in layers.values()):
        return _same_groups(layers), {}
    if kind == "ADALORA":
        return _same_ranks(layers), {}
    if kind == "SHIRA":
        return _same_count(layers, shapes), {}
    return dict(layers), {}


def _same_groups(layers: Mapping[str, Written]) -> dict[str, Written]:
    """The size of groups follows from the angles: zeros for one group's features, then a right angle for as many."""
    found: dict[str, Written] = {}
    for path, layer in layers.items():
        if layer.fields["variant"] != "road_4":
            raise ModuleError(f"{path}: peft has one variant of RoAd for all layers")
        found[path] = replace(layer, fields={**layer.fields, "group_size": int(layer.tensors["road_theta"].ne(0).int().argmax())})
    return found


def _same_ranks(layers: Mapping[str, Written]) -> dict[str, Written]:
    """AdaLoRA has one rank and one alpha at the start: zeros beside the factors, and other scales in the diagonal."""
    rank = max(int(layer.fields["rank"]) for layer in layers.values())
    scale = float(next(iter(layers.values())).fields["scale"])
    if not scale:
        raise ModuleError("an AdaLoRA of scale 0 has no form in peft")
    found: dict[str, Written] = {}
    for path, layer in layers.items():
        a, b, e = (layer.tensors[f"lora_{name}"] for name in "ABE")
        more = rank - len(a)
        a, e = torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([e, e.new_zeros(more, 1)])
        own = float(layer.fields["scale"])
        fields = {"init_r": rank, "lora_alpha": scale * (rank + _EPSILON), "lora_dropout": layer.fields["lora_dropout"], "total_step": 1}
        tensors = {"lora_A": a, "lora_B": torch.cat([b, b.new_zeros(len(b), more)], 1), "lora_E": e if own == scale else e * (own / scale)}
        found[path] = Written(layer.kind, fields, tensors)
    return found


def _same_count(layers: Mapping[str, Written], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Written]:
    """SHiRA has r * (out + in) entries at each layer: zeros at the first free places beside those of the module."""
    rank = max(-(-len(layer.tensors["shira_weight"]) // sum(shapes[path])) for path, layer in layers.items())
    rank = max(rank, 1)
    found: dict[str, Written] = {}
    for path, layer in layers.items():
        out, inner = shapes[path]
        places, values = layer.tensors["shira_indices"].long(), layer.tensors["shira_weight"]
        more = rank * (out + inner) - len(values)
        if rank * (out + inner) > out * inner:
            raise ModuleError(f"{path}: {len(values)} entries of a weight [{out}, {inner}] are more than peft's SHiRA can hold; fold it into the base, or keep it as a module")
        if more:
            taken = torch.zeros(out * inner, dtype=torch.bool)
            taken[places[0] * inner + places[1]] = True
            free = (~taken).nonzero()[:more, 0]
            flat, order = torch.cat([places[0] * inner + places[1], free]).sort()
            places, values = torch.stack([flat // inner, flat % inner]), torch.cat([values, values.new_zeros(more)])[order]
        found[path] = Written(layer.kind, {**layer.fields, "r": rank}, {"shira_indices": places.int(), "shira_weight": values})
    return found
