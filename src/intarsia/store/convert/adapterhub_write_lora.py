"""LoRA, with a gate or magnitudes (AdapterHub's own DoRA), and (IA)^3 as tensors and fields of AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.patches import Add, Affine, Gated, LowRank, Renorm
from intarsia.sites.address import Site
from intarsia.store.convert.adapterhub_legacy import DEFAULTS
from intarsia.store.convert.adapterhub_parts import Fields, Item, Writing, inner, one
from intarsia.store.convert.folder import tidy

_PLACES = frozenset((*((sublayer, word) for sublayer in ("attn", "xattn") for word in "qkv"), ("ffn", "up"), ("ffn", "down")))
_LORA: Mapping[str, Any] = {
    **DEFAULTS["lora"], "alpha": 8, "architecture": "lora", "dtype": None, "init_weights": "lora", "init_weights_seed": None, "intermediate_lora": False,
    "leave_out": [], "output_lora": False, "r": 8, "selfattn_lora": False,
}  # fmt: skip
#: model types whose feed-forward layers adapters names the other way round
_SWAPPED = ("llama", "mistral")


def loras(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """Low-rank changes of all layers."""
    leaves: list[tuple[Site, dict[str, Tensor]]] = []
    fields: list[Fields] = []
    for site, patch, ours in items:
        form, op = patch.form, patch.op
        extra: dict[str, Tensor] = {}
        found: Fields = {"use_gating": False, "use_dora": False}
        if isinstance(form, Gated) and form.read == "input" and not form.masked and op == Add():
            extra = {"gate.weight": ours["gate"][None], "gate.bias": ours["gate_bias"]}
            ours = inner(ours)
            form, found["use_gating"] = form.form, True
        if isinstance(form, Renorm) and form.whole and not form.scaled_norm and isinstance(form.factor, LowRank) and op == Add():
            extra, found["use_dora"] = {"m.weight": ours["magnitude"][:, None]}, True
            rank, scale, dropout = form.factor.rank, form.scale, form.dropout
        elif isinstance(form, Affine) and form.read == "input" and isinstance(form.factor, LowRank) and isinstance(op, Add):
            rank, scale, dropout = form.factor.rank, op.scale, form.dropout
        else:
            raise ModuleError(f"patch {patch.name!r} at {site.name} has no form as a LoRA of adapters{_why(form)}")
        found |= {"r": rank, "dropout": dropout, "alpha": tidy(scale * rank)}
        fields.append(found)
        leaves.append((site, {"lora_A": ours["factor.down"], "lora_B": ours["factor.up"], **extra}))
    where, tensors = _at_layers(writing, leaves)
    return {**_LORA, **one(fields, "layers"), **where}, tensors


def _why(form: object) -> str:
    if isinstance(form, Renorm):
        return ": its DoRA scales the bias with the rows and leaves alpha / r out of the norm, which is another formula (Renorm(whole=True, scaled_norm=False))"
    if isinstance(form, Gated):
        return ": its gates take the place of alpha / r and count padding (masked=False)"
    return ""


def scales(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """(IA)^3 as adapters has it: at outputs, that of the first feed-forward layer included."""
    where, tensors = _at_layers(writing, [(site, {"lora_B": ours["value"][:, None]}) for site, _, ours in items])
    return {**_LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3", **where}, tensors


def _at_layers(writing: Writing, leaves: Sequence[tuple[Site, dict[str, Tensor]]]) -> tuple[Fields, dict[str, Tensor]]:
    """Fields that say at which layers, and the tensors there."""
    name = writing.name
    tensors: dict[str, Tensor] = {}
    words: dict[tuple[str, int], set[str]] = {}
    cross: dict[tuple[str, int], set[str]] = {}
    forward: dict[tuple[str, int], set[str]] = {}
    fused: dict[str, dict[str, dict[str, Tensor]]] = {}
    swapped = writing.model_type in _SWAPPED
    for site, own in leaves:
        parts = site.name.split(".")
        sublayer, word = (parts[-2], parts[-1]) if len(parts) > 1 else ("", "")
        if site.layer is None or (sublayer, word) not in _PLACES:
            raise ModuleError(f"{site.name}: only q, k and v and both feed-forward layers (up, down) have a LoRA in adapters")
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
    matrices, feed = (next(iter(kind.values()), set()) for kind in (words, forward))
    first, second = ("down", "up") if swapped else ("up", "down")
    return {
        "selfattn_lora": bool(words), "attn_matrices": [word for word in "qkv" if word in matrices] or ["q", "v"], "intermediate_lora": first in feed,
        "output_lora": second in feed, "leave_out": [number for number, key in enumerate(writing.numbers()) if key not in every],
    }, tensors  # fmt: skip
