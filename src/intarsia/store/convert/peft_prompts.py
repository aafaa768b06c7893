"""Prompts and prefixes of peft's files, read and written.

Positions.  peft hands a prefix to the model as a cache of P positions, so that the text starts at position P; here a prefix has
no position, and the text starts at 0.  What is read or written is converted so that outputs are equal:

* rotary embedding: peft's keys k are met by queries turned P positions further, so ours are R(-P) k;
* a table of relative positions (T5): the prefix stands right in front of the text (`Attend.relative`);
* a table of absolute positions: a change of the table that moves its rows up by P goes with the prefix.

Two stacks.  peft repeats the list k0 v0 k1 v1 ... for self- and cross-attention, cuts it into four per layer and drops the
cross-attention's part, so that layer i of the decoder is given what the file has for layer 2 i mod L.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import ModuleError, listing
from intarsia.methods.method import Patch
from intarsia.patches import Add, Attend, Concat, Matrix, Tokens
from intarsia.sites.address import Site, SiteMap
from intarsia.store.convert.folder import as_float
from intarsia.store.convert.peft_config import Config
from intarsia.store.convert.pieces import Piece
from intarsia.store.convert.values import base_value, exact_change

PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT", *PREFIXES)
EMBEDDINGS = "prompt_embeddings"
#: name of the patch that moves a table of positions
MOVED = "positions"


@dataclass
class Read:
    """What a file's prompt is at the sites of a model."""

    pieces: list[Piece] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Written:
    """What a prompt is in peft's files."""

    kind: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def read_prompt(config: Config, shared: Mapping[str, Tensor], sites: SiteMap, weights: Mapping[str, Tensor] | None, model: PreTrainedModel | None) -> Read:
    """The prompt or prefix of a file.

    Raises:
        ModuleError: its tensors do not fit the configuration or the model.
    """
    value = shared.get(EMBEDDINGS)
    if value is None or value.dim() != 2:
        raise ModuleError(f"{config.kind}: the file has no matrix {EMBEDDINGS!r}")
    length = len(config["cpt_token_ids"] or ()) if config.kind == "CPT" else int(config["num_virtual_tokens"])
    if config.kind in PREFIXES:
        return _read_prefix(value, length, sites, weights, model)
    if value.shape[0] not in (length, 2 * length):
        raise ModuleError(f"the prompt has {length} tokens by its configuration, {EMBEDDINGS} has {value.shape[0]} rows")
    found = Read()
    if value.shape[0] == 2 * length:
        found.notes.append(f"the last {length} rows of {EMBEDDINGS} are never read by peft's forward, and are not carried")
    seq = sites.select("seq", port="seq")[0]
    found.pieces.append(Piece(seq.name, "prompt", Tokens(length, "start", "uniform"), Concat(), "seq", {"embeddings": value[:length].clone()}))
    if bidirectional(model) if model is not None else "head" in sites.missing and not seq.stack:
        found.notes.append("a classifier of the model's own reads the first position, which is a virtual token in peft and the first token of the text here: its outputs differ")
    return found


