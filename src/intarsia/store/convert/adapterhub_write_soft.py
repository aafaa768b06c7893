"""Prefixes, prompts and edits (ReFT) as tensors and fields of AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, listing
from intarsia.patches import Add, Attend, FormSpec, Gated, SubspaceEdit, Tokens
from intarsia.patches.subspace import orthonormal
from intarsia.sites.address import Site
from intarsia.store.convert.adapterhub_kinds import COMBINE, PREFIX_SETS, memories_of, numbered, shared_network
from intarsia.store.convert.adapterhub_parts import Fields, Item, Writing, inner

_PREFIX: Mapping[str, Any] = {"architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": True, "encoder_prefix": True, "init_weights_seed": None,
                              "leave_out": [], "non_linearity": "tanh", "shared_gating": True}  # fmt: skip
_PROMPT: Mapping[str, Any] = {"architecture": "prompt_tuning", "init_weights_seed": None, "prompt_init": "random_uniform", "prompt_init_text": None}


def prefixes(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """The prefixes of all layers, in one set per kind of attention."""
    form, gated = _plain(items[0][1].form)
    tensors: dict[str, Tensor] = {}
    by_site = {site.name: (site, patch.form, ours) for site, patch, ours in items}
    for which in PREFIX_SETS:
        memories = memories_of(writing.sites, which)
        here = [site.name for site in memories if site.name in by_site]
        if not here:
            continue
        if len(here) != len(memories):
            raise ModuleError(f"a prefix is written for all layers of a stack; it lacks {listing(site.name for site in memories if site.name not in by_site)}")
        moves = numbered(writing.sites, memories[0])
        for name in here:
            other, gate = _plain(by_site[name][1])
            if gate != gated or (other.length, other.dropout, other.reparameterise) != (form.length, form.dropout, form.reparameterise):
                raise ModuleError(f"{name}: one configuration is for all prefixes, here they differ")
            if other.shifts != moves:
                raise ModuleError(f"{name}: adapters numbers a text behind its prefix where positions are relative (T5), and this one does {'not' if moves else 'so'} (Attend(shifts=True))")
        tensors |= _set(writing, which, memories, form, [inner(own) if gated else own for own in (by_site[site.name][2] for site in memories)])
    if gated:
        for site, _, ours in items:
            tensors |= {f"{site.path}.prefix_tuning.prefix_gates.{writing.name}.{leaf}": t for leaf, t in (("weight", ours["gate"][None]), ("bias", ours["gate_bias"]))}
    several = len(writing.sites.layers) > 1
    used = {which for which in PREFIX_SETS if any(f".{which}." in key for key in tensors)}
    if "self_prefix" not in used:
        raise ModuleError("adapters has a prefix for the encoder or between the stacks only beside one for the decoder, and this module has none there")
    flags = {flag: not several or flag in used for flag in ("encoder_prefix", "cross_prefix")}
    config = {**_PREFIX, **flags, "dropout": form.dropout, "flat": form.reparameterise is None, "prefix_length": form.length, "use_gating": gated}
    return {**config, "bottleneck_size": form.reparameterise or 512}, tensors


def _plain(form: FormSpec) -> tuple[Attend, bool]:
    """A prefix that adapters can hold, and whether it is under a gate."""
    gated = isinstance(form, Gated)
    if isinstance(form, Gated):
        if form.masked or form.read != "reads":
            raise ModuleError("adapters' gates of prefixes read what the attention reads and count padding (masked=False); this one does not")
        form = form.form
    if not isinstance(form, Attend) or form.factor is not None or form.mix != "shared" or form.relative:
        raise ModuleError("adapters holds keys and values in the attention's own softmax, plain or behind a network; flatten the module: host.extract(name, flatten=True)")
    return form, gated


def _set(writing: Writing, which: str, memories: Sequence[Site], form: Attend, ours: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    lead = f"{writing.lead}prefix_tuning.prefix_tunings.{writing.name}.{which}."
    if form.reparameterise is None:  # [P * 2 * layers * heads * size]: positions first, then key and value of layer 0, of layer 1 ...
        blocks = torch.stack([tensors[leaf] for tensors in ours for leaf in ("keys", "values")])
        return {f"{lead}control_trans": blocks.permute(2, 0, 1, 3).reshape(-1)}
    tied = shared_network(memories[0])
    names = {"wte.weight": "embedding", "control_trans.0.weight": "weight", "control_trans.0.bias": "bias"}
    found = {lead + theirs: writing.tied.pop(f"{tied}.{mine}") for theirs, mine in names.items()}
    return found | {f"{lead}control_trans.2.{leaf}": torch.cat([tensors[leaf] for tensors in ours]) for leaf in ("weight", "bias")}


def prompts(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """The prompt, which must stand where adapters puts it."""
    site, patch, ours = items[0]
    form = patch.form
    if not isinstance(form, Tokens) or len(items) > 1 or form.reparameterise is not None:
        raise ModuleError(f"adapters has one plain prompt; flatten the module: host.extract(name, flatten=True) (found {len(items)} at {site.name})")
    if not form.behind:
        raise ModuleError("adapters puts a prompt behind the norm of the embeddings and without positions; this one stands among the words (Tokens(behind=True))")
    combine = {ours: theirs for theirs, ours in COMBINE.items()}
    config = {**_PROMPT, "combine": combine.get(form.where, "prefix_after_bos"), "prompt_length": form.length}
    return config, {f"{writing.lead}prompt_tuning.prompt_tunings.{writing.name}.prompt_embedding.weight": ours["embeddings"]}


def refts(writing: Writing, items: Sequence[Item]) -> tuple[Fields, dict[str, Tensor]]:
    """Edits of whole blocks at the first and last tokens."""
    form = items[0][1].form
    tensors: dict[str, Tensor] = {}
    if not isinstance(form, SubspaceEdit) or not form.selective or form.activation != "identity":
        raise ModuleError("adapters edits the first and last tokens, without an activation; this edit is another")
    for site, patch, ours in items:
        block = site.name.rpartition(".")[2].isdecimal() and site.port == "out"
        if patch.form != form or patch.op != Add() or not block:
            raise ModuleError(f"{site.name}: adapters edits the outputs of blocks, all in the same way")
        units: dict[str, tuple[int, ...]] = {"edit": (0,)} if form.tied else {"first": (0,), "last": (1,)}
        if not form.tied and len(form.names()) == 1:  # the other one exists there and is never used
            units = {form.names()[0]: (0, 1)}
        for name, places in units.items():
            projection, source = ours[f"units.{name}.projection"], ours[f"units.{name}.source"]
            if not form.subtract:  # W h + b is (W + R) h + b - R h
                source = source + (orthonormal(projection) if form.orthonormal else projection)
                writing.notes["DiReFT is written as the NoReFT that it equals: adapters' files cannot tell them apart"] = None
            for number in places:
                lead = f"{site.path}.reft_layer.refts.{writing.name}.units.{number}."
                tensors |= {f"{lead}learned_source.weight": source.clone(), f"{lead}learned_source.bias": ours[f"units.{name}.bias"].clone()}
                tensors |= {f"{lead}projection.{leaf}": t for leaf, t in _projection(projection, form.orthonormal).items()}
    layers = {(site.stack, site.layer): None for site, _, _ in items}
    numbers = [number for number, key in enumerate(writing.numbers()) if key in layers]
    config = {"architecture": "reft", "dropout": form.dropout, "dtype": None, "init_weights_seed": None, "non_linearity": None, "output_reft": True,
              "layers": "all" if len(numbers) == len(writing.numbers()) else numbers, "orthogonality": form.orthonormal, "prefix_positions": form.first,
              "suffix_positions": form.last, "r": form.rank, "tied_weights": form.tied}  # fmt: skip
    return config, tensors


def _projection(rows: Tensor, orthogonal: bool) -> dict[str, Tensor]:
    """R [r, d] as torch's parametrisation of an orthogonal matrix stores it: base @ householder(original), here base times the identity."""
    if not orthogonal:
        return {"weight": rows.clone()}
    rank, width = rows.shape
    if (rows @ rows.T - torch.eye(rank)).abs().max() > 1e-5:  # a trained one is made orthonormal when it is used
        rows = orthonormal(rows)
    base = torch.linalg.qr(rows.T, mode="complete").Q
    base[:, :rank] = rows.T
    original = torch.zeros(rank, width).fill_diagonal_(-1.0)
    return {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
