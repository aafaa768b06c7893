"""Heads that peft saves with a module (`modules_to_save`), as a head of ours, and back.

A model of the class with that head has sites for its parameters, which then simply change.  Here is the other case: a head for a
base without one, and a head of ours for a class that has its own.

| module | class | head of ours |
|---|---|---|
| `score` | decoders `ForSequenceClassification` | the last token, linear without bias |
| `classifier` | `ForTokenClassification` | every token, linear |
| `classifier.dense`, `classifier.out_proj` | RoBERTa and kin `ForSequenceClassification` | the first token, two layers, tanh (ELECTRA: gelu) |
| `pre_classifier`, `classifier` | DistilBERT `ForSequenceClassification` | the first token, two layers, relu |

BERT's own classifier reads its pooler, which is not a part of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.patches import Head, Replace
from intarsia.store.convert.folder import as_float
from intarsia.store.convert.pieces import Piece

#: (task, modules of the class's head by layer, pooling, activation between); which class is meant where modules are alike
_KNOWN: Sequence[tuple[str, tuple[str, ...], str, str]] = (
    ("SEQ_CLS", ("classifier.dense", "classifier.out_proj"), "first", "tanh"),
    ("SEQ_CLS", ("pre_classifier", "classifier"), "first", "relu"),
    ("SEQ_CLS", ("score",), "last", "tanh"),
    ("TOKEN_CLS", ("classifier",), "token", "tanh"),
)
_CLASS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}


def read_head(task: str | None, tensors: Mapping[str, Tensor], model: str, config: Any) -> tuple[Piece, tuple[str, ...]] | None:
    """A head for a model that has none.

    Args:
        task: `SEQ_CLS`, `TOKEN_CLS` of the file.
        tensors: of the head by their names in the class that it is for.
        model: name of the model's class.
        config: of the model, for label names and the activation; may be None.

    Returns:
        The head and its label names; None for a head that none of ours can be.
    """
    for wanted, modules, pooling, between in _KNOWN:
        names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
        found = {name: as_float(tensors[name]) for name in names if name in tensors}
        weights = [name for name in names if name.endswith("weight")]
        if task != wanted or set(found) != set(tensors) or any(name not in found for name in weights) or (pooling != "last" and len(found) != len(names)):
            continue
        if pooling == "first" and model.startswith("Electra"):
            between = "gelu"
        *inner, last = modules
        count = len(found[f"{last}.weight"])
        ours = {f"hidden.{i}.{leaf}": found[f"{module}.{leaf}"] for i, module in enumerate(inner) for leaf in ("weight", "bias")}
        ours |= {"weight": found[f"{last}.weight"], "bias": found.get(f"{last}.bias", torch.zeros(count))}
        labels = _labels(count, config)
        problem = "regression" if count == 1 and task == "SEQ_CLS" else "single"
        form = Head(labels, pooling, problem, 0.0, False, len(modules), between)  # type: ignore[arg-type]
        return Piece("logits", "head", form, Replace(), "logits", ours, "head"), labels
    return None


def _labels(count: int, config: Any) -> tuple[str, ...]:
    """The model's own label names where it has as many, since peft's files have none."""
    names = getattr(config, "id2label", None) or {}
    known = tuple(str(names[i]) for i in range(count)) if set(names) == set(range(count)) else ()
    return known if len(set(known)) == count else tuple(f"LABEL_{i}" for i in range(count))


def write_head(form: Any, tensors: Mapping[str, Tensor], model: str, shapes: Mapping[tuple[str, str], Sequence[int]]) -> dict[tuple[str, str], Tensor] | None:
    """A head of ours as the parameters of a class's own head.

    Args:
        tensors: of the head by leaf.
        model: name of the model's class.
        shapes: of the class's parameters, by module path and name.

    Returns:
        Values by module path and name; None if the class has no such head.
    """
    if not isinstance(form, Head):
        return None
    leaves = folded(form, {leaf: as_float(t) for leaf, t in tensors.items()})
    for task, modules, pooling, between in _KNOWN:
        if pooling == "first" and model.startswith("Electra"):
            between = "gelu"
        if not model.endswith(_CLASS[task]) or (form.pooling, form.layers) != (pooling, len(modules)) or (form.layers > 1 and form.activation != between):
            continue
        named = [*(f"hidden.{i}." for i in range(len(modules) - 1)), ""]
        found = {(module, leaf): leaves[f"{lead}{leaf}"] for module, lead in zip(modules, named) for leaf in ("weight", "bias")}
        if (modules[-1], "bias") not in shapes and not found[modules[-1], "bias"].any():
            del found[modules[-1], "bias"]
        if all(tuple(shapes.get(place, ())) == tuple(value.shape) for place, value in found.items()):
            return found
    return None


def folded(form: Head, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves with centre and scale multiplied into the first linear map."""
    if not form.standardise:
        return leaves
    lead = "hidden.0." if form.layers > 1 else ""
    weight = leaves[f"{lead}weight"] * leaves["scale"]
    return {**leaves, f"{lead}weight": weight, f"{lead}bias": leaves[f"{lead}bias"] - weight @ leaves["mean"]}


def of_heads(names: Iterable[str]) -> set[str]:
    """The modules that heads here are read from."""
    heads = {module.split(".")[0] for _, modules, _, _ in _KNOWN for module in modules}
    return {name for name in names if name.split(".")[0] in heads}
