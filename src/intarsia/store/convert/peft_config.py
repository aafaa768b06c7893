"""Fields of `adapter_config.json` (peft 0.21) by method: their defaults, and which of them the reader understands.

A field is `used` (decides numbers, read by `peft_kinds.py`), `training` (matters to further training only) or must have its
default: anything else would change what the module does in a way that is not carried, and is refused by name, as is a field
not listed here, which a newer peft may depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intarsia.errors import ModuleError, listing, nearest

COMMON: Mapping[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "peft_type": None, "peft_version": "0.21.2", "revision": None,
    "task_type": None,
}  # fmt: skip
_SELECT: Mapping[str, Any] = {"exclude_modules": None, "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None, "target_modules": None}
_FEWER: Mapping[str, Any] = {key: value for key, value in _SELECT.items() if key != "exclude_modules"}
_LORA: Mapping[str, Any] = {
    **_SELECT, "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": False, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16, "r": 8, "rank_pattern": {},
    "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip
_PROMPT: Mapping[str, Any] = {
    "modules_to_save": None, "num_attention_heads": None, "num_layers": None, "num_transformer_submodules": None, "num_virtual_tokens": None,
    "token_dim": None,
}  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LORA": _LORA,
    "ADALORA": {**_LORA, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": None, "target_r": 8,
                "tfinal": 0, "tinit": 0, "total_step": None},
    "IA3": {"exclude_modules": None, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True, "modules_to_save": None,
            "target_modules": None},
    "LOHA": {**_SELECT, "alpha": 8, "alpha_pattern": {}, "init_weights": True, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
             "rank_pattern": {}, "use_effective_conv2d": False},
    "LOKR": {**_SELECT, "alpha": 8, "alpha_pattern": {}, "decompose_both": False, "decompose_factor": -1, "init_weights": True, "module_dropout": 0.0,
             "r": 8, "rank_dropout": 0.0, "rank_dropout_scale": False, "rank_pattern": {}, "use_effective_conv2d": False},
    "VERA": {**_FEWER, "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0, "r": 256,
             "save_projection": True, "vera_dropout": 0.0},
    "OFT": {**_SELECT, "bias": "none", "block_share": False, "coft": False, "eps": 6e-05, "fan_in_fan_out": False, "init_weights": True,
            "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0, "use_cayley_neumann": True},
    "BOFT": {**_SELECT, "bias": "none", "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0, "boft_n_butterfly_factor": 1,
             "fan_in_fan_out": False, "init_weights": True},
    "HRA": {**_SELECT, "apply_GS": False, "bias": "none", "init_weights": True, "r": 8},
    "MISS": {**_SELECT, "bias": "none", "init_weights": True, "mini_r": 1, "miss_dropout": 0.0, "r": 64},
    "FOURIERFT": {**_SELECT, "bias": "none", "fan_in_fan_out": False, "init_weights": False, "n_frequency": 1000, "n_frequency_pattern": {},
                  "random_loc_seed": 777, "scaling": 150.0},
    "C3A": {**_FEWER, "bias": "none", "block_size": 256, "block_size_pattern": {}, "init_weights": "xavier_uniform"},
    "GRALORA": {**_FEWER, "alpha": 64, "bias": "none", "fan_in_fan_out": False, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0,
                "init_weights": True, "r": 32},
    "DELORA": {**_SELECT, "bias": "none", "delora_lambda": 15, "init_weights": True, "lambda_pattern": {}, "module_dropout": 0.0, "r": 8,
               "rank_pattern": {}},
    "ROAD": {"group_size": 64, "init_weights": True, "modules_to_save": None, "target_modules": None, "variant": "road_1"},
    "HIRA": {**_SELECT, "fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True, "r": 32, "rank_pattern": {}},
    "SHIRA": {"fan_in_fan_out": False, "init_weights": True, "mask_type": "random", "modules_to_save": None, "r": 32, "random_seed": None,
              "target_modules": None},
    "SUPERTUNING": {"init_weights": True, "lora_alpha": None, "lora_dropout": 0.0, "modules_to_save": None, "r": None,
                    "save_precomputed_indices": True, "select_top": True, "sparsity": 0.99, "target_modules": None},
    "BEFT": {"init_weights": True, "modules_to_save": None, "target_modules": None},
    "PVERA": {**_FEWER, "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "generator_seed": None, "init_weights": True, "projection_prng_key": 0,
              "pvera_dropout": 0.0, "r": 256, "sample_at_inference": False, "save_projection": True},
    "RANDLORA": {**_FEWER, "bias": "none", "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0, "r": 32, "randlora_alpha": 640,
                 "randlora_dropout": 0.0, "save_projection": True, "sparse": False, "very_sparse": False},
    "VBLORA": {**_SELECT, "bias": "none", "fan_in_fan_out": False, "init_logits_std": 0.1, "init_vector_bank_bound": 0.02, "num_vectors": 256, "r": 4,
               "save_only_topk_weights": False, "topk": 2, "vblora_dropout": 0.0, "vector_length": 256},
    "TRAINABLE_TOKENS": {"init_weights": True, "target_modules": None, "token_indices": []},
    "LN_TUNING": {"exclude_modules": None, "modules_to_save": None, "target_modules": None},
    "PROMPT_TUNING": {**_PROMPT, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None,
                      "tokenizer_name_or_path": None},
    "P_TUNING": {**_PROMPT, "encoder_dropout": 0.0, "encoder_hidden_size": None, "encoder_num_layers": 2,
                 "encoder_reparameterization_type": "MLP"},
    "CPT": {**_PROMPT, "cpt_mask": None, "cpt_token_ids": None, "cpt_tokens_type_mask": None, "opt_loss_decay_factor": 1.0,
            "opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1, "opt_weighted_loss_type": "none", "tokenizer_name_or_path": None},
    "ADAPTION_PROMPT": {"adapter_layers": None, "adapter_len": None, "target_modules": None},
    "CARTRIDGE": {**_PROMPT, "num_frozen_tokens": 1},
    "PREFIX_TUNING": {**_PROMPT, "encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
}  # fmt: skip

USED = frozenset({
    "adapter_layers", "adapter_len",
    *COMMON, *_SELECT, *_PROMPT, "alpha", "alpha_pattern", "apply_GS", "block_share", "block_size", "block_size_pattern", "boft_block_num", "boft_block_size",
    "boft_n_butterfly_factor", "mini_r", "randlora_alpha", "topk", "trainable_token_indices", "vector_length", "cpt_token_ids",
    "bias", "fan_in_fan_out", "feedforward_modules", "gralora_k", "group_size", "init_r", "lora_alpha", "lora_bias", "n_frequency",
    "n_frequency_pattern", "num_cayley_neumann_terms", "oft_block_size", "r", "random_loc_seed", "rank_pattern", "scaling", "use_cayley_neumann",
    "use_dora", "use_rslora", "decompose_both", "decompose_factor", "delora_lambda", "lambda_pattern", "token_indices", "variant",
})  # fmt: skip
TRAINING = frozenset({
    "beta1", "beta2", "boft_dropout", "cpt_mask", "cpt_tokens_type_mask", "generator_seed", "init_logits_std", "init_vector_bank_bound",
    "num_frozen_tokens", "num_vectors", "opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon", "opt_weighted_loss_type",
    "pvera_dropout", "randlora_dropout", "save_only_topk_weights", "save_precomputed_indices", "select_top", "sparse", "sparsity", "vblora_dropout",
    "very_sparse", "coft", "corda_config", "d_initial", "deltaT", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
    "encoder_reparameterization_type", "ensure_weight_tying", "eps", "eva_config", "gralora_dropout", "hira_dropout", "init_ia3_weights",
    "init_lora_weights", "init_weights", "loftq_config", "lora_dropout", "lora_ga_config", "mask_type", "megatron_core", "miss_dropout", "module_dropout",
    "orth_reg_weight", "pissa_config", "prefix_projection", "projection_prng_key", "prompt_tuning_init", "prompt_tuning_init_text",
    "qalora_group_size", "random_seed", "rank_dropout", "rank_dropout_scale", "save_projection", "target_r", "tfinal", "tinit", "tokenizer_kwargs",
    "tokenizer_name_or_path", "total_step", "use_effective_conv2d", "vera_dropout",
})  # fmt: skip
#: initialisations that change the base's weights by what neither the file nor the base tells (texts, gradients, a quantised base)
REBASED = ("corda", "loftq", "lora_ga")
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration.

    Attributes:
        kind: `LORA`, `IA3` ...
        values: with defaults where the file left a field out.
    """

    kind: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def at(self, pattern: str, default: str, path: str) -> Any:
        """The value of a pattern field for a module: of the first key that is its path or the end of it, else the default.

        Keys with regular expressions are refused: none is run that comes from a file.
        """
        for key, value in (self.get(pattern) or {}).items():
            whole, plain = key.startswith("^"), key.removeprefix("^").replace("\\.", ".")
            if not set(plain) <= _PLAIN:
                raise ModuleError(f"{pattern}: {key!r} is a regular expression, and none is run that comes from a file; write out the module paths it stands for")
            if path == plain or (not whole and path.endswith("." + plain)):
                return value
        return self.get(default)


