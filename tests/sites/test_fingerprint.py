"""Laws of the fingerprint: what must not matter, what must, and what a difference is called."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from intarsia.errors import BaseError
from intarsia.sites import Fingerprint, fingerprint
from intarsia.sites.fingerprint import BLOCK, BLOCKS, COMPARED, _sample
from tests import zoo


def tokenizer(words: int = 40, lower: bool = False, **special: str) -> hf.PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(words - 5)} | {"the": words - 5, "The": words - 4, "fox": words - 3, "<unk>": words - 2, "[M]": words - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        made.normalizer = normalizers.Lowercase()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


# ------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_same_base_whatever_the_head(name: str) -> None:
    model, _ = zoo.make(name)
    base = fingerprint(model)
    assert base.difference(fingerprint(zoo.make(name)[0])) is None and base == fingerprint(model)
    headless, _ = zoo.make(name, headless=True, seed=1)
    assert base.difference(fingerprint(headless)) is not None, "other random weights"
    missing = headless.load_state_dict({key: value for key, value in _base_state(model).items() if key in headless.state_dict()}, strict=False)
    assert all(key.startswith("pooler") for key in missing.missing_keys)
    assert base.difference(fingerprint(headless)) is None


def _base_state(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    return {key.removeprefix(prefix): value for key, value in model.state_dict().items()}


def test_any_task_class_around_a_base() -> None:
    model, _ = zoo.make("xlm-roberta")
    expected = fingerprint(model)
    for kind in (hf.XLMRobertaForSequenceClassification, hf.XLMRobertaForTokenClassification, hf.XLMRobertaForQuestionAnswering):
        other = kind(zoo.config("xlm-roberta", num_labels=4))
        other.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
        assert expected.difference(fingerprint(other)) is None
    t5, _ = zoo.make("t5")
    classifier = hf.T5ForSequenceClassification(zoo.config("t5", num_labels=2))
    classifier.transformer.load_state_dict({k: v for k, v in t5.state_dict().items() if not k.startswith("lm_head")})
    assert fingerprint(t5).difference(fingerprint(classifier)) is None


def test_the_pooler_does_not_matter() -> None:
    with_pooler = hf.BertModel(zoo.config("bert"))
    without = hf.BertModel(zoo.config("bert"), add_pooling_layer=False)
    without.load_state_dict({k: v for k, v in with_pooler.state_dict().items() if not k.startswith("pooler")})
    assert fingerprint(with_pooler).difference(fingerprint(without)) is None
    with torch.no_grad():
        with_pooler.pooler.dense.weight.add_(1)
    assert fingerprint(with_pooler).difference(fingerprint(without)) is None


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_loading_in_bfloat16_does_not_matter(name: str) -> None:
    whole = fingerprint(zoo.make(name)[0])
    half = fingerprint(zoo.make(name)[0].bfloat16())
    assert whole == half and hash(whole) == hash(half) and (whole.dtype, half.dtype) == ("float32", "bfloat16")
    assert whole == fingerprint(zoo.make(name)[0].bfloat16().float()) == fingerprint(zoo.make(name)[0].double())


def test_a_difference_through_float16_says_so() -> None:
    difference = fingerprint(zoo.make("bert")[0]).difference(fingerprint(zoo.make("bert")[0].half()))
    assert difference is not None and difference.startswith("weights: ") and "loaded as float32 and float16" in difference


def test_float16_checkpoints_are_the_same_in_float32() -> None:
    assert fingerprint(zoo.make("bert")[0].half()) == fingerprint(zoo.make("bert")[0].half().float())


def test_what_is_beside_the_base_does_not_matter() -> None:
    model, _ = zoo.make("bert")
    before = fingerprint(model)
    model.train()
    next(model.parameters()).requires_grad_(False)
    model.get_submodule("bert.encoder.layer.0").add_module("intarsia_out", nn.Linear(2, 2))
    model.bert.register_buffer("scratch", torch.zeros(3), persistent=False)
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight.add_(1)
    assert fingerprint(model) == before
    untied = hf.LlamaForCausalLM(zoo.config("llama"))
    tied = hf.LlamaForCausalLM(zoo.config("llama-tied"))
    tied.model.load_state_dict(untied.model.state_dict())
    assert fingerprint(untied) == fingerprint(tied)


def test_strides_do_not_matter() -> None:
    model, _ = zoo.make("bert")
    before = fingerprint(model)
    dense = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    dense.weight = nn.Parameter(dense.weight.detach().t().contiguous().t())
    assert not dense.weight.is_contiguous() and fingerprint(model) == before


def test_offloaded_weights_are_read_where_they_are_kept() -> None:
    before = fingerprint(zoo.make("llama")[0])
    model = cpu_offload(zoo.make("llama")[0], execution_device="cpu")
    assert any(p.is_meta for p in model.parameters())
    assert fingerprint(model) == before


def test_a_model_without_values_has_no_fingerprint() -> None:
    with torch.device("meta"):
        model = hf.BertModel(zoo.config("bert"))
    with pytest.raises(BaseError, match=r"no values at '[a-zA-Z_.0-9]+' \(meta device\)"):
        fingerprint(model)


# ------------------------------------------------------------------------------------------------ what must matter


def test_one_changed_element_in_any_small_tensor() -> None:
    """Tensors of up to BLOCKS * BLOCK elements are read as a whole: no element of a small model can change unseen."""
    model, _ = zoo.make("bert")
    before = fingerprint(model)
    draw = torch.Generator().manual_seed(0)
    for path, parameter in model.bert.named_parameters():
        if path.startswith("pooler"):
            continue
        flat = parameter.data.view(-1)
        position = int(torch.randint(len(flat), (1,), generator=draw))
        kept = float(flat[position])
        flat[position] = kept + 0.01 if abs(kept) < 1 else kept * 1.02
        assert (fingerprint(model).difference(before) or "").startswith("weights: "), path
        flat[position] = kept
    assert fingerprint(model) == before


@settings(deadline=None, max_examples=50)
@given(st.integers(BLOCKS * BLOCK + 1, 200_000), st.integers(0, BLOCKS - 1), st.integers(0, BLOCK - 1))
def test_sampled_positions_of_a_large_tensor(size: int, block: int, offset: int) -> None:
    """Each of the evenly spread blocks counts in full, the first and last element among them."""
    tensor = torch.ones(size)
    before = _sample(tensor)
    assert len(before) == 2 * BLOCKS * BLOCK
    tensor[(size - BLOCK) * block // (BLOCKS - 1) + offset] = 2
    assert _sample(tensor) != before
    for position in (0, size // 2, -1):
        tensor = torch.ones(size)
        tensor[position] = 2
        assert _sample(tensor) != before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float16])
def test_every_type_of_tensor_has_bytes(dtype: torch.dtype) -> None:
    a, b = torch.tensor([0, 1, 1, 0]).to(dtype), torch.tensor([0, 1, 0, 1]).to(dtype)
    assert _sample(a) == _sample(a.clone()) != _sample(b)


def test_names_and_shapes_count() -> None:
    model, _ = zoo.make("bert")
    before = fingerprint(model)
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    attention.query, attention.key = attention.key, attention.query
    assert (fingerprint(model).difference(before) or "").startswith("weights")


DIFFERENT: list[tuple[str, Callable[[], hf.PreTrainedModel]]] = [
    ("architecture: 'bert' and 'roberta'", lambda: hf.RobertaModel(zoo.config("roberta"))),
    ("layers: (2,) and (3,)", lambda: zoo.make("bert", num_hidden_layers=3)[0]),
    ("layers: (2,) and (1,)", lambda: zoo.make("bert", num_hidden_layers=1)[0]),
    ("width: 32 and 64", lambda: zoo.make("bert", hidden_size=64)[0]),
    ("vocabulary: 97 and 98", lambda: zoo.make("bert", vocab_size=98)[0]),
    ("shapes: ", lambda: zoo.make("bert", intermediate_size=48)[0]),
    ("weights: ", lambda: zoo.make("bert", seed=1)[0]),
]


@pytest.mark.parametrize(("message", "build"), DIFFERENT)
def test_the_differing_field_is_named_with_both_values(message: str, build: Callable[[], hf.PreTrainedModel]) -> None:
    base, other = fingerprint(zoo.make("bert")[0]), fingerprint(build())
    difference = base.difference(other)
    assert difference is not None and difference.startswith(message)
    if message in ("shapes: ", "weights: "):
        field = message[:-2]
        assert getattr(base, field) in difference and getattr(other, field) in difference
    backwards = other.difference(base)
    assert backwards is not None and backwards.split(":")[0] == difference.split(":")[0]


def test_albert_counts_executions() -> None:
    """Its layers share their weights: more of them is another function with the same tensors."""
    short, long = (fingerprint(zoo.make("albert", num_hidden_layers=count)[0]) for count in (2, 4))
    assert short.weights == long.weights and short.difference(long) == "layers: (2,) and (4,)"


def test_quantisation() -> None:
    model, _ = zoo.make("llama")
    plain = fingerprint(model)
    model.config.quantization_config = hf.BitsAndBytesConfig(load_in_4bit=True)
    quantised = fingerprint(model)
    difference = plain.difference(quantised)
    assert difference is not None and difference.startswith("quantisation: none and ") and "load_in_4bit" in difference
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert (quantised.difference(fingerprint(model)) or "").startswith("quantisation")
    dynamic = torch.ao.quantization.quantize_dynamic(zoo.make("llama")[0], {nn.Linear})
    assert (plain.difference(fingerprint(dynamic)) or "").startswith("quantisation")


def test_tokenizer() -> None:
    model, _ = zoo.make("bert")
    base = fingerprint(model, tokenizer())
    assert base == fingerprint(model, tokenizer()) and base.tokenizer is not None
    assert base.difference(fingerprint(model)) is None, "compared only where both are known"
    for other in (tokenizer(41), tokenizer(lower=True), tokenizer(mask_token="[M]")):
        difference = base.difference(fingerprint(model, other))
        assert difference is not None and difference.startswith("tokenizer: ")
    used = tokenizer()
    used("the fox", truncation=True, max_length=1, padding="max_length") if used.pad_token else used("the fox", truncation=True, max_length=1)
    assert fingerprint(model, used) == base, "how it was called before does not matter"


# ----------------------------------------------------------------------------------------------------------- storing


def test_round_trip() -> None:
    for made in (fingerprint(zoo.make("bart")[0], tokenizer()), fingerprint(zoo.make("bert")[0])):
        again = Fingerprint.from_dict(json.loads(json.dumps(made.to_dict())))
        assert again == made and again.dtype == made.dtype and isinstance(again.layers, tuple)


def test_fields_added_later_do_not_orphan_older_files() -> None:
    """A missing optional field is its default, and a field beyond the first nine is written only where it says something."""
    value = fingerprint(zoo.make("bert")[0]).to_dict()
    short = {name: entry for name, entry in value.items() if name not in ("quantisation", "tokenizer", "dtype")}
    assert Fingerprint.from_dict(short).to_dict() == {**short, "quantisation": None, "tokenizer": None, "dtype": ""}
    assert set(value) == {"architecture", "layers", "width", "vocabulary", "shapes", "weights", "quantisation", "tokenizer", "dtype"}


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "2"}, {"layers": [2.0]}, {"layers": [True]}, {"width": "32"}, {"width": True}, {"weights": None}, {"tokenizer": 3},
        {"extra": 1}, {"architecture": None}, {"vocabulary": 1.5},
    ],
)  # fmt: skip
def test_a_broken_fingerprint_is_refused(change: dict[str, Any]) -> None:
    value = fingerprint(zoo.make("bert")[0]).to_dict()
    with pytest.raises(ValueError, match="fingerprint"):
        Fingerprint.from_dict({**value, **change})
    for name in set(value) - {"quantisation", "tokenizer", "dtype"}:
        with pytest.raises(ValueError, match="a fingerprint has the fields"):
            Fingerprint.from_dict({key: entry for key, entry in value.items() if key != name})
    for nothing in (None, [], "x"):
        with pytest.raises(ValueError, match="a fingerprint has the fields"):
            Fingerprint.from_dict(nothing)  # type: ignore[arg-type]


def test_every_field_but_dtype_is_compared() -> None:
    assert set(COMPARED) == set(fingerprint(zoo.make("bert")[0]).to_dict()) - {"dtype"}


def test_a_known_fingerprint() -> None:
    """The hash is part of the file format: if this fails, stored modules no longer find their base."""
    model = hf.BertModel(zoo.config("bert"))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 1024 + number)
    made = fingerprint(model)
    assert (made.shapes, made.weights) == ("e3433bcb9518a0ea523151bdb032e039", "6aa578c4c25d4d7039d934a8000f20a2")


def test_a_hundred_million_parameters_take_less_than_a_second() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    model.to_empty(device="cpu")
    assert sum(p.numel() for p in model.parameters()) > 100_000_000
    begun = time.process_time()
    fingerprint(model)
    assert time.process_time() - begun < 1
