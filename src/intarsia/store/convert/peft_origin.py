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

#: keys of the recipe: the fields that differ from peft's defaults; which tensors the file had; of what types they were
FIELDS, TENSORS, DTYPE = "peft", "peft_tensors", "peft_dtype"
#: a longer configuration is not kept
LIMIT = 64_000
#: types of more tensors are not kept one by one
MANY = 500


def kept(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Entries of a card's recipe for a configuration and the file beside it."""
    defaults = {**COMMON, **DEFAULTS[str(values["peft_type"])]}
    fields = {key: value for key, value in values.items() if key == "peft_type" or type(value) is not type(defaults[key]) or value != defaults[key]}
    if len(json.dumps(fields)) > LIMIT:
        return {}
    found: dict[str, object] = {FIELDS: fields, TENSORS: _names(tensors)}
    types = {key: DTYPE_NAMES[t.dtype] for key, t in tensors.items() if t.is_floating_point() and t.dtype in DTYPE_NAMES}
    narrow = {key: name for key, name in types.items() if name != "F32"}
    if narrow:
        every = len(set(types.values())) == 1
        found |= {DTYPE: {"*": next(iter(narrow.values()))}} if every else {DTYPE: narrow} if len(narrow) <= MANY else {}
    return found


def origin(module: Module) -> dict[str, Any]:
    """The configuration a module was read with, in full; empty for modules from elsewhere."""
    fields = module.card.recipe.get(FIELDS)
    if not isinstance(fields, Mapping) or not isinstance(kind := fields.get("peft_type"), str) or kind not in DEFAULTS:
        return {}
    if not isinstance(fields.get("modules_to_save"), (list, tuple, type(None))):
        return {}
    known = {**COMMON, **DEFAULTS[kind]}
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
    """The tensors in the types the file had, where not a bit is lost by that."""
    types = module.card.recipe.get(DTYPE)
    if not isinstance(types, Mapping):
        return dict(tensors)
    found = dict(tensors)
    for key, tensor in tensors.items():
        dtype = DTYPES.get(str(types.get(key, types.get("*"))))
        if dtype is not None and dtype.is_floating_point and tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            found[key] = tensor.to(dtype)
    return found


def _names(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\n".join(sorted(f"{name} {list(t.shape)}" for name, t in tensors.items())).encode()).hexdigest()[:16]
