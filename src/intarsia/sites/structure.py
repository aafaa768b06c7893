"""Questions about a live model that need no forward pass: where its base is, how wide a module, whose a parameter.

Nothing here changes the model, and everything works on the meta device.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from intarsia.errors import SiteError

#: Child modules under a name that starts with this are intarsia's own sockets; they are no part of the base.
SOCKET = "intarsia"

LINEAR = (nn.Linear, Conv1D)


def is_socket(path: str) -> bool:
    """Whether a module or parameter path leads through something intarsia put there."""
    return any(word.startswith(SOCKET) for word in path.split("."))


def join(*parts: str) -> str:
    """Join dotted paths, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def parent(path: str) -> str:
    """The path without its last word."""
    return path.rpartition(".")[0]


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`, or None."""
    module: object = root
    for word in path.split(".") if path else ():
        module = getattr(module, word, None)
    return module if isinstance(module, nn.Module) else None


def base_path(model: PreTrainedModel) -> str:
    """Path of `model.base_model` in the model, `""` where the model is its own base.

    Raises:
        SiteError: not a transformers model, or its base is not one of its submodules.
    """
    if not isinstance(model, PreTrainedModel):
        raise SiteError(f"expected a transformers PreTrainedModel, found {type(model).__name__}")
    base = model.base_model
    if base is model:
        return ""
    if getattr(model, model.base_model_prefix, None) is base:
        return model.base_model_prefix
    for path, module in model.named_modules():
        if module is base:
            return path
    raise SiteError(f"{type(model).__name__}: its base model is not one of its submodules")


def out_width(module: nn.Module) -> int | None:
    """Size of the last dimension of the module's output, None where the module does not determine it."""
    if isinstance(module, Conv1D):
        return module.nf
    for name in ("out_features", "embedding_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    weight = getattr(module, "weight", None)
    return int(weight.shape[-1]) if weight is not None and weight.dim() == 1 else None


def in_width(module: nn.Module) -> int | None:
    """Size of the last dimension of the module's input, None where the module does not determine it."""
    if isinstance(module, Conv1D):
        return module.nx
    size = getattr(module, "in_features", None)
    return size if isinstance(size, int) else None


def calls_interface(attention: nn.Module) -> bool:
    """Whether the attention module calls the functions of transformers' `AttentionInterface`.

    Read from the names its methods use, so no forward is needed.  Where it is False, keys and values cannot be
    reached from outside (DeBERTa-v2, BLOOM, XGLM).
    """
    for owner in type(attention).__mro__:
        if owner in (PreTrainedModel, nn.Module):
            return False
        for member in vars(owner).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
    return False


def output_fields(model: PreTrainedModel) -> frozenset[str] | None:
    """Fields of the object the model's forward returns, from its annotation; None where it has none."""
    try:
        annotation = typing.get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):
        return None
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    outputs = [kind for kind in kinds if issubclass(kind, ModelOutput)]
    return frozenset(name for kind in outputs for name in getattr(kind, "__dataclass_fields__", ())) or None


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The linear of the language-model head, None where the class has none."""
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def head_size(attention: nn.Module, config: object) -> int | None:
    """Features of one attention head, as the module or else the configuration says."""
    for name in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim"):
        if isinstance(size := getattr(attention, name, None), int):
            return size
    if isinstance(size := getattr(config, "head_dim", None), int):
        return size
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) else None


@dataclass(frozen=True, slots=True)
class Owned:
    """One Parameter object and every `(module path, name)` that holds it, in model order."""

    parameter: nn.Parameter
    owners: tuple[tuple[str, str], ...]


def parameters(model: nn.Module) -> Iterator[Owned]:
    """Every Parameter object of the model once, without those of intarsia's sockets."""
    owners: dict[int, list[tuple[str, str]]] = {}
    objects: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_socket(path):
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            objects[id(parameter)] = parameter
            owners.setdefault(id(parameter), []).append((path, name))
    for key, parameter in objects.items():
        yield Owned(parameter, tuple(owners[key]))