def read_adaption(tensors: Mapping[str, Tensor], sites: SiteMap, weights: Mapping[str, Tensor] | None) -> Read:
    """LLaMA-Adapter: peft trains tokens, which the layer's own projections turn into keys and values, and a gate.

    Args:
        tensors: of the file, by the path of the attention and their name.
    """
    found = Read(notes=["it becomes the keys and values that its tokens give: the same outputs, other parameters if training goes on"])
    memories = {site.path: site for site in sites.values() if site.port == "mem"}
    for key in sorted(key for key in tensors if key.endswith(".adaption_prompt")):
        path = key.rpartition(".")[0]
        gate = tensors.get(f"{path}.adaption_gate")
        tokens = tensors[key]
        if path not in memories or gate is None or tokens.dim() != 3 or len(tokens) != 1:
            raise ModuleError(f"{key} {tuple(tokens.shape)}: expected [1, length, width] and a gate at an attention of {sites.model}")
        site = memories[path]
        heads, size = site.heads  # type: ignore[misc]
        projected = [_projected(sites, weights, site.name.replace(".mem", f".{part}"), tokens[0]) for part in "kv"]
        keys, values = (t.unflatten(-1, (heads, size)).transpose(0, 1).contiguous() for t in projected)
        if f"{site.name.replace('.mem', '.o')}.bias" in sites:
            raise ModuleError(f"{path}: peft adds the bias of the attention's output a second time; not read")
        form = Attend(tokens.shape[1], None, mix="zero_gate")
        found.pieces.append(Piece(site.name, "prefix", form, Concat(), "mem", {"keys": keys, "values": values, "gate": gate}))
    unknown = sorted(key for key in tensors if not key.endswith((".adaption_prompt", ".adaption_gate")))
    if unknown or 2 * len(found.pieces) != len(tensors):
        raise ModuleError(f"tensors that ADAPTION_PROMPT does not have, or that lack their partner: {listing(unknown or sorted(tensors), 4)}")
    return found


def _projected(sites: SiteMap, weights: Mapping[str, Tensor] | None, name: str, tokens: Tensor) -> Tensor:
    """What the base's own projection gives for tokens [P, d]."""
    if weights is None:
        raise ModuleError("peft keeps tokens, which the base's projections turn into keys and values; give weights=model.state_dict()")
    if f"{name}.weight" not in sites:
        raise ModuleError(f"{sites.model} has no projection {name!r} to turn peft's tokens into keys and values")
    site = sites[f"{name}.weight"]
    if site.view is not None:
        raise ModuleError(f"{site.name} is a part of a fused projection; LLaMA-Adapters of such models are not read")
    found = tokens @ base_value(weights, site).T
    bias = f"{name}.bias"
    return found + base_value(weights, sites[bias]) if bias in sites else found


def _memories(sites: SiteMap) -> list[Site]:
    """The attentions that peft's cache reaches: all of a model with one stack, the decoder's self-attention of one with two."""
    found = [site for site in sites.values() if site.port == "mem" and not site.name.endswith("xattn.mem") and site.stack in ("", "decoder")]
    if not found:
        raise ModuleError(f"{sites.model} has no attention memory to put a prefix into: {sites.missing.get('attn.mem', '')}")
    return found


def _order(memories: list[Site]) -> list[int]:
    """Which of a file's layers each attention is given."""
    count = len(memories)
    return [2 * index % count for index in range(count)] if memories[0].stack else list(range(count))


def _read_prefix(value: Tensor, length: int, sites: SiteMap, weights: Mapping[str, Tensor] | None, model: PreTrainedModel | None) -> Read:
    """[P, layers * 2 * heads * size]: key and value of layer 0, of layer 1 ..."""
    memories = _memories(sites)
    heads, size = memories[0].heads  # type: ignore[misc]
    wanted = (length, len(memories) * 2 * heads * size)
    if tuple(value.shape) != wanted:
        raise ModuleError(f"{EMBEDDINGS} has shape {tuple(value.shape)}; {length} positions of this model's {len(memories)} layers are {wanted}")
    blocks = value.view(length, 2 * len(memories), heads, size).permute(1, 2, 0, 3)
    found = Read()
    positions = Positions(sites, weights, model, length)
    found.notes += positions.notes
    form = Attend(length, None, relative=positions.relative)
    order = _order(memories)
    if len(set(order)) < len(order):
        found.notes.append("peft gives half of the decoder's layers the numbers of the other half, and never reads the rest of the file, which is not carried")
    for index, site in zip(order, memories):
        keys, values = positions.turned(blocks[2 * index], -1), blocks[2 * index + 1].clone()
        found.pieces.append(Piece(site.name, "prefix", form, Concat(), "mem", {"keys": keys, "values": values}))
    if positions.table is not None:
        found.pieces.append(Piece(positions.table.name, MOVED, Matrix(), Add(), "weight", {"factor.value": positions.change()}))
        found.notes.append(f"it moves the table of positions by {length}, as peft does")
    return found


