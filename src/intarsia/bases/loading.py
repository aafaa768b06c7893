"""A base: model, tokenizer and what is known about them, from a path, an embedded name or a hub id.

What is here: making the model with the wanted head and checking that every weight was found.  What is not: finding the
folder (`resolve.py`).  Weights are read from safetensors only, code in a model folder is never run, and nothing global
is left changed: not the random state, not the libraries' logging.
"""

from __future__ import annotations

import inspect
import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from intarsia.bases.resolve import Found, named, resolve
from intarsia.errors import BaseError, UsageError, listing, nearest

Head = Literal["causal-lm", "masked-lm", "seq2seq-lm", "none"]

#: head -> the factory, and its table from configuration class to model class
HEADS: Mapping[str, tuple[Any, Mapping[type, Any]]] = {
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked-lm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "seq2seq-lm": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "none": (AutoModel, MODEL_MAPPING),
}
#: how the class in `config.architectures` ends -> the head it has
ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "MTModel": "seq2seq-lm",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model", "*.spm")
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST_HEADER = 1 << 25
#: start of fresh weights; the same head is made every time
SEED = 0

_quiet_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class Base:
    """A pretrained model to lay modules into.

    Attributes:
        model: in eval mode, on the CPU.
        tokenizer: the model's own.
        name: short name, for cards and reports.
        source: where it came from: package and version, folder, or hub id and commit.
        licence: of the weights; `unknown` if nothing says it.
        notes: what a user must know, e.g. weights that were freshly made.
        pooling: how token vectors become a sentence vector (`mean`, `cls`, `last`), None if nothing says it.
        text_prefix: what the model expects before every text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    licence: str
    notes: tuple[str, ...] = ()
    pooling: str | None = None
    text_prefix: str = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or load reports of transformers, no trace in the random state; all is put back afterwards."""
    with _quiet_lock, torch.random.fork_rng(devices=[]):
        level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        torch.default_generator.manual_seed(SEED)  # the CPU's only, which fork_rng puts back
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


def stored_weights(folder: Path) -> dict[str, int]:
    """Number of values of every floating-point tensor in a folder's safetensors files, read from the headers only.

    Integer tensors are buffers that older releases of transformers saved (`position_ids`), not weights.

    Raises:
        BaseError: a file is truncated or its header is no safetensors header.
    """
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise BaseError(f"{path} is no safetensors file, or is cut short ({size:,} bytes)")
            try:
                header = json.loads(handle.read(length))
                entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
                floats = {name: entry for name, entry in entries.items() if str(entry["dtype"]) in FLOATS}
                found |= {name: prod(map(int, entry["shape"])) for name, entry in floats.items()}
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise BaseError(f"{path} has a damaged safetensors header: {error}") from error
        if end + 8 + length != size:
            raise BaseError(f"{path} has {size:,} bytes, its header describes {end + 8 + length:,}")
    return found


