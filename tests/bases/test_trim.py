"""Trimming the vocabulary: outputs on covered texts are exactly those of the whole base, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from intarsia.bases import Base, trim_vocabulary
from intarsia.errors import BaseError

CORPUS = ["the cat sat on the mat", "a dog and a cat", "the dogs sat down, the cats ran", "matter of fact: 12 cats", "naïve Ångström"] * 4
COVERED = ["the cat sat", "a dog ran, and 2 cats"]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def trained(kind: str) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.train_from_iterator(
            CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
        )
    elif kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        )
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(
            CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
        )
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return fast(made)


def model_for(kind: str, rows: int) -> torch.nn.Module:
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return {
        "bert": lambda: BertModel(BertConfig(vocab_size=rows, **small, **ids), add_pooling_layer=False),
        "bert-mlm": lambda: BertForMaskedLM(BertConfig(vocab_size=rows, **small, **ids)),
        "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=rows, **small, **ids, tie_word_embeddings=False)),
        "gpt2-tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=32, n_layer=1, n_head=2, **ids)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=rows, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=1, **ids)
        ),
    }[kind]().eval()


def make(tokenizer: str, model: str = "bert", spare: int = 5) -> Base:
    """A base whose embedding has some rows that no piece uses, as me5-small has."""
    made = trained(tokenizer)
    return Base(model_for(model, len(made) + spare), made, "base", "test", "none", pooling="mean", text_prefix="query: ")


def outputs(base: Base, texts: list[str]) -> torch.Tensor:
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    if base.model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.full((len(texts), 2), base.model.config.decoder_start_token_id)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        return base.model(**batch)[0]


def kept_old_ids(whole: Base, small: Base) -> list[int]:
    """Old id of every new id, by the text of the piece."""
    old = whole.tokenizer.get_vocab()
    return [old[token] for token, _ in sorted(small.tokenizer.get_vocab().items(), key=lambda item: item[1])]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_vectors_of_covered_texts_are_exactly_the_same(kind: str) -> None:
    whole = make(kind)
    small = trim_vocabulary(whole, COVERED)
    assert len(small.tokenizer) < len(whole.tokenizer)
    assert small.model.config.vocab_size == small.model.get_input_embeddings().num_embeddings == len(small.tokenizer)
    assert small.model.get_input_embeddings().weight.shape[0] == len(small.tokenizer)
    for texts in (COVERED, ["query: " + text for text in COVERED]):
        assert torch.equal(outputs(whole, texts), outputs(small, texts))
    assert f"trimmed to {len(small.tokenizer)} of {len(whole.tokenizer)}" in small.notes[-1]
    assert (small.pooling, small.text_prefix) == ("mean", "query: ")
    assert small.name != whole.name


@pytest.mark.parametrize("model", ["bert-mlm", "llama-untied", "gpt2-tied", "t5"])
def test_output_layers_are_trimmed_with_the_embedding(model: str) -> None:
    whole = make("unigram", model)
    small = trim_vocabulary(whole, COVERED)
    kept = kept_old_ids(whole, small)
    # a matrix product over fewer columns may add in another order, so the logits are near, not equal
    torch.testing.assert_close(outputs(small, COVERED), outputs(whole, COVERED)[..., kept], rtol=1e-5, atol=1e-6)
    for role in ("bos", "pad", "eos"):
        old, new = (getattr(base.model.config, f"{role}_token_id") for base in (whole, small))
        assert kept[new] == old
    tied = whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight
    assert (small.model.get_output_embeddings().weight is small.model.get_input_embeddings().weight) == tied
    assert small.model.get_output_embeddings().out_features == len(kept)


def test_the_base_is_unchanged() -> None:
    whole = make("unigram", "bert-mlm")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    tokens, config = whole.tokenizer.backend_tokenizer.to_str(), whole.model.config.to_dict()
    small = trim_vocabulary(whole, COVERED)
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in whole.model.state_dict().items())
    assert whole.tokenizer.backend_tokenizer.to_str() == tokens
    assert whole.model.config.to_dict() == config


def test_ids_can_be_named_instead() -> None:
    whole = make("bpe")
    ids = whole.tokenizer(COVERED[0]).input_ids
    small = trim_vocabulary(whole, ids)
    assert torch.equal(outputs(whole, COVERED[:1]), outputs(small, COVERED[:1]))
    assert trim_vocabulary(whole, range(len(whole.tokenizer))).tokenizer.get_vocab() == whole.tokenizer.get_vocab()


def test_other_texts_still_work_and_ids_stay_inside() -> None:
    for kind in ("unigram", "bpe", "wordpiece"):
        small = trim_vocabulary(make(kind), COVERED)
        assert outputs(small, ["naïve Ångström", "日本 zebra"]).isfinite().all()


def test_byte_level_text_is_never_lost() -> None:
    small = trim_vocabulary(make("bpe"), COVERED)
    text = "naïve Ångström 日本"
    assert small.tokenizer.decode(small.tokenizer(text, add_special_tokens=False).input_ids) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.data())
def test_any_set_of_texts_is_split_the_same(whole: Callable[[str], Base], data: st.DataObject) -> None:
    base = whole(data.draw(st.sampled_from(["unigram", "bpe"])))
    texts = data.draw(st.lists(st.text("thecadogsnmr ,:1Å日", max_size=20), min_size=1, max_size=4))
    small = trim_vocabulary(base, texts)
    old = kept_old_ids(base, small)
    for text in texts:
        assert [old[i] for i in small.tokenizer(text).input_ids] == base.tokenizer(text).input_ids


@pytest.fixture(scope="module")
def whole() -> Callable[[str], Base]:
    made = {kind: make(kind) for kind in ("unigram", "bpe")}
    return lambda kind: made[kind]


def test_a_wordpiece_text_that_would_change_is_refused() -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "ab", "abc", "##c", "a", "b"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base = Base(model_for("bert", 9), fast(tokenizer), "base", "test", "none")
    assert base.tokenizer("abcc").input_ids == [5, 6]
    # `abcx` is unknown with `abc`; nothing of it is kept, so it stays unknown
    assert trim_vocabulary(base, ["abcx"]).tokenizer("abcx").input_ids == [3]
    # `abc` is unknown since `ab` is longer than `a`; without `ab` it would be `a ##bc`
    tricky = Tokenizer(models.WordPiece({"<unk>": 0, "x": 1, "y": 2, "ab": 3, "a": 4, "##bc": 5, "z": 6}, unk_token="<unk>"))
    tricky.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    other = Base(model_for("bert", 9), PreTrainedTokenizerFast(tokenizer_object=tricky, unk_token="<unk>"), "b", "t", "none")
    assert other.tokenizer("abc").input_ids == [0]
    with pytest.raises(BaseError, match="'abc' would be split in another way"):
        trim_vocabulary(other, ["abc", "zbc", "a"])


def test_what_cannot_be_trimmed_is_refused() -> None:
    base = make("unigram", "bert-mlm")
    with pytest.raises(BaseError, match="give texts or token ids"):
        trim_vocabulary(base, ["a", 1])  # type: ignore[list-item]
    with pytest.raises(BaseError, match="lie outside the vocabulary"):
        trim_vocabulary(base, [10_000])
    base.model.side = torch.nn.Embedding(base.model.config.vocab_size, 4)
    with pytest.raises(BaseError, match=r"weights per piece that cannot be trimmed: side\.weight"):
        trim_vocabulary(base, COVERED)
    gpt = make("unigram", "gpt2-tied")
    gpt.model.generation_config.suppress_tokens = [5]
    with pytest.raises(BaseError, match="suppress_tokens hold token ids"):
        trim_vocabulary(gpt, COVERED)
    level = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(BaseError, match="a WordLevel tokenizer cannot be trimmed"):
        trim_vocabulary(Base(model_for("bert", 9), fast(level), "base", "test", "none"), ["a"])
