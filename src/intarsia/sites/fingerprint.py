"""`Fingerprint`: which base a module belongs to, in a form that can be stored, compared and explained.

It is taken from `model.base_model`, so `BertModel`, `BertForMaskedLM` and `BertForSequenceClassification` around the
same weights agree.  Left out on purpose:

* the task head (also where a model is its own base: T5's `lm_head`),
* the pooler (every child of the base whose name starts with `pooler`): classes differ in whether they build one, and
  some checkpoints come without, so that it is initialised at random,
* intarsia's own sockets, and buffers that are not saved with a checkpoint.

The weights hash (version 1).  Tensors in the order of their names; of each its name, its shape and values: all of them
up to 33,792 elements, else 33 blocks of 1,024 spread evenly from the first element to the last.  Floating-point values
are rounded to bfloat16 first (to nearest, ties to even, as loading in bfloat16 does); others count bit by bit.
A base in bfloat16 therefore has the fingerprint of its float32 original, on every device.  A float32 checkpoint loaded
in float16 has not: rounding twice is not rounding once; `difference` says so.

What is not here: finding the base a fingerprint names (`intarsia.bases`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import BaseError
from intarsia.sites import structure

BLOCKS, BLOCK = 33, 1024

#: Fields in the order in which they are compared: what explains most comes first.
COMPARED = ("architecture", "layers", "width", "vocabulary", "quantisation", "shapes", "weights", "tokenizer")

#: Fields that every stored fingerprint has.
_FIRST = ("architecture", "layers", "width", "vocabulary", "shapes", "weights", "quantisation", "tokenizer", "dtype")

#: Texts whose pieces show normalisation, pre-tokenisation and special tokens.
PROBES = (
    "The quick brown fox can't jump 3.14 metres.",
    "  Straße\tİstanbul ﬁn\u0301\u00a0e ",
    "ɣef yizan n tefsut, ñawi qhichwa simi",
    "日本語のテキスト العربية हिन्दी",
    "😀 <mask> [MASK] </s> 10,000 naïve-CASE",
)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a base is.

    Attributes:
        architecture: `config.model_type`.
        layers: number of layers of each stack (executions, where blocks are shared).
        width: size of the hidden states.
        vocabulary: rows of the input embedding; 0 without one.
        shapes: digest of the names and shapes of all tensors.
        weights: digest of sampled values, see above.
        quantisation: the quantisation settings as JSON, None for a base that is not quantised.
        tokenizer: digest of vocabulary, special tokens and behaviour, None if no tokenizer was given.
        dtype: floating-point type in which the base was loaded; told in messages, never compared.
    """

    architecture: str
    layers: tuple[int, ...]
    width: int
    vocabulary: int
    shapes: str
    weights: str
    quantisation: str | None = None
    tokenizer: str | None = None
    dtype: str = field(default="", compare=False)

    def difference(self, other: Fingerprint) -> str | None:
        """The first field that differs, with both values; None where the two name the same base.

        Tokenizers are compared only if both fingerprints have one.
        """
        for name in COMPARED:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs or (name == "tokenizer" and None in (mine, theirs)):
                continue
            hint = ""
            if name == "weights" and self.dtype != other.dtype and "float16" in (self.dtype, other.dtype):
                hint = f" (loaded as {self.dtype} and {other.dtype}: load both in one type, or in bfloat16, to compare)"
            return f"{name}: {_show(mine)} and {_show(theirs)}{hint}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.  Fields that came later than `_FIRST` are left out at their default, so that they change no digest."""
        values = {**asdict(self), "layers": list(self.layers)}
        return {f.name: values[f.name] for f in fields(self) if f.name in _FIRST or values[f.name] != f.default}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`; a missing optional field has its default.

        Raises:
            ValueError: not such a mapping; the message names the field.
        """
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("architecture", "shapes", "weights", "dtype"), (str,)),
            **dict.fromkeys(("quantisation", "tokenizer"), (str, type(None))),
            **dict.fromkeys(("width", "vocabulary"), (int,)),
            "layers": (list, tuple),
        }
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        if not isinstance(value, Mapping) or not needed <= set(value) <= set(kinds):
            found = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"a fingerprint has the fields {sorted(kinds)}, found {found}")
        for name, allowed in kinds.items():
            if name in value and (not isinstance(value[name], allowed) or isinstance(value[name], bool)):
                raise ValueError(f"fingerprint: {name} is {type(value[name]).__name__}, expected {allowed[0].__name__}")
        if not all(type(count) is int for count in value["layers"]):
            raise ValueError("fingerprint: layers is not a list of integers")
        plain: dict[str, Any] = {**value, "layers": tuple(value["layers"])}
        return cls(**plain)


def fingerprint(model: PreTrainedModel, tokenizer: Any = None) -> Fingerprint:
    """The fingerprint of a model's base, and of its tokenizer if given.

    Takes well under a second for a base of 100 million parameters; nothing is changed, and values are read on the
    device where they lie (weights that accelerate has offloaded are read from where it keeps them).

    Raises:
        BaseError: a tensor has no values (meta device).
    """
    config = model.config
    shapes, weights = _hasher(), _hasher()
    dtypes: dict[str, int] = {}
    for name, module, tensor in sorted(_tensors(model), key=lambda entry: entry[0]):
        described = f"{name}\0{tuple(tensor.shape)}\0".encode()
        shapes.update(described)
        weights.update(described)
        weights.update(_sample(_values(name, module, tensor)))
        if tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            dtypes[kind] = dtypes.get(kind, 0) + tensor.numel()
    return Fingerprint(
        architecture=str(config.model_type),
        layers=_layers(config),
        width=int(getattr(config.get_text_config(), "hidden_size", 0) or 0),
        vocabulary=_vocabulary(model),
        shapes=shapes.hexdigest(),
        weights=weights.hexdigest(),
        quantisation=_quantisation(model),
        tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
        dtype=max(dtypes, key=lambda kind: dtypes[kind], default=""),
    )


def _hasher() -> Any:
    return hashlib.blake2b(digest_size=16, person=b"intarsia base 1")


def _show(value: object) -> str:
    return "none" if value is None else f"{value!r}" if isinstance(value, str) else str(value)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name below the base, module that holds it, tensor) of every tensor of the base, tied ones repeatedly."""
    base = model.get_submodule(structure.base_path(model))
    head = structure.output_embeddings(model)
    for path, module in base.named_modules(remove_duplicate=False):
        if module is head or path.startswith("pooler") or structure.is_socket(path):
            continue
        kept = {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield structure.join(path, name), module, tensor


def _values(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor.detach()
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if offloaded is None:
        raise BaseError(
            f"the base has no values at {name!r} (meta device), so it cannot be told which base it is; "
            "load its weights first"
        )
    values: Tensor = offloaded[name.rpartition(".")[2]]
    return values


def _sample(tensor: Tensor) -> bytes:
    """The bytes of a tensor's sampled values, the same on every machine."""
    flat = tensor.reshape(-1)
    if len(flat) > BLOCKS * BLOCK:
        starts = [(len(flat) - BLOCK) * block // (BLOCKS - 1) for block in range(BLOCKS)]
        flat = torch.cat([flat[start : start + BLOCK] for start in starts])
    if flat.is_floating_point():
        return bytes(flat.to(torch.bfloat16).view(torch.int16).cpu().numpy().astype("<i2").tobytes())
    if flat.dtype == torch.bool or flat.element_size() == 1:
        return bytes(flat.view(torch.uint8).cpu().numpy().tobytes())
    return bytes(flat.to(torch.int64).cpu().numpy().astype("<i8").tobytes())


def _layers(config: Any) -> tuple[int, ...]:
    if getattr(config, "is_encoder_decoder", False):
        pairs = (("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers"))
        return tuple(
            next((int(getattr(config, n)) for n in names if getattr(config, n, None) is not None), 0) for names in pairs
        )
    return (int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0),)


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        return int(getattr(model.get_input_embeddings(), "num_embeddings", 0))
    except (NotImplementedError, AttributeError):
        return 0


def _quantisation(model: PreTrainedModel) -> str | None:
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        packed = {type(m).__module__.split(".nn")[0] for m in model.modules() if ".quantized" in type(m).__module__}
        return json.dumps(sorted(packed)) if packed else None
    plain = settings if isinstance(settings, Mapping) else settings.to_dict()
    kept = {name: value for name, value in plain.items() if value not in (None, False) and not name.startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str)


def _tokenizer(tokenizer: Any) -> str:
    """Digest of what a tokenizer does: its vocabulary, its special tokens, its pieces for some difficult texts."""
    digest = _hasher()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    pieces = [tokenizer(text, truncation=False, padding=False)["input_ids"] for text in PROBES]
    digest.update(json.dumps([vocabulary, special, pieces], ensure_ascii=True).encode())
    return str(digest.hexdigest())