def write_prompt(
    patch: Patch,
    found: Mapping[str, dict[str, Tensor]],
    moved: tuple[Site, Tensor] | None,
    sites: SiteMap,
    weights: Mapping[str, Tensor] | None,
    model: PreTrainedModel | None,
) -> Written:
    """A prompt or prefix as peft keeps it.

    Args:
        found: its tensors by site.
        moved: a change of a table of positions beside it.

    Raises:
        ModuleError: peft has no place for it.
    """
    memories = [site for site in sites.values() if site.port == "mem"]
    fields: dict[str, Any] = {"num_transformer_submodules": 1, "num_layers": max(sites.layers.values())}
    if isinstance(patch.form, Attend):
        return _write_prefix(patch.form, found, moved, fields, sites, weights, model)
    form = patch.form
    assert isinstance(form, Tokens)
    name, tensors = next(iter(found.items()))
    if form.reparameterise is not None or form.where == "after_first" or form.behind or "embeddings" not in tensors or moved is not None:
        raise ModuleError("peft puts plain embeddings among the words at the start of the sequence; flatten the module, and train it with where='start', behind=False")
    result = Written("PROMPT_TUNING", fields, {})
    value = tensors["embeddings"]
    if form.where == "auto" and (model is None or bidirectional(model)):
        result.notes.append("peft puts the prompt at the start; in an encoder this module puts it behind the first token, and outputs differ")
    if sites[name].stack:
        value = torch.cat([value, torch.zeros_like(value)])
        fields["num_transformer_submodules"] = 2
    heads = memories[0].heads[0] if memories and memories[0].heads else None
    fields |= {"num_virtual_tokens": form.length, "token_dim": value.shape[1], "num_attention_heads": heads}
    return replace(result, tensors={EMBEDDINGS: value})


def _write_prefix(
    form: Attend,
    found: Mapping[str, dict[str, Tensor]],
    moved: tuple[Site, Tensor] | None,
    fields: dict[str, Any],
    sites: SiteMap,
    weights: Mapping[str, Tensor] | None,
    model: PreTrainedModel | None,
) -> Written:
    if form.reparameterise is not None or form.factor is not None or form.mix != "shared":
        raise ModuleError("peft holds plain keys and values in the attention's own softmax; flatten the module: host.extract(name, flatten=True)")
    memories = _memories(sites)
    missing, more = [site.name for site in memories if site.name not in found], sorted(set(found) - {site.name for site in memories})
    if missing or more:
        where = "all layers" if not memories[0].stack else "the self-attention of all layers of the decoder, and nowhere else"
        raise ModuleError(f"peft's prefix is for {where}; here it is {'missing' if missing else 'also'} at {listing(missing or more, 4)}")
    length = int(found[memories[0].name]["keys"].shape[1])
    positions = Positions(sites, weights, model, length)
    notes = list(positions.notes)
    if positions.relative != form.relative:
        what = "moves the text's positions (shifts=True)" if form.shifts else "has no position (relative=False)"
        notes.append(f"peft puts a prefix right in front of the text; this one {what}, so outputs differ")
    if positions.table is not None and (moved is None or not torch.allclose(as_float(moved[1]), positions.change().to(as_float(moved[1]).dtype), atol=1e-6)):
        notes.append(f"peft also moves the tokens' positions by {length}; this module does not, so outputs differ")
    if moved is not None and positions.table is None and model is not None:
        raise ModuleError("a change of the table of positions beside a prefix has no form in peft")
    order = _order(memories)
    given: dict[int, tuple[Tensor, Tensor]] = {}
    for index, site in zip(order, memories):
        pair = (positions.turned(found[site.name]["keys"], 1), as_float(found[site.name]["values"]))
        if any(not torch.equal(one, other) for one, other in zip(given.setdefault(index, pair), pair)):
            raise ModuleError(f"peft gives {site.name} the numbers of another layer (of two stacks with an even number of layers), and here they differ; keep it as a module")
    empty = tuple(torch.zeros_like(t) for t in given[0])
    blocks = torch.stack([t for index in range(len(memories)) for t in given.get(index, empty)])
    heads, size = blocks.shape[1], blocks.shape[3]
    fields |= {"num_virtual_tokens": length, "token_dim": heads * size, "num_attention_heads": heads, "encoder_hidden_size": heads * size}
    if memories[0].stack:
        fields["num_transformer_submodules"] = 2
    return Written("PREFIX_TUNING", fields, {EMBEDDINGS: blocks.permute(2, 0, 1, 3).reshape(length, -1)}, notes)


