"""Configurations and keys of AdapterHub's older files (adapter-transformers 1 to 3, `adapters` 0.x and 1.0) in today's terms.

What `adapters` 1.3 itself does when it loads them: fields that came later have their defaults, names of tensors lose their task or
language, activations without a version mean others, and LoRA of versions before 1.1 was never scaled by alpha / r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError

#: fields that files may lack, by kind
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bottleneck": {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False,
        "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False, "leave_out": [], "ln_after": False, "ln_before": False,
        "original_ln_after": True, "original_ln_before": False, "phm_dim": 4, "phm_layer": False, "phm_rank": 1, "residual_before_ln": True, "scaling": 1.0,
        "shared_W_phm": False, "shared_phm_rule": True, "use_gating": False,
    },
    "lora": {"attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0, "use_dora": False, "use_gating": False, "vera_b": None, "vera_d": None},
    "prefix_tuning": {"dropout": 0.0, "flat": False, "non_linearity": "tanh", "shared_gating": True, "use_gating": False},
    "prompt_tuning": {"combine": "prefix"},
    "reft": {"dropout": 0.05, "non_linearity": None, "output_reft": True, "tied_weights": False},
}  # fmt: skip
_RENAMED = re.compile(r"(?:attention_text_task|attention_text_lang|layer_text_task|layer_text_lang)_adapters")
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def modern(raw: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """A configuration with today's fields, and what a user must know of the change.

    Raises:
        ModuleError: it is none of AdapterHub's.
    """
    version, config = raw.get("version"), raw.get("config")
    if not isinstance(config, dict) or not isinstance(version, str | None):
        raise ModuleError(f"{source}: 'config' is an object and 'version' a string, found {str(config)[:40]!r} and {version!r}")
    parts = config["configs"] if config.get("architecture") == "union" else [config]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ModuleError(f"{source}: 'configs' of a union is a list of objects")
    note = ""
    found = []
    for part in parts:
        part = dict(part)
        nested = part.pop("invertible_adapter", None)
        if isinstance(nested, dict):
            part |= {"inv_adapter": nested.get("block_type"), "inv_adapter_reduction_factor": nested.get("reduction_factor")}
        if version is None and part.get("non_linearity") in _ACTIVATIONS:
            part["non_linearity"] = _ACTIVATIONS[part["non_linearity"]]
        kind = str(part.get("architecture") or "bottleneck")
        part = {**DEFAULTS.get(kind, {}), **part}
        if kind == "lora" and _unscaled(version) and part.get("alpha") != part.get("r"):
            part["alpha"] = part["r"]
            note = f"LoRA of {version} was trained without the scale alpha / r, and is read so"
        found.append(part)
    config = {"architecture": "union", "configs": found} if config.get("architecture") == "union" else found[0]
    return {**raw, "config": config}, note


def _unscaled(version: str | None) -> bool:
    """Whether LoRA ignored alpha: `adapters` before 1.1."""
    numbers = re.match(r"adapters\.(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (1, 1)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under today's keys."""
    return {_RENAMED.sub("adapters", key).replace("invertible_lang_adapters", "invertible_adapters"): tensor for key, tensor in tensors.items()}