def check(raw: Mapping[str, Any], source: str) -> Config:
    """The configuration of a file, or the reason why it cannot be read.

    Raises:
        ModuleError: unknown method or field, or a field whose value changes what is computed and is not carried.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ModuleError(f"{source}: peft_type {kind!r} cannot be read{nearest(str(kind), DEFAULTS)} known: {listing(DEFAULTS, 40)}")
    known = {**COMMON, **DEFAULTS[kind]}
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise ModuleError(
            f"{source}: {kind} has no field {listing(map(repr, unknown))}{nearest(unknown[0], known)}; a newer peft may depend on it, so the "
            "module is not read as if it were absent (remove the field if it is known not to matter)"
        )
    for key, value in raw.items():
        if key not in USED and key not in TRAINING and value and value != known[key]:
            raise ModuleError(f"{source}: {key}={str(value)[:60]!r} changes what {kind} computes and is not carried; only {known[key]!r} is read")
    start = raw.get("init_lora_weights", raw.get("init_weights"))
    if isinstance(start, str) and start.lower().startswith(REBASED):
        raise ModuleError(
            f"{source}: it starts from {start!r}, which changes the base's own weights, and the file does not hold that change; save it in peft "
            "as a plain LoRA first: save_pretrained(path, path_initial_model_for_weight_conversion=...)"
        )
    return Config(kind, {**known, **raw})


def written(kind: str, **fields: Any) -> dict[str, Any]:
    """A full configuration as peft writes it.

    Raises:
        KeyError: a field that the method does not have.
    """
    config = {**COMMON, **DEFAULTS[kind], "peft_type": kind}
    for key, value in fields.items():
        if key not in config:
            raise KeyError(f"{kind} has no field {key!r}")
        config[key] = value
    return config