def load(
    name: str | Path,
    *,
    head: Head | None = None,
    dtype: str = "float32",
    allow_network: bool = False,
    revision: str | None = None,
    verify: bool = False,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        name: a folder with `config.json`, an embedded name (see `list_bases`), or a hub id, tried in this order.
        head: the head on top; None for the one the folder declares, `none` for the bare model.  A head that the folder
            has no weights for is freshly made, always the same, and named in `notes`.
        dtype: `float32`, `bfloat16` or `float16`.
        allow_network: a hub id may be downloaded; without it nothing opens a connection.
        revision: branch, tag or commit of a hub id.
        verify: compare the digests of a cached copy, and an embedded base with its package's own engine.

    Raises:
        UsageError: `head` or `dtype` is unknown.
        BaseError: the base is absent, damaged, incomplete, or would need a pickle or foreign code.
    """
    for value, known in ((dtype, DTYPES), (head, HEADS)):
        if value is not None and value not in known:
            raise UsageError(f"unknown {value!r}{nearest(value, known)}; known: {listing(known)}")
    found = resolve(name, allow_network=allow_network, revision=revision, verify=verify)
    stored = stored_weights(found.folder)
    if found.parameters is not None and sum(stored.values()) != found.parameters:
        raise BaseError(
            f"{found.folder} holds {sum(stored.values()):,} weights, {found.name} has {found.parameters:,}; "
            f"the package behind it changed: {found.source}"
        )
    with _quiet():
        config = _config(found)
        model, notes = _model(found, config, head or declared_head(config), DTYPES[dtype], stored)
        tokenizer = _tokenizer(found)
    base = Base(
        model=model,
        tokenizer=tokenizer,
        name=found.name,
        source=found.source,
        licence=found.licence,
        notes=(*found.notes, *notes),
        pooling=found.pooling,
        text_prefix=found.text_prefix,
    )
    if verify and found.comparer and head in (None, "none") and dtype == "float32":
        base = replace(base, notes=(*base.notes, named(found.comparer)(base)))
    return base


def declared_head(config: PreTrainedConfig) -> Head:
    """The language-model head that `config.architectures` declares, `none` for anything else."""
    for architecture in config.architectures or ():
        for ending, head in ENDINGS.items():
            if architecture.endswith(ending):
                return cast(Head, head)
    return "none"


def _config(found: Found) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseError(
            f"transformers cannot make a model of {found.folder / 'config.json'}, and code from a model folder is never "
            f"run: {_first_line(error)}"
        ) from error


def _refuse_two_sided(found: Found, config: PreTrainedConfig) -> None:
    """An encoder with a causal head attends to what it should predict unless its configuration says `is_decoder`."""
    both = all(type(config) in HEADS[head][1] for head in ("masked-lm", "causal-lm"))
    if both and not config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        raise BaseError(
            f"{found.name} ({config.model_type}) is an encoder: with a causal head it would see the words it predicts; "
            "use head 'masked-lm' or 'none', or set is_decoder in a copy of its config.json"
        )


def _model(
    found: Found, config: PreTrainedConfig, head: Head, dtype: torch.dtype, stored: Mapping[str, int]
) -> tuple[PreTrainedModel, list[str]]:
    factory, classes = HEADS[head]
    if type(config) not in classes:
        heads = [name for name, (_, others) in HEADS.items() if type(config) in others]
        raise BaseError(f"{found.name} ({config.model_type}) has no {head} form; it has: {listing(heads)}")
    if head == "causal-lm":
        _refuse_two_sided(found, config)
    options: dict[str, Any] = {}
    chosen = classes[type(config)]
    candidates = chosen if isinstance(chosen, (list, tuple)) else (chosen,)
    if not any("pooler." in key for key in stored) and all("add_pooling_layer" in _parameters(c) for c in candidates):
        options["add_pooling_layer"] = False  # else a pooler with random weights would be made
    try:
        model, info = factory.from_pretrained(
            found.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BaseError(f"cannot load the weights in {found.folder}: {_first_line(error)}") from error
    return model.eval(), _account(found, model, head, info)


def _parameters(model_class: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model_class.__init__).parameters  # type: ignore[misc]


def _account(found: Found, model: PreTrainedModel, head: Head, info: Mapping[str, Any]) -> list[str]:
    """Notes on weights that were made or left out; weights missing from the body are an error."""
    prefix = model.base_model_prefix + "."
    bare = model.base_model is model
    missing = sorted(info["missing_keys"])
    body = [key for key in missing if bare or key.startswith(prefix)]
    if body or info["mismatched_keys"]:
        wrong = body or [str(key[0]) for key in info["mismatched_keys"]]
        raise BaseError(
            f"{found.folder} does not hold the whole {type(model).__name__}: {len(wrong)} weights are missing or have "
            f"another shape: {listing(wrong, 4)}"
        )
    notes = []
    if missing:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        count = sum(parameters[key].numel() for key in missing if key in parameters)
        notes.append(f"no weights for its {head} head: {count:,} values freshly made ({listing(missing, 4)})")
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(f"{len(unexpected)} weights in the folder were not used ({listing(unexpected, 4)})")
    return notes


def _tokenizer(found: Found) -> PreTrainedTokenizerBase:
    # without any file of its own transformers would make an empty tokenizer and say nothing
    if not any(path for pattern in TOKENIZER_FILES for path in found.folder.glob(pattern)):
        raise BaseError(f"{found.folder} has no tokenizer; expected tokenizer.json or the files of its kind beside the weights")
    try:
        made = AutoTokenizer.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise BaseError(f"cannot load the tokenizer in {found.folder}: {_first_line(error)}") from error
    return cast(PreTrainedTokenizerBase, made)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
