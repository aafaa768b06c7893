"""Tiny randomly initialised models of every architecture family, built from configurations in milliseconds.

Two layers, width 32, four heads of size 8 (two key/value heads where the architecture groups queries), a vocabulary
of 97 pieces.  No file is read and no network is used.  What is not here: real weights (`intarsia.bases`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

hf.logging.set_verbosity_error()

VOCAB = 97
WIDTH = 32
HEADS = 4
BATCH, LENGTH, TARGET_LENGTH = 2, 7, 5
MELS, FRAMES = 8, 32

Kind = Literal["encoder", "causal", "seq2seq", "speech"]
Settings = Mapping[str, Any]

_SPECIAL: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: Settings = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64,
    "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA: Settings = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_NEOX: Settings = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64,
    "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_BART: Settings = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None, **_SPECIAL,
}  # fmt: skip
_T5: Settings = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": HEADS,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_DEBERTA: Settings = {
    **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """How one family is built: configuration class and settings, model class with a head, kind of inputs."""

    config: type[Any]
    settings: Settings
    model: type[Any]
    kind: Kind


def _family(kind: Kind, stem: str, model: str, settings: Settings, **more: Any) -> Family:
    return Family(getattr(hf, f"{stem}Config"), {**settings, **more}, getattr(hf, model), kind)


_TABLE: dict[str, Family] = {
    # encoders
    "bert": _family("encoder", "Bert", "BertForMaskedLM", _BERT),
    "roberta": _family("encoder", "Roberta", "RobertaForMaskedLM", _BERT),
    "xlm-roberta": _family("encoder", "XLMRoberta", "XLMRobertaForMaskedLM", _BERT),
    "xlm-roberta-cls": _family("encoder", "XLMRoberta", "XLMRobertaForSequenceClassification", _BERT, num_labels=3),
    "camembert": _family("encoder", "Camembert", "CamembertForMaskedLM", _BERT),
    "distilbert": _family(
        "encoder", "DistilBert", "DistilBertForMaskedLM", {}, vocab_size=VOCAB, dim=WIDTH, n_layers=2, n_heads=HEADS,
        hidden_dim=64, max_position_embeddings=64, pad_token_id=0,
    ),
    "electra": _family("encoder", "Electra", "ElectraForMaskedLM", _BERT, embedding_size=16),
    "albert": _family("encoder", "Albert", "AlbertForMaskedLM", _BERT, embedding_size=16),
    "deberta-v2": _family("encoder", "DebertaV2", "DebertaV2ForMaskedLM", _DEBERTA),
    "deberta-v3": _family(
        "encoder", "DebertaV2", "DebertaV2ForMaskedLM", _DEBERTA, share_att_key=True, position_biased_input=False, type_vocab_size=0
    ),
    "modernbert": _family(
        "encoder", "ModernBert", "ModernBertForMaskedLM", {k: v for k, v in _BERT.items() if k != "type_vocab_size"},
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    "xmod": _family(
        "encoder", "Xmod", "XmodForMaskedLM", _BERT, languages=["en_XX", "de_DE"], default_language="en_XX", adapter_reduction_factor=2
    ),
    # decoders
    "gpt2": _family(
        "causal", "GPT2", "GPT2LMHeadModel", _SPECIAL, vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=64
    ),
    "llama": _family("causal", "Llama", "LlamaForCausalLM", _LLAMA),
    "llama-tied": _family("causal", "Llama", "LlamaForCausalLM", _LLAMA, tie_word_embeddings=True),
    "mistral": _family("causal", "Mistral", "MistralForCausalLM", _LLAMA),
    "qwen2": _family("causal", "Qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": _family("causal", "Qwen3", "Qwen3ForCausalLM", _LLAMA),
    "gemma": _family("causal", "Gemma", "GemmaForCausalLM", _LLAMA),
    "gemma2": _family("causal", "Gemma2", "Gemma2ForCausalLM", _LLAMA),
    "gemma3": _family("causal", "Gemma3Text", "Gemma3ForCausalLM", _LLAMA),
    "phi3": _family("causal", "Phi3", "Phi3ForCausalLM", _LLAMA),
    "olmo2": _family("causal", "Olmo2", "Olmo2ForCausalLM", _LLAMA),
    "mixtral": _family("causal", "Mixtral", "MixtralForCausalLM", _LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "opt": _family(
        "causal", "OPT", "OPTForCausalLM", _SPECIAL, vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=WIDTH,
    ),
    "gpt_neox": _family("causal", "GPTNeoX", "GPTNeoXForCausalLM", _NEOX, use_parallel_residual=True),
    "gpt_neox-sequential": _family("causal", "GPTNeoX", "GPTNeoXForCausalLM", _NEOX, use_parallel_residual=False),
    "bloom": _family("causal", "Bloom", "BloomForCausalLM", _SPECIAL, vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS),
    "xglm": _family(
        "causal", "XGLM", "XGLMForCausalLM", _SPECIAL, vocab_size=VOCAB, d_model=WIDTH, num_layers=2, attention_heads=HEADS,
        ffn_dim=64, max_position_embeddings=64,
    ),
    # encoder-decoders
    "t5": _family("seq2seq", "T5", "T5ForConditionalGeneration", _T5),
    "mt5": _family("seq2seq", "MT5", "MT5ForConditionalGeneration", _T5, feed_forward_proj="gated-gelu"),
    "bart": _family("seq2seq", "Bart", "BartForConditionalGeneration", _BART),
    "mbart": _family("seq2seq", "MBart", "MBartForConditionalGeneration", _BART),
    "marian": _family("seq2seq", "Marian", "MarianMTModel", _BART, decoder_vocab_size=VOCAB, forced_eos_token_id=None),
    "m2m_100": _family("seq2seq", "M2M100", "M2M100ForConditionalGeneration", _BART),
    # speech: the encoder reads frames of a spectrogram
    "speech_to_text": _family(
        "speech", "Speech2Text", "Speech2TextForConditionalGeneration", _BART, input_feat_per_channel=MELS, input_channels=1,
        conv_channels=24, num_conv_layers=2, conv_kernel_sizes=[3, 3], max_source_positions=64, max_target_positions=64,
        pad_token_id=1, bos_token_id=0,
    ),
    "whisper": _family(
        "speech", "Whisper", "WhisperForConditionalGeneration", _BART, num_mel_bins=MELS, max_source_positions=FRAMES // 2,
        max_target_positions=64, suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip


def _of_kind(*kinds: Kind) -> tuple[str, ...]:
    return tuple(name for name, family in _TABLE.items() if family.kind in kinds)


#: Every name `make` knows.
FAMILIES: tuple[str, ...] = tuple(_TABLE)
#: Encoder-only models with a masked-language-model head (or a classifier where the name says `-cls`).
ENCODERS = _of_kind("encoder")
#: Decoder-only language models.
CAUSAL = _of_kind("causal")
#: Encoder-decoders that read text.
SEQ2SEQ = _of_kind("seq2seq")
#: Encoder-decoders that read spectrograms (`input_features`).
SPEECH = _of_kind("speech")
#: Every model that reads `input_ids`.
TEXT = _of_kind("encoder", "causal", "seq2seq")
#: Models with `generate` (drop `decoder_input_ids` from the inputs first).
GENERATING = _of_kind("causal", "seq2seq", "speech")


def kind(name: str) -> Kind:
    """Kind of the family: `"encoder"`, `"causal"`, `"seq2seq"` or `"speech"`."""
    return _TABLE[name].kind


def config(name: str, **overrides: Any) -> hf.PreTrainedConfig:
    """A fresh configuration of the family; `overrides` replace its settings."""
    family = _TABLE[name]
    made: hf.PreTrainedConfig = family.config(**copy.deepcopy({**family.settings, **overrides}))
    return made


def token_ids(length: int = LENGTH, batch: int = BATCH, seed: int = 0) -> Tensor:
    """Ids of ordinary pieces, `[batch, length]`: never padding, never a special token."""
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one forward pass, with attention mask (all ones) and decoder inputs where the family takes them."""
    what = kind(name)
    if what != "speech":
        ids = token_ids(seed=seed)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        rows = torch.Generator().manual_seed(seed)
        shape = (BATCH, MELS, FRAMES) if name == "whisper" else (BATCH, FRAMES, MELS)
        batch = {"input_features": torch.randn(shape, generator=rows)}
        if name != "whisper":
            batch["attention_mask"] = torch.ones(BATCH, FRAMES, dtype=torch.long)
    if what in ("seq2seq", "speech"):
        batch["decoder_input_ids"] = token_ids(TARGET_LENGTH, seed=seed + 1)
    return batch


def perturb_(model: PreTrainedModel, seed: int = 0, scale: float = 0.05) -> None:
    """Add normal noise to every parameter in place, so that zero biases and unit norms hide no fault."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=scale)


@cache
def _headless_class(config_class: type[Any]) -> type[Any]:
    return hf.MODEL_MAPPING[config_class]


def make(
    name: str, *, headless: bool = False, seed: int = 0, perturb: bool = True, **config_overrides: Any
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model in evaluation mode and inputs for one forward pass.

    Args:
        name: one of `FAMILIES`.
        headless: build the class without a task head (what `AutoModel` gives) instead.
        seed: of the weights; the inputs are the same for every seed.
        perturb: add N(0, 0.05) to all parameters (see `perturb_`).
        config_overrides: settings of the configuration to replace, e.g. `num_hidden_layers=3`.

    The caller's random state is left as it was.
    """
    settings = config(name, **config_overrides)
    build = _headless_class(type(settings)) if headless else _TABLE[name].model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = build(settings).eval()
    if perturb:
        perturb_(model, seed + 1)
    return model, inputs(name)
