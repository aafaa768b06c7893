"""What a peft configuration says beyond the numbers (initialisation, how layers are chosen, task ...): kept in the card's recipe by the
reader, and put back by the writer if the module is still what that configuration describes.

It travels in the card because it is about training and changes no output; the writer never trusts it: a configuration is put back only
if reading it together with the tensors that are written gives the module again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from intarsia.modules.module import DTYPE_NAMES, DTYPES, Module
from intarsia.store.convert.peft_config import COMMON, DEFAULTS

#: keys of the recipe: the fields that differ from peft's defaults; which tensors the file had; of what type they were
FIELDS, TENSORS, DTYPE = "peft", "peft_tensors", "peft_dtype"
#: a longer configuration is not kept
LIMIT = 64_000


def kept(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Entries of a card's recipe for a configuration and the file beside it."""
    defaults = {**COMMON, **DEFAULTS[str(raw["peft_type"])]}
    fields = {key: value for key, value in raw.items() if key == "peft_type" or type(value) is not type(defaults[key]) or value != defaults[key]}
    if len(json.dumps(fields)) > LIMIT:
        return {}
    found: dict[str, object] = {FIELDS: fields, TENSORS: _names(tensors)}
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(kinds) == 1 and kinds != {torch.float32} and kinds <= DTYPE_NAMES.keys():
        found[DTYPE] = DTYPE_NAMES[kinds.pop()]
    return found


def origin(module: Module) -> dict[str, Any]:
    """The configuration a module was read with, in full; empty for modules from elsewhere."""
    fields = module.card.recipe.get(FIELDS)
    if not isinstance(fields, Mapping) or fields.get("peft_type") not in DEFAULTS:
        return {}
    known = {**COMMON, **DEFAULTS[str(fields["peft_type"])]}
    return {**known, **_lists(fields)} if set(fields) <= set(known) else {}


def _lists(value: Any) -> Any:
    """The same plain value with lists, where a card has tuples."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def same_file(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of the file that a module was read from, by name and shape."""
    return module.card.recipe.get(TENSORS) == _names(tensors)


def narrowed(module: Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the type the file had, if not a bit is lost by that."""
    dtype = DTYPES.get(str(module.card.recipe.get(DTYPE)))
    if dtype is None or not dtype.is_floating_point:
        return dict(tensors)
    small = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    return small if all(torch.equal(t.to(tensors[key].dtype), tensors[key]) for key, t in small.items()) else dict(tensors)


def _names(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\n".join(sorted(f"{name} {list(t.shape)}" for name, t in tensors.items())).encode()).hexdigest()[:16]
