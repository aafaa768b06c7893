"""Folders that peft itself makes on tiny models: every kind with random weights, nothing at its start value.

`make` gives the model with peft's adapter and the folder it saved; `CASES` are the kinds.  Needs peft (an extra of the tests).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import zoo

#: task type of each family of `zoo`
TASKS = {"bert": None, "xlm-roberta-cls": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
#: attention queries and values, and the second feed-forward layer
ATTENTION = {"bert": ["query", "value"], "xlm-roberta-cls": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
FEED = {"bert": ["output.dense"], "xlm-roberta-cls": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "t5": ["wo"]}
NORMS = {"bert": ["LayerNorm"], "xlm-roberta-cls": ["LayerNorm"], "gpt2": ["ln_1", "ln_2"], "llama": ["input_layernorm"], "t5": ["layer_norm"]}
EMBEDDING = {"bert": "word_embeddings", "xlm-roberta-cls": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}
#: ids that the inputs hold
TOKENS = sorted(set(zoo.token_ids()[0].tolist()))[:3]
Where = Callable[[str], Mapping[str, Any]]


def attention(family: str) -> dict[str, Any]:
    return {"target_modules": ATTENTION[family]}


def everywhere(family: str) -> dict[str, Any]:
    return {"target_modules": ATTENTION[family] + FEED[family]}


def no_target(family: str) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One kind of adapter.

    Attributes:
        config: class of peft.
        fields: of it.
        where: fields that depend on the family.
        families: on which it is made.
        same: whether what we write of it is the file of peft, to the byte.
    """

    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: Where = attention
    families: tuple[str, ...] = tuple(TASKS)
    same: bool = True
    std: float = 0.1


def base(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model in evaluation mode, and inputs for it."""
    model, inputs = zoo.make(family)
    return model.eval(), inputs


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def make(case: Case, family: str, folder: Path, seed: int = 0) -> Tensor:
    """Save a random adapter of a kind and give the logits of peft's model with it."""
    import peft

    model, inputs = base(family)
    config = getattr(peft, case.config)(**{"task_type": TASKS[family], **case.fields, **case.where(family)})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config).eval()
        noise = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                step = case.std * torch.randn(parameter.shape, generator=noise)
                parameter.data.add_(step - step.mT if "boft_R" in name else step)  # what training gives: a skew matrix from zeros
        result = logits(wrapped, inputs)
        wrapped.save_pretrained(str(folder))
    return result


