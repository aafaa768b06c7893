"""What the host's tests share: small settings per method, hosts with two modules, random tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.host import Host
from intarsia.methods import METHODS, Method, build
from intarsia.patches import Head
from tests import zoo

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "houlsby": {"width": 4},
    "pfeiffer": {"reduction": 4},
    "prompt": {"length": 3},
    "prefix": {"length": 3, "reparameterise": 8},
    "freeze_k": {"k": 1},
    # soft prompts and the adapter family
    "p_tuning": {"length": 3},
    "p_tuning_v2": {"length": 3},
    "llama_adapter": {"length": 3},
    "mh_parallel": {"width": 4},
    "adapterdrop": {"lowest": 1, "reduction": 4},
    "phm_adapter": {"width": 8, "n": 4},
    "compacter": {"width": 8},
    "compacter_pp": {"width": 8},
    "adapter_lowrank": {"width": 4},
    "hyperformer": {"width": 4, "embedding": 8},
    "hyperformer_pp": {"width": 4, "embedding": 8, "hidden": 8},
    "loreft": {"rank": 2, "first": 2, "last": 2},
    "noreft": {"rank": 2, "first": 2, "last": 2, "tied": False},
    "direft": {"rank": 2, "first": 2, "last": 2},
    "mam": {"length": 3, "reparameterise": 8, "width": 4},
    "unipelt": {"length": 3, "reparameterise": 8, "reduction": 4, "rank": 2},
    "perfect": {"reduction": 8},
    "madx": {"reduction": 4},
    "lst": {"reduction": 4, "head_size": 4},
    # low rank
    "rslora": {"rank": 4},
    "lora_plus": {"rank": 4},
    "lora_fa": {"rank": 4},
    "miss": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "adalora": {"rank": 4, "target": 2},
    "hira": {"rank": 8, "at": "{attn,xattn}.{q,k,v,o}, ffn.{gate,up,down}"},
    "loha": {"rank": 3, "alpha": 3.0},
    "lokr": {"rank": 1, "limit": 4, "alpha": 1.0},
    "gralora": {"rank": 4, "alpha": 4.0},
    # subspaces
    "vera": {"rank": 8},
    "lora_xs": {"rank": 4, "alpha": 4.0},
    "svft": {"width": 1},
    "fourierft": {"count": 10, "alpha": 10.0},
    "c3a": {"block": 8},
    "intrinsic": {"dimension": 20},
    "said": {"dimension": 400},
    # rotations
    "oft": {"block": 8},
    "boft": {"block": 4, "factors": 2},
    "hra": {"count": 4},
    "road": {"group": 8},
    # subsets
    "child_tuning_d": {"density": 0.1},
    "fish": {"density": 0.05},
    "lt_sft": {"density": 0.1},
    "shira": {"rank": 2},
    "s2ft": {"share": 0.3},
    "supermask": {"keep": 0.8},
    "spiel": {"density": 0.1},
    "rosa": {"rank": 2, "alpha": 2.0, "density": 0.05},
}
_LOW_RANK = ("rslora", "lora_plus", "lora_fa", "miss", "dora", "pissa", "adalora", "hira", "loha", "lokr", "gralora")
_SUBSET = ("child_tuning_d", "fish", "lt_sft", "shira", "rosa", "s2ft", "spiel", "diff_pruning", "lottery")
_SUBSPACE = ("vera", "svft", "intrinsic", "said")
_ADAPTERS = ("adapterdrop", "phm_adapter", "compacter", "compacter_pp", "perfect")
#: methods whose fresh module leaves the model exactly as it is; the others start near it or, by their paper, not at all
EXACT = ("full", "child_tuning_f", "freeze_k", "ln", "bitfit", "lora", "ia3", "parallel", *_LOW_RANK, *_SUBSPACE, *_SUBSET, "oft", "boft", "road", "mh_parallel", "llama_adapter")
NEAR = ("houlsby", "pfeiffer", "madx", *_ADAPTERS, "lora_xs", "hra")
FOLDABLE = (
    "full", "child_tuning_f", "freeze_k", "ln", "bitfit", "lora", "ia3", *_LOW_RANK, *_SUBSPACE, *_SUBSET, "supermask", "fourierft", "lora_xs", "c3a", "oft", "boft", "hra", "road"
)  # fmt: skip
#: methods that touch every parameter, those computed once for all rows among them
EVERYWHERE = ("full", "child_tuning_f", "fish", "diff_pruning", "intrinsic", "said")
#: methods that add tokens to the sequence, and methods that add keys and values
TOKENS = ("prompt", "p_tuning")
MEMORY = ("prefix", "p_tuning_v2", "llama_adapter", "mam", "unipelt")
BIAS_FREE = ("llama", "llama-tied", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "t5", "mt5")
NO_MEMORY = ("deberta-v2", "deberta-v3", "bloom", "xglm")
NO_TOKENS = ("speech_to_text", "whisper")
METHOD_NAMES = tuple(METHODS)


def small(name: str, family: str = "") -> Method:
    """A method in test size; `head` with three labels; BitFit creates biases where a family has none."""
    settings = dict(SMALL.get(name, {}))
    if name == "bitfit" and family in BIAS_FREE:
        settings["create"] = True
    method = build(name, **settings)
    return method.with_head(Head(("a", "b", "c"), dropout=0.0)) if name == "head" else method


def lacks(family: str, name: str) -> bool:
    """Whether a family has no port for a method (it must then refuse)."""
    return (
        (name in MEMORY and family in NO_MEMORY)
        or (name in TOKENS and family in NO_TOKENS)
        or (name in ("lst", "adapterdrop", "madx") and family == "albert")  # one block that runs several times
        or (name == "ia3" and family == "mixtral")
        or (name == "madx" and family == "electra")  # embeddings narrower than the stream: the output embedding has no inverse
    )


def disturb(host: Host, name: str, seed: int = 0, size: float = 0.1) -> None:
    """Move a module away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in host.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def woven(family: str, method: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Tensor], Host]:
    """A tiny model with modules `a` and `b` of a method, both away from their start."""
    model, inputs = zoo.make(family, **options)
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, small(method, family), seed=seed)
        disturb(host, name, seed)
    return model, inputs, host