def bidirectional(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder alone."""
    config = model.config
    return not (getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False) or model.can_generate())


class Positions:
    """What a model does with the positions of a text behind a cache of `length`, and how that is made up for.

    Attributes:
        relative: it has a table of relative positions.
        table: its table of absolute positions, if that can be moved.
        notes: why outputs differ, if they do.
    """

    def __init__(self, sites: SiteMap, weights: Mapping[str, Tensor] | None, model: PreTrainedModel | None, length: int) -> None:
        self.length = length
        self.model = model
        self.relative = weights is not None and any("relative_attention_bias" in name for name in weights)
        self.rotary = None if model is None else _rotary(model)
        self.table: Site | None = None
        self.notes: list[str] = []
        self._rows: Tensor | None = None
        stack = "decoder." if any(site.stack == "decoder" for site in sites.values()) else ""
        name = f"{stack}embed.position.weight"
        if self.relative or self.rotary is not None:
            return
        if model is None or bidirectional(model):
            self.notes.append(f"peft also moves the tokens' positions by {length}; here they stay, so outputs of models with positions differ; give model= to make up for it")
        elif name in sites and weights is not None:
            self.table = sites[name]
            self._rows = base_value(weights, self.table)
        else:
            self.notes.append(f"peft also moves the tokens' positions by {length}, and this model's cannot be moved; so outputs differ")

    def change(self) -> Tensor:
        """Of the table, so that each row becomes the one `length` further; the last rows, which no text reaches in peft, stay."""
        rows = self._rows
        assert rows is not None
        moved = torch.cat([rows[self.length :], rows[len(rows) - min(self.length, len(rows)) :]])
        return exact_change(moved, rows)

    def turned(self, keys: Tensor, direction: int) -> Tensor:
        """Keys [heads, P, size] turned by `length` positions, back (in double precision where they would not return) or on."""
        if self.rotary is None:
            return as_float(keys).clone()
        found = _turned(self.rotary, keys, self.length, direction)
        single = found.float()
        if direction < 0 and not torch.equal(_turned(self.rotary, single, self.length, 1).float(), as_float(keys)):
            return found
        return single


def _rotary(model: PreTrainedModel) -> tuple[Any, Any] | None:
    """The one rotary embedding of a model, and the function of its file that turns queries and keys; None if there is none, or several."""
    found = [module for name, module in model.named_modules() if name.endswith("rotary_emb") and hasattr(module, "inv_freq")]
    turn = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    return (found[0], turn) if len(found) == 1 and turn is not None else None


def _turned(rotary: tuple[Any, Any], keys: Tensor, by: int, direction: int) -> Tensor:
    embed, turn = rotary
    with torch.no_grad():
        states = keys[None].to(embed.inv_freq.device, torch.float64)
        cosine, sine = embed(states.float(), torch.full((1, 1), by, device=states.device))
        angle = direction * torch.atan2(sine.double(), cosine.double())  # without what scales both, and exact there and back
        _, found = turn(states, states, angle.cos(), angle.sin())
    return found[0].cpu().contiguous()
