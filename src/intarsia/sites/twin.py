"""A small stand-in for a model, on which arithmetic can be tried without touching the user's weights.

It has the same class and widths but two blocks per stack (more, where only more show every kind of block), random
weights with noise on every parameter (zero biases and unit norms make different places look alike), float32, on CPU.
Paths do not depend on depth or weights.  A model that was changed after it was built, or whose class cannot be built
from its configuration, is copied instead.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
DEPTHS = (2, 4, 8, 1 << 20)
BATCH, LENGTH, TARGET_LENGTH = 2, 7, 5
NOISE = 0.05


def twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The stand-in of a model; the caller's random state, default type and device are left as they were.

    Raises:
        SiteError: it can neither be built from the configuration nor copied.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        made = _from_config(model) or _copy(model)
        made = made.float().eval()
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=NOISE)
    return made


def _from_config(model: PreTrainedModel) -> PreTrainedModel | None:
    """The shallowest model of the same class that shows every kind of module the model has, if there is one."""
    paths = _paths(model)
    for depth in DEPTHS:
        try:
            made = type(model)(_shallow(model, depth))
        except Exception:  # whatever a foreign constructor does with a changed configuration; the copy is the answer
            continue
        found = _paths(made)
        if found <= paths and {_numberless(path) for path in paths} == {_numberless(path) for path in found}:
            return made
    return None


def _shallow(model: PreTrainedModel, depth: int) -> Any:
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # let the class choose: the model's own may need a GPU, or intarsia's sockets
    for name in LAYERS:
        if isinstance(layers := getattr(config, name, None), int) and layers > depth:
            setattr(config, name, depth)
    if len(kinds := getattr(config, "layer_types", None) or ()) > depth:
        config.layer_types = kinds[:depth]
    return config


def _paths(model: PreTrainedModel) -> set[str]:
    """Paths of the modules of the base."""
    base = structure.base_path(model)
    return {path for path, _ in model.named_modules() if path.startswith(base) and not structure.is_socket(path)}


def _numberless(path: str) -> str:
    return re.sub(r"\.\d+", ".N", path)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in model.parameters()):
        raise SiteError(
            f"{type(model).__name__}: its configuration alone does not give a model with the same modules, and its "
            "weights are quantised or on the meta device, so its structure cannot be inferred; "
            "give resolve(model, anatomy=...) a row"
        )
    made = copy.deepcopy(model).cpu()
    made.set_attn_implementation("eager")
    return made


def example(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two short sequences without padding, for models that read token ids or spectrograms.

    Raises:
        SiteError: the model reads something else.
    """
    config: Any = model.config
    rows = torch.Generator().manual_seed(0)
    name = model.main_input_name
    batch: dict[str, Tensor] = {}
    if name == "input_ids":
        batch[name] = _ids(model, LENGTH, rows)
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        batch[name] = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=rows)
    elif name == "input_features" and hasattr(config, "input_feat_per_channel"):
        features = config.input_feat_per_channel * config.input_channels
        batch[name] = torch.randn(BATCH, 8 * LENGTH, features, generator=rows)
    else:
        raise SiteError(
            f"{type(model).__name__} reads {name!r}, for which no example can be made up; give infer or verify a batch"
        )
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(model, TARGET_LENGTH, rows)
    return batch


def _ids(model: PreTrainedModel, length: int, rows: torch.Generator) -> Tensor:
    """Ids of pieces that are not special, `[BATCH, length]`, no two alike where the vocabulary allows it."""
    count = int(getattr(model.get_input_embeddings(), "num_embeddings", 0) or model.config.vocab_size)
    special = {
        value for name, value in vars(model.config).items() if name.endswith("_token_id") and isinstance(value, int)
    }
    ordinary = torch.tensor([index for index in range(min(count, 1024)) if index not in special])
    if len(ordinary) >= BATCH * length:
        return ordinary[torch.randperm(len(ordinary), generator=rows)[: BATCH * length]].view(BATCH, length)
    return ordinary[torch.randint(len(ordinary), (BATCH, length), generator=rows)]


def fitting(model: PreTrainedModel, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The given batch on the CPU, or an example."""
    return example(model) if batch is None else {name: value.cpu() for name, value in batch.items()}
