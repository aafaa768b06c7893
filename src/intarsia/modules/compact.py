"""`compact`: a module with its values in fewer bits, by choice; the result is another module and its card says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch

from intarsia.errors import UsageError, nearest
from intarsia.modules.coding import rounded, takes_int8
from intarsia.modules.module import Module

Values = Literal["fp32", "bf16", "int8"]
LOSS: Mapping[str, str] = MappingProxyType({
    "fp32": "values were rounded to float32 (each off by at most 1/2**24 of itself)",
    "bf16": "values were rounded to bfloat16 (each off by at most 1/256 of itself)",
    "int8": "values were rounded to 8 bits a value, scaled by row (each off by at most 1/253 of its row's largest)",
})  # fmt: skip


def compact(module: Module, dtype: Values) -> Module:
    """The module with its floating-point values rounded; indices and masks stay.

    Args:
        dtype: `fp32` or `bf16` make every floating-point tensor of that type.  `int8` makes them float32 and rounds matrices
            and longer vectors to 255 steps per row, which a file then holds in a byte each.

    Returns:
        The same module if rounding changes nothing; else one with another digest and a warning on its card.

    Raises:
        UsageError: an unknown choice.
    """
    if dtype not in LOSS:
        raise UsageError(f"dtype={dtype!r}: values are stored as {', '.join(LOSS)}{nearest(str(dtype), LOSS)}")
    tensors = {}
    for key, tensor in module.tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            tensor = rounded(tensor) if dtype == "int8" and takes_int8(tensor) else tensor
        tensors[key] = tensor
    warnings = module.card.warnings
    changed = any(not torch.equal(t.double(), module.tensors[k].double()) for k, t in tensors.items() if t.is_floating_point())
    if changed and LOSS[dtype] not in warnings:
        warnings = (*warnings, LOSS[dtype])
    made = replace(module, tensors=tensors, card=replace(module.card, warnings=warnings))
    return module if made.digest == module.digest else made
