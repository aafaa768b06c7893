"""The tiny models that the reference files of peers were made for, and the weights that peft's files stand for.

The formulas are written down a second time here, from the published description of the format, so that a slip in the reader
is not repeated in its test.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.shared import shared


@cache
def oracle(name: str) -> ModuleType:
    """A reference program beside the repository."""
    import sys

    path = shared(f"tools/oracles/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(family: str) -> PreTrainedModel:
    """The model the files of a family belong to."""
    return getattr(oracle("tiny"), family)()


def inputs(family: str) -> dict[str, Tensor]:
    ids = oracle("tiny").ids
    return {"input_ids": ids(), **({"decoder_input_ids": ids(seed=2)} if family == "t5" else {})}


def logits(model: PreTrainedModel, family: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


def applied(model: PreTrainedModel, folder: Path, method: str) -> PreTrainedModel:
    """The model with the weights that a peft folder stands for written into it."""
    formulas: Any = oracle("peft_formulas")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and not list(m.children())}
    with torch.no_grad():
        for name, found in formulas.modules(tensors, named).items():
            module = named[name]
            bias = getattr(module, "bias", None)
            if set(found) <= {"weight", "bias"}:
                weight, new = found["weight"], found.get("bias")
            elif method == "ln_tuning":
                weight, new = found["ln_tuning_layers.weight"], found.get("ln_tuning_layers.bias")
            else:
                start = torch.zeros(module.weight.shape[0]) if "lora_B.bias" in found and bias is None else bias
                transposed = type(module).__name__ == "Conv1D"
                old = module.weight.data.T if transposed else module.weight.data
                weight, new = formulas.F[method](found, config, old, start, name, tensors)
                weight = weight.T if transposed else weight
            module.weight.copy_(weight)
            if new is not None and bias is None:
                module.bias = nn.Parameter(new.clone())
            elif new is not None:
                bias.copy_(new)
    return model
