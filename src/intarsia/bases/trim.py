"""A base with fewer rows in its embedding: only the pieces that some texts use, and the special ones.

A multilingual vocabulary is most of a small model (82 % of `me5-small`).  Texts that the kept pieces cover are split
and computed exactly as before; other texts are split into smaller pieces or unknown ones.  The trimmed base is another
base: its fingerprint differs, and modules do not move between the two.

Why splitting stays the same on covered texts.  Unigram: the best path is kept and only rivals go; the piece with the
lowest score stays, since it sets the price of an unknown character.  BPE: for a kept token, everything its merges go
through is kept, so each step finds the same lowest merge.  WordPiece: the longest match is kept and only rivals go.
This is checked on the texts, not only believed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from intarsia.bases.loading import Base
from intarsia.errors import BaseError, listing

#: generation settings that hold token ids in shapes of their own
ID_SETTINGS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "sequence_bias")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def trim_vocabulary(base: Base, keep: Iterable[str] | Iterable[int]) -> Base:
    """A copy of a base that has only the pieces that `keep` uses, and the special tokens.

    Args:
        keep: texts to be covered (with and without the base's prefix), or token ids.

    Returns:
        A new base; the given one is unchanged.  `model.config.vocab_size` is the number of rows kept.

    Raises:
        BaseError: the tokenizer or the model is of a kind that cannot be trimmed exactly, or a text would be split
            in another way.
    """
    items: list[str | int] = list(keep)
    texts = [item for item in items if isinstance(item, str)]
    numbers = [int(item) for item in items if not isinstance(item, str)]
    if texts and numbers:
        raise BaseError("give texts or token ids to keep, not both")
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise BaseError(f"{base.name} has a {type(base.tokenizer).__name__}; only fast tokenizers can be trimmed")
    size = len(base.tokenizer)
    if outside := [i for i in numbers if not 0 <= i < size]:
        raise BaseError(f"ids to keep lie outside the vocabulary of {size:,}: {listing(map(str, outside))}")
    texts = [*texts, *(base.text_prefix + text for text in texts if base.text_prefix)]
    before = [_ids(base.tokenizer, text) for text in texts]
    state = json.loads(backend.to_str())
    wanted = {i for ids in before for i in ids} | set(numbers) | _special_ids(base, state)
    kept = sorted(_closed(state["model"], wanted))
    rows = {old: new for new, old in enumerate(kept)}
    tokenizer = _tokenizer(base.tokenizer, state, rows)
    for text, ids in zip(texts, before):
        if _ids(tokenizer, text) != [rows[i] for i in ids]:
            raise BaseError(f"{base.name} cannot be trimmed exactly: {text[:60]!r} would be split in another way")
    return replace(
        base,
        model=_model(base.model, kept, size),
        tokenizer=tokenizer,
        name=f"{base.name}-{len(kept)}",
        notes=(*base.notes, f"vocabulary trimmed to {len(kept):,} of {size:,} pieces"),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])


def _configs(model: PreTrainedModel) -> list[Any]:
    return [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]


def _special_ids(base: Base, state: dict[str, Any]) -> set[int]:
    """Ids of added tokens, of the tokenizer's roles, and of everything the model's configuration names."""
    found = {int(token["id"]) for token in state["added_tokens"]} | set(base.tokenizer.all_special_ids)
    for config in _configs(base.model):
        held = config.to_dict()
        if used := [key for key in ID_SETTINGS if held.get(key)]:
            raise BaseError(f"{base.name} cannot be trimmed: its generation settings {listing(used)} hold token ids")
        for value in (held[key] for key in held if key.endswith("token_id") and held[key] is not None):
            found |= set(value if isinstance(value, list) else [value])
    size = len(base.tokenizer)
    return {i for i in found if 0 <= i < size}


def _closed(model: dict[str, Any], wanted: set[int]) -> set[int]:
    """The wanted ids and those without which they would come out differently."""
    kind = model["type"]
    if kind == "Unigram":
        scores = [score for _, score in model["vocab"]]
        return wanted | {scores.index(min(scores))}
    if kind == "WordPiece":
        return wanted
    if kind != "BPE" or model.get("byte_fallback"):
        raise BaseError(f"a {kind} tokenizer{' with byte fallback' if kind == 'BPE' else ''} cannot be trimmed")
    ids: dict[str, int] = model["vocab"]
    parents: dict[int, list[tuple[int, int]]] = {}
    for left, right in map(_pair, model["merges"]):
        parents.setdefault(ids[left + right], []).append((ids[left], ids[right]))
    kept, todo = set(), [*wanted, *(i for token, i in ids.items() if len(token) == 1)]
    while todo:
        if (index := todo.pop()) not in kept:
            kept.add(index)
            todo += [i for pair in parents.get(index, ()) for i in pair]
    return kept


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _processor(state: Any, rows: dict[int, int]) -> None:
    """Renumber the ids inside a post-processor, in place."""
    if isinstance(state, dict):
        if state.get("type") == "TemplateProcessing":
            for token in state["special_tokens"].values():
                token["ids"] = [rows[i] for i in token["ids"]]
        for role in ("sep", "cls"):
            if role in state:
                state[role][1] = rows[state[role][1]]
        for part in state.get("processors", ()):
            _processor(part, rows)


def _tokenizer(old: PreTrainedTokenizerBase, state: dict[str, Any], rows: dict[int, int]) -> PreTrainedTokenizerFast:
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in rows if i < len(model["vocab"])]
        if model["unk_id"] is not None:
            model["unk_id"] = rows[model["unk_id"]]
    else:
        model["vocab"] = {token: rows[i] for token, i in model["vocab"].items() if i in rows}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [m for m in model["merges"] if {*_pair(m), "".join(_pair(m))} <= known.keys()]
    for token in state["added_tokens"]:
        token["id"] = rows[token["id"]]
    _processor(state["post_processor"], rows)
    roles = {role: getattr(old, role) for role in ROLES if getattr(old, role, None) is not None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=old.model_max_length,
        model_input_names=old.model_input_names,
        padding_side=old.padding_side,
        truncation_side=old.truncation_side,
        **roles,
    )
    made.chat_template = old.chat_template
    return made


def _model(model: PreTrainedModel, kept: list[int], size: int) -> PreTrainedModel:
    """A deep copy whose embedding, output layer and output bias hold only the kept rows."""
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.num_embeddings < size:
        raise BaseError(f"{type(model).__name__} has no embedding with a row for each of the {size:,} pieces")
    total = embedding.num_embeddings
    cut: list[torch.Tensor] = [embedding.weight]
    if output is not None:
        cut += [output.weight, *([output.bias] if getattr(output, "bias", None) is not None else [])]
    cut += [b for name, b in model.named_buffers() if name.rpartition(".")[2] == "final_logits_bias"]
    known = {id(tensor) for tensor in cut}
    strays = [n for n, p in model.named_parameters() if total in p.shape and id(p) not in known]
    if strays or any(total not in tensor.shape for tensor in cut):
        raise BaseError(f"{type(model).__name__} has weights per piece that cannot be trimmed: {listing(strays)}")
    index = torch.tensor(kept)
    memo: dict[int, Any] = {}
    for tensor in cut:
        small = tensor.detach().index_select(list(tensor.shape).index(total), index.to(tensor.device))
        memo[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
    # deepcopy puts the small tensors wherever a large one was, so tied weights stay tied
    new: PreTrainedModel = copy.deepcopy(model, memo)
    rows = {old: i for i, old in enumerate(kept)}
    for module in new.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == total:
            module.num_embeddings = len(kept)
            if module.padding_idx is not None:
                module.padding_idx = rows[module.padding_idx]
        elif isinstance(module, nn.Linear) and module.out_features == total and module.weight.shape[0] == len(kept):
            module.out_features = len(kept)
    for config in _configs(new):
        _renumber(config, rows)
    new.config.vocab_size = len(kept)
    return new


def _renumber(config: Any, rows: dict[int, int]) -> None:
    """Give the ids that a configuration names their new numbers; an id without a piece is dropped to None."""
    for key, value in config.to_dict().items():
        if key.endswith("token_id") and value is not None:
            setattr(config, key, [rows.get(i) for i in value] if isinstance(value, list) else rows.get(value))
