"""Tiny tokenizers of each kind, made in memory; ids fit the vocabulary of `tests.zoo` (97) unless said otherwise."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import NllbTokenizer, PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase
BERT = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
XLMR = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def wordpiece(max_length: int = 64, **more: Any) -> PreTrainedTokenizerFast:
    """BERT's kind: words into letters, `[CLS] a [SEP]`, pairs with token types."""
    vocab = [*BERT, *LETTERS, *(f"##{c}" for c in LETTERS), "é", "##é", "."]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]",
        model_max_length=max_length, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **more,
    )  # fmt: skip


def unigram(max_length: int = 64, **more: Any) -> PreTrainedTokenizerFast:
    """XLM-R's kind: NFKC, `▁`, `<s> a </s>`."""
    pieces = [*XLMR, "▁", *(f"▁{c}" for c in LETTERS), *LETTERS, "é", "▁the", "▁ab"]
    scores = [0.0] * 5 + [-3.0] + [-2.0] * (len(pieces) - 6)
    inner = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=3))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=max_length, **more,
    )  # fmt: skip


def bytelevel(max_length: int = 64, **more: Any) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, no special tokens around, one end token; 262 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<|end|>", *alphabet, "ab", "Ġa", "Ġab", "th", "he"])}
    inner = Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "a"), ("Ġ", "ab"), ("t", "h"), ("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>", model_max_length=max_length, **more
    )


def nllb(legacy: bool = False, **more: Any) -> NllbTokenizer:
    """A translation tokenizer with codes for three languages; ids as the models of the zoo expect (pad 0, bos 1, eos 2)."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "▁", *LETTERS]
    return NllbTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], extra_special_tokens=["eng_Latn", "swh_Latn", "yor_Latn"],
        legacy_behaviour=legacy, model_max_length=64, **more,
    )  # fmt: skip