def answer(output: Any) -> Tensor:
    """What a model answers: logits, or hidden states without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def run(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """A forward without gradients and without a cache."""
    if model.config.is_encoder_decoder or model.can_generate():
        options.setdefault("use_cache", False)
    with torch.no_grad():
        return answer(model(**inputs, **options))


def stepwise(model: PreTrainedModel, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Logits of an encoder-decoder's target, one token at a time with a cache, the encoder's states kept."""
    given: dict[str, Any] = {"input_ids": source}
    past, found = None, []
    with torch.no_grad():
        for token in target.split(1, 1):
            out = model(**given, attention_mask=mask, decoder_input_ids=token, past_key_values=past, use_cache=True)
            past, given = out.past_key_values, {"encoder_outputs": (out.encoder_last_hidden_state,)}
            found.append(out.logits)
    return torch.cat(found, 1)


def without_dropout(model: PreTrainedModel) -> None:
    """Training mode that is deterministic."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "attention_probs_dropout_prob", "layerdrop", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@functools.cache
def reference(family: str) -> Tensor:
    """The bare model's answer."""
    return run(*zoo.make(family))


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that closing a host must restore."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": [(n, type(m)) for n, m in model.named_modules()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            sum(len(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_with_kwargs,
                                 m._forward_pre_hooks_with_kwargs, m._forward_hooks_always_called, m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(k for k in vars(m) if not k.startswith("_")) for m in model.modules()],
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
    }  # fmt: skip


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bitwise equality of two states."""
    weights = a["weights"].keys() == b["weights"].keys() and all(
        torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]
    )
    return weights and all(a[k] == b[k] for k in a if k != "weights")