def spoken(folder: Path, family: str) -> Tensor:
    """Logits of peft's model with the adapter in a folder."""
    import peft

    model, inputs = base(family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not missing, missing
    return logits(wrapped, inputs)


def differing(mine: Path, theirs: Path) -> list[str]:
    """Fields of two configurations that differ; lists that peft writes in the order of a hash are compared as sets."""
    a, b = (json.loads((folder / "adapter_config.json").read_text()) for folder in (mine, theirs))
    return [key for key in sorted({*a, *b}) if (sorted(a[key], key=str) if isinstance(a.get(key), list) else a.get(key, "-"))
            != (sorted(b[key], key=str) if isinstance(b.get(key), list) else b.get(key, "-"))]


RANK = {"r": 3, "lora_alpha": 5}
CASES: dict[str, Case] = {
    "lora": Case("LoraConfig", RANK),
    "lora-gaussian": Case("LoraConfig", {**RANK, "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "lora-orthogonal": Case("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora-random": Case("LoraConfig", {**RANK, "init_lora_weights": False}),
    "lora-eva": Case("LoraConfig", {**RANK, "init_lora_weights": "eva"}),
    "lora-pissa": Case("LoraConfig", {**RANK, "init_lora_weights": "pissa"}),
    "lora-olora": Case("LoraConfig", {**RANK, "init_lora_weights": "olora"}),
    "rslora": Case("LoraConfig", {**RANK, "use_rslora": True}),
    "dora": Case("LoraConfig", {**RANK, "use_dora": True}),
    "lora-shift": Case("LoraConfig", {**RANK, "lora_bias": True}),
    "lora-bias": Case("LoraConfig", {**RANK, "bias": "lora_only"}),
    "lora-all-biases": Case("LoraConfig", {**RANK, "bias": "all"}),
    "lora-patterns": Case("LoraConfig", {**RANK, "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 7}}, families=("llama",)),
    "lora-all-linear": Case("LoraConfig", RANK, lambda f: {"target_modules": "all-linear"}),
    "lora-regex": Case("LoraConfig", RANK, lambda f: {"target_modules": r".*\.(?:0|1)\..*(?:" + "|".join(ATTENTION[f]) + ")"}),
    "lora-layer": Case("LoraConfig", {**RANK, "layers_to_transform": [1]}, families=("bert", "llama")),
    "lora-excluding": Case("LoraConfig", {**RANK, "exclude_modules": ["0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]}, families=("llama",)),
    "lora-head": Case("LoraConfig", RANK, lambda f: {**attention(f), "modules_to_save": ["lm_head"]}, families=("llama",)),
    "lora-tokens": Case("LoraConfig", RANK, lambda f: {**attention(f), "trainable_token_indices": {EMBEDDING[f]: TOKENS}}, std=0.5),
    "lora-embedding": Case("LoraConfig", RANK, lambda f: {"target_modules": [*ATTENTION[f], EMBEDDING[f]]}),
    "adalora": Case("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 100, "lora_alpha": 5}),
    "ia3": Case("IA3Config", {}, lambda f: {"target_modules": ATTENTION[f] + FEED[f], "feedforward_modules": FEED[f]}),
    "loha": Case("LoHaConfig", {"r": 3, "alpha": 5}, std=0.5),
    "lokr": Case("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr-both": Case("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr-full": Case("LoKrConfig", {"r": 64, "alpha": 5}),
    "vera": Case("VeraConfig", {"r": 8}, everywhere),
    "pvera": Case("PveraConfig", {"r": 8}, everywhere),
    "oft": Case("OFTConfig", {"oft_block_size": 8}),
    "oft-exact": Case("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-shared": Case("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "boft": Case("BOFTConfig", {"boft_block_size": 4}),
    "boft-butterfly": Case("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, same=False),
    "hra": Case("HRAConfig", {"r": 4}),
    "hra-odd": Case("HRAConfig", {"r": 3}),
    "hra-gs": Case("HRAConfig", {"r": 4, "apply_GS": True}),
    "miss": Case("MissConfig", {"r": 4}),
    "miss-mini": Case("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "fourierft": Case("FourierFTConfig", {"n_frequency": 20, "scaling": 100.0}, std=0.3),
    "c3a": Case("C3AConfig", {"block_size": 8}),
    "gralora": Case("GraloraConfig", {"r": 4, "alpha": 5}),
    "delora": Case("DeloraConfig", {"r": 3}),
    "road": Case("RoadConfig", {"group_size": 8}),
    "road-2": Case("RoadConfig", {"group_size": 8, "variant": "road_2"}),
    "road-4": Case("RoadConfig", {"group_size": 8, "variant": "road_4"}),
    "hira": Case("HiraConfig", {"r": 3}, std=0.3),
    "shira": Case("ShiraConfig", {"r": 2}),
    "randlora": Case("RandLoraConfig", {"r": 4}),
    "vblora": Case("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 8}),
    "beft": Case("BeftConfig", {}),
    "supertuning": Case("SupertuningConfig", {}),
    "tokens": Case("TrainableTokensConfig", {"token_indices": TOKENS}, lambda f: {"target_modules": [EMBEDDING[f]]}, std=0.5),
    "ln": Case("LNTuningConfig", {}, lambda f: {"target_modules": NORMS[f]}),
    "prompt": Case("PromptTuningConfig", {"num_virtual_tokens": 4}, no_target),
    "p-tuning": Case("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}, no_target),
    "p-tuning-lstm": Case("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}, no_target),
    "prefix": Case("PrefixTuningConfig", {"num_virtual_tokens": 4}, no_target),
    "prefix-projected": Case("PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16}, no_target),
    "cartridge": Case("CartridgeConfig", {"num_virtual_tokens": 4, "num_frozen_tokens": 1}, no_target, families=("llama", "gpt2")),
    "cpt": Case("CPTConfig", {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]}, no_target, families=("llama", "gpt2")),
    "llama-adapter": Case("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}, no_target, families=("llama",)),
}
