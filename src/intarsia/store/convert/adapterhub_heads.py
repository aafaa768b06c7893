"""AdapterHub's prediction heads: those that a head of ours can be, in both directions.

| theirs | ours |
|---|---|
| `classification` (also of one number: regression), `multilabel_classification` | `Head`; pooled at the first token in encoders, at the last in decoders |
| `tagging` | `Head` over every token |
| `masked_lm`, `causal_lm`, `seq2seq_lm` | `LanguageModelHead`, tied where its matrix is the base's |
| heads of a model class of transformers | changes of that class's own parameters (with `weights=`) |

Left out by name: question answering, multiple choice, images, and dependency parsing (words are means of pieces there, and its
biaffine products have no layers in front).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, listing, nearest
from intarsia.methods.method import Patch
from intarsia.patches import Add, Head, LanguageModelHead, Matrix, Replace
from intarsia.store.convert.adapterhub_kinds import THEIRS, Reading, activation
from intarsia.store.convert.adapterhub_parts import VERSION
from intarsia.store.convert.detect import HEAD_CONFIG
from intarsia.store.convert.folder import as_float, json_bytes, read_config, read_tensors, tensor_bytes
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.peft_heads import folded
from intarsia.store.convert.pieces import Piece
from intarsia.store.convert.values import base_value, change_at

HEAD_WEIGHTS, HEAD_PICKLE = "model_head.safetensors", "pytorch_model_head.bin"
#: classes with exchangeable heads by model type, and where they pool
CLASSES: Mapping[str, tuple[str, str]] = {
    "bert": ("BertAdapterModel", "first"), "roberta": ("RobertaAdapterModel", "first"), "xlm-roberta": ("XLMRobertaAdapterModel", "first"),
    "distilbert": ("DistilBertAdapterModel", "first"), "electra": ("ElectraAdapterModel", "first"), "albert": ("AlbertAdapterModel", "first"),
    "deberta": ("DebertaAdapterModel", "first"), "deberta-v2": ("DebertaV2AdapterModel", "first"), "xmod": ("XmodAdapterModel", "first"),
    "gpt2": ("GPT2AdapterModel", "last"), "gptj": ("GPTJAdapterModel", "last"), "llama": ("LlamaAdapterModel", "last"),
    "mistral": ("MistralAdapterModel", "last"), "t5": ("T5AdapterModel", ""), "mt5": ("MT5AdapterModel", ""), "bart": ("BartAdapterModel", ""),
    "mbart": ("MBartAdapterModel", ""),
}  # fmt: skip
_LABELLED = ("classification", "multilabel_classification", "tagging")
_VOCABULARY = ("masked_lm", "causal_lm", "seq2seq_lm")
_FIELDS = {"activation_function", "bias", "dropout_prob", "embedding_size", "head_type", "label2id", "layer_norm", "layers", "num_labels", "shift_labels", "use_pooler",
           "vocab_size"}  # fmt: skip
_NOT: Mapping[str, str] = {
    "question_answering": "no task here answers questions by spans", "multiple_choice": "no task here chooses among texts",
    "image_classification": "no task here is about images",
    "dependency_parsing": "words are means of their pieces there, the root is the first token and no layers stand before the products",
}  # fmt: skip
Found = tuple[tuple[str, ...] | None, list[str]]


def read_head(reading: Reading, folder: Path, allow_pickle: bool, model_type: str, weights: Mapping[str, Tensor] | None, config: Any) -> Found:
    """Add the head beside an adapter to the pieces.

    Returns:
        Its label names, and why it was left out.
    """
    raw = read_config(folder, HEAD_CONFIG)
    settings, source = raw.get("config"), str(folder / HEAD_CONFIG)
    if settings is None:
        return _read_static(reading, folder, raw, allow_pickle, weights)
    kind, layers = settings.get("head_type"), settings.get("layers")
    if kind in _NOT:
        return None, [f"the prediction head beside it ({kind}): {_NOT[kind]}"]
    if kind not in (*_LABELLED, *_VOCABULARY):
        return None, [f"the prediction head beside it ({kind}): a kind that is not known{nearest(str(kind), (*_LABELLED, *_VOCABULARY))}"]
    unknown = sorted(set(settings) - _FIELDS)
    if unknown:
        return None, [f"the prediction head beside it ({kind}): its fields {listing(unknown)} are not known"]
    pooling = "token" if kind == "tagging" else CLASSES.get(model_type, ("", ""))[1]
    if pooling == "first" and any(piece.port == "seq" and getattr(piece.form, "where", "") == "start" for piece in reading.pieces):
        return None, [f"the prediction head beside it ({kind}): adapters pools at the first token of the prompt, which is cut away here"]
    if kind in _LABELLED and (not pooling or settings.get("use_pooler")):
        what = "reads the model's pooler" if settings.get("use_pooler") else f"pools a {model_type} in a way that no head here does"
        return None, [f"the prediction head beside it ({kind}): it {what}; train a head here"]
    if not isinstance(layers, int) or layers < 1:
        raise ModuleError(f"{source}: {layers!r} layers")
    lead = f"heads.{raw.get('name')}."
    tensors = {key: as_float(t) for key, t in read_tensors(folder, HEAD_WEIGHTS, HEAD_PICKLE, allow_pickle).items()}
    foreign = [key for key in tensors if not key.startswith(lead)]
    if foreign:
        raise ModuleError(f"{folder}: {listing(foreign, 3)} belong to no head of the name {raw.get('name')!r}")
    reading.carried += len(tensors)
    found = {key.removeprefix(lead): tensor for key, tensor in tensors.items()}
    if kind in _LABELLED:
        return _read_labelled(reading, kind, pooling, settings, found, source, config), []
    return None, _read_vocabulary(reading, settings, found, source, weights, config)


def _read_labelled(reading: Reading, kind: str, pooling: str, settings: Mapping[str, Any], found: dict[str, Tensor], source: str, config: Any) -> tuple[str, ...]:
    layers, count = int(settings["layers"]), int(settings["num_labels"])
    names = settings.get("label2id") or {f"LABEL_{i}": i for i in range(count)}
    labels = tuple(sorted(names, key=lambda name: int(names[name])))
    if [int(names[name]) for name in labels] != list(range(count)):
        raise ModuleError(f"{source}: label2id does not number {count} labels from 0: {dict(list(names.items())[:6])}")
    step = 3 if settings.get("activation_function") else 2  # dropout, linear, activation
    numbers = [1 + step * i for i in range(layers)]
    if "bias" in settings and not settings["bias"]:
        found |= {f"{numbers[-1]}.bias": torch.zeros(count)}
    wanted = [f"{number}.{leaf}" for number in numbers for leaf in ("weight", "bias")]
    if set(found) != set(wanted) or len(found[wanted[-1]]) != count:
        raise ModuleError(f"{source}: a head of {layers} layers and {count} labels has {listing(wanted, 6)}, found {listing(sorted(found), 6)}")
    ours = {f"hidden.{i}.{leaf}": found[f"{numbers[i]}.{leaf}"] for i in range(layers - 1) for leaf in ("weight", "bias")}
    ours |= {leaf: found[f"{numbers[-1]}.{leaf}"] for leaf in ("weight", "bias")}
    problem = "multi" if kind == "multilabel_classification" else "regression" if kind == "classification" and count == 1 else "single"
    between = activation(settings.get("activation_function")) if layers > 1 else "tanh"
    form = Head(labels, pooling, problem, _dropout(settings, config), False, layers, between)  # type: ignore[arg-type]
    reading.pieces.append(Piece("logits", "head", form, Replace(), "logits", ours, "head"))
    return labels


def _dropout(settings: Mapping[str, Any], config: Any) -> float:
    """The rate of a head that does not name one is the model's."""
    for value in (settings.get("dropout_prob"), getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout_prob", None)):
        if value is not None:
            return float(value)
    return 0.1 if config is None else 0.0


def _read_vocabulary(
    reading: Reading, settings: Mapping[str, Any], found: dict[str, Tensor], source: str, weights: Mapping[str, Tensor] | None, config: Any
) -> list[str]:
    layers, norm, theirs = int(settings["layers"]), bool(settings.get("layer_norm")), settings.get("activation_function")
    dense = layers > 1
    if layers > 2 or (dense and config is None and norm):
        why = "it has more than two layers" if layers > 2 else "its norm has the model's epsilon: give config=model.config"
        return [f"the prediction head beside it ({settings['head_type']}): {why}"]
    names: dict[str, str] = {"0.weight": "dense", "0.bias": "dense_bias"} if dense else {}
    number = (1 + bool(theirs)) if dense else 0
    if dense and norm:
        names |= {f"{number}.weight": "norm", f"{number}.bias": "norm_bias"}
        number += 1
    names[f"{number}.weight"] = "decoder"
    if settings.get("bias"):
        names[f"{number}.bias"] = "bias"
    if set(found) != set(names):
        raise ModuleError(f"{source}: {settings['head_type']} of {layers} layers has {listing(names, 8)}, found {listing(sorted(found), 8)}")
    ours = {names[leaf]: tensor for leaf, tensor in found.items()}
    rows = None if weights is None else weights.get(_embedding(reading))
    tied = rows is not None and torch.equal(as_float(rows.detach().cpu()), ours["decoder"])
    if tied:
        del ours["decoder"]
    else:
        reading.notes["its language-model head has a matrix of its own" + (" (give weights=model.state_dict(): it may be the base's embeddings)" if rows is None else "")] = None
    scale = _scale(config)
    form = LanguageModelHead(
        activation(theirs) if dense else "gelu", dense, dense and norm, bool(settings.get("bias")), tied,
        float(getattr(config, "layer_norm_eps", 1e-12)) if dense and norm else 1e-12, scale,
    )  # fmt: skip
    reading.pieces.append(Piece("logits", "head", form, Replace(), "logits", ours, "head"))
    return []


def _scale(config: Any) -> float:
    """What a tied head of T5 multiplies its input by."""
    return float(config.d_model) ** -0.5 if getattr(config, "model_type", "") in ("t5", "mt5") and config.tie_word_embeddings else 1.0


def _embedding(reading: Reading) -> str:
    """Name of the word embeddings among the model's weights."""
    site = reading.sites.get("embed.weight")
    return "" if site is None else f"{site.path}.{site.param}"


def _read_static(reading: Reading, folder: Path, raw: Mapping[str, Any], allow_pickle: bool, weights: Mapping[str, Tensor] | None) -> Found:
    """A head of a model class of transformers: changes of that class's own parameters."""
    tensors = {key: as_float(t) for key, t in read_tensors(folder, HEAD_WEIGHTS, HEAD_PICKLE, allow_pickle).items()}
    what = f"the prediction head beside it (of {raw.get('model_class')}: {listing(sorted(tensors), 3)})"
    paths = Paths(reading.sites, tensors)
    if any(paths.split(key) is None for key in tensors):
        return None, [f"{what}: {reading.sites.model} has no such parameters; load that class, or train a head here"]
    if weights is None:
        return None, [f"{what}: new values are stored, and a module holds changes; give weights=model.state_dict() to carry them"]
    for key, value in tensors.items():
        place = paths.split(key)
        assert place is not None
        site = paths.weight(*place)
        change = change_at(site, value, base_value(weights, site, value))
        reading.pieces.append(Piece(site.name, "saved", Matrix(), Add(), "weight", {"factor.value": change}, "head"))
        reading.carried += 1
    return None, []


def written_head(patch: Patch, tensors: dict[str, Tensor], model_type: str, name: str, weights: Tensor | None, config: Any) -> tuple[dict[str, bytes], str]:
    """The files of a head, or the reason why there are none.

    Args:
        tensors: of the head, by leaf.
        weights: the base's word embeddings, which a tied head is written with.
    """
    form = patch.form
    known, pooling = CLASSES.get(model_type, ("", ""))
    if not known:
        return {}, f"adapters has no class with exchangeable heads for {model_type!r}"
    if isinstance(form, Head):
        settings, found, reason = _labelled(form, tensors, pooling)
    elif isinstance(form, LanguageModelHead):
        settings, found, reason = _vocabulary(form, tensors, model_type, weights, config)
    else:
        return {}, f"adapters has no head like {type(form).__name__}"
    if reason:
        return {}, reason
    width = found["0.weight" if "0.weight" in found else "1.weight"].shape[1]
    document = {"config": settings, "hidden_size": width, "model_class": known, "model_name": None, "model_type": model_type, "name": name}
    stored = {f"heads.{name}.{leaf}": tensor for leaf, tensor in found.items()}
    return {HEAD_CONFIG: json_bytes({**document, "version": VERSION}), HEAD_WEIGHTS: tensor_bytes(stored)}, ""


def static_head(values: Mapping[str, Tensor], document: Mapping[str, Any], config: Any) -> dict[str, bytes]:
    """The files of a head of a model class of transformers."""
    labels = dict(getattr(config, "label2id", None) or {})
    raw = {**document, "config": None, "name": None, "num_labels": len(labels), "label2id": labels}
    return {HEAD_CONFIG: json_bytes(raw), HEAD_WEIGHTS: tensor_bytes(dict(values))}


def _labelled(form: Head, tensors: dict[str, Tensor], pooling: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    if form.pooling not in ("token", pooling):
        return {}, {}, f"it pools by {form.pooling!r}, and adapters' classes for this model at the {pooling or 'end-of-text'} token"
    if form.pooling == "token" and form.problem != "single":
        return {}, {}, f"adapters has no head over every token for the problem {form.problem!r}"
    if form.activation not in THEIRS:
        return {}, {}, f"adapters has no activation like {form.activation!r}"
    ours = folded(form, tensors)
    kind = {"token": "tagging"}.get(form.pooling, "multilabel_classification" if form.problem == "multi" else "classification")
    theirs = THEIRS[form.activation] if form.layers > 1 else "tanh"
    step = 3 if theirs else 2
    found = {f"{1 + step * i}.{leaf}": ours[f"hidden.{i}.{leaf}"] for i in range(form.layers - 1) for leaf in ("weight", "bias")}
    found |= {f"{1 + step * (form.layers - 1)}.{leaf}": ours[leaf] for leaf in ("weight", "bias")}
    settings = {"head_type": kind, "num_labels": len(form.labels), "layers": form.layers, "activation_function": theirs,
                "label2id": {label: i for i, label in enumerate(form.labels)}, "dropout_prob": form.dropout}  # fmt: skip
    return settings if kind == "tagging" else {**settings, "use_pooler": False, "bias": True}, found, ""


def _vocabulary(
    form: LanguageModelHead, tensors: dict[str, Tensor], model_type: str, weights: Tensor | None, config: Any
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    pooling = CLASSES[model_type][1]
    kind = {"first": "masked_lm", "last": "causal_lm"}.get(pooling, "seq2seq_lm")
    decoder = tensors.get("decoder", weights)
    scale = _scale(config)
    if decoder is None:
        return {}, {}, "it is tied to the base's word embeddings, which stand in adapters' file: give weights=model.state_dict()"
    if form.scale != scale:
        return {}, {}, f"it scales what it reads by {form.scale:g}, adapters' class by {scale:g}"
    if form.dense != form.norm and form.norm:
        return {}, {}, "it has a norm without a dense layer, which adapters' heads have not"
    if form.dense and form.activation not in THEIRS:
        return {}, {}, f"adapters has no activation like {form.activation!r}"
    epsilon = float(getattr(config, "layer_norm_eps", 1e-12))
    if form.norm and epsilon != form.epsilon:
        return {}, {}, f"its norm has the epsilon {form.epsilon:g}, adapters' the model's {epsilon:g}" + ("" if config is not None else " (give config=model.config)")
    theirs = THEIRS[form.activation] if form.dense else None
    found: dict[str, Tensor] = {"0.weight": tensors["dense"], "0.bias": tensors["dense_bias"]} if form.dense else {}
    number = (1 + bool(theirs)) if form.dense else 0
    if form.norm:
        found |= {f"{number}.weight": tensors["norm"], f"{number}.bias": tensors["norm_bias"]}
        number += 1
    found[f"{number}.weight"] = as_float(decoder.detach().cpu()).clone()
    if form.bias:
        found[f"{number}.bias"] = tensors["bias"]
    settings = {"head_type": kind, "vocab_size": decoder.shape[0], "layers": 2 if form.dense else 1, "activation_function": theirs,
                "layer_norm": form.norm, "bias": form.bias, "shift_labels": kind == "causal_lm", "label2id": None}  # fmt: skip
    if kind != "seq2seq_lm":
        settings["embedding_size"] = decoder.shape[1]
    return settings if kind != "causal_lm" else {**settings, "dropout_prob": None}, found, ""
