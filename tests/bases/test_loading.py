"""Loading a base: head, dtype, completeness, refusals; nothing global changes and nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from intarsia.bases import BASES, load
from intarsia.bases.rows import EmbeddedBase
from intarsia.errors import BaseError, UsageError

pytestmark = pytest.mark.usefixtures("no_network", "cache")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 20}


@pytest.fixture
def saved(tiny: EmbeddedBase, tmp_path: Path) -> Callable[..., Path]:
    """Saves a model with the tiny tokenizer beside it."""
    tokenizer = load("tiny-e5").tokenizer

    def save(model: torch.nn.Module, name: str = "m") -> Path:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_an_embedded_base(tiny: EmbeddedBase) -> None:
    base = load("tiny-e5")
    assert type(base.model) is BertModel
    assert not base.model.training
    assert base.model.pooler is None
    assert base.model.dtype == torch.float32
    assert sum(p.numel() for p in base.model.parameters()) == tiny.parameters
    assert (base.name, base.licence, base.pooling, base.text_prefix) == ("tiny-e5", "MIT", "mean", "query: ")
    assert base.source.startswith("package tiny_e5_pkg 1.0")
    assert base.tokenizer.model_max_length == 24
    assert base.tokenizer("ab Ａｂ").input_ids == [0, 9, 6, 9, 3, 2]
    assert base.tokenizer.mask_token_id == 15
    assert base.tokenizer("a <mask>").input_ids == [0, 9, 15, 2]  # the mask takes the space before it
    with torch.no_grad():
        assert base.model(**base.tokenizer("ab", return_tensors="pt")).last_hidden_state.isfinite().all()


def test_bases_are_values(tiny: EmbeddedBase) -> None:
    base = load("tiny-e5")
    with pytest.raises(AttributeError):
        base.name = "other"  # type: ignore[misc]


def test_two_loads_share_nothing(tiny: EmbeddedBase) -> None:
    first, second = load("tiny-e5"), load("tiny-e5")
    with torch.no_grad():
        first.model.embeddings.word_embeddings.weight.zero_()
    assert second.model.embeddings.word_embeddings.weight.abs().sum() > 0
    assert load("tiny-e5", verify=True).model.embeddings.word_embeddings.weight.abs().sum() > 0  # nor with the file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, tiny: EmbeddedBase) -> None:
    assert load("tiny-e5", dtype=dtype).model.dtype == getattr(torch, dtype)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        load("tiny-e5", dtype="bfloat")
    with pytest.raises(UsageError, match="did you mean 'masked-lm'"):
        load("tiny-e5", head="maskedlm")  # type: ignore[arg-type]


def test_nothing_global_changes(tiny: EmbeddedBase, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    torch.manual_seed(3)
    default, state = torch.get_default_dtype(), torch.random.get_rng_state()
    capfd.readouterr()
    try:
        load("tiny-e5", head="masked-lm", dtype="bfloat16")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == default
    assert capfd.readouterr() == ("", "")


def test_logging_is_put_back_after_an_error(tiny: EmbeddedBase) -> None:
    transformers_logging.set_verbosity_warning()
    with pytest.raises(BaseError):
        load("tiny-e5", head="seq2seq-lm")
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING


def test_a_fresh_head_is_named_and_always_the_same(tiny: EmbeddedBase) -> None:
    torch.manual_seed(1)
    first = load("tiny-e5", head="masked-lm")
    torch.manual_seed(2)
    second = load("tiny-e5", head="masked-lm")
    assert type(first.model) is BertForMaskedLM
    assert any("no weights for its masked-lm head" in note and "freshly made" in note for note in first.notes)
    for (name, one), two in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(one, two), name
    body = load("tiny-e5").model.state_dict()
    assert all(torch.equal(first.model.bert.state_dict()[name], value) for name, value in body.items())


def test_a_head_in_the_folder_is_used(saved: Callable[..., Path]) -> None:
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    folder = saved(model)
    base = load(folder)
    assert type(base.model) is BertForMaskedLM
    assert base.notes == ()
    ids = torch.tensor([[0, 5, 6, 2]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)
    bare = load(folder, head="none")
    assert type(bare.model) is BertModel
    assert any("were not used" in note and "cls.predictions" in note for note in bare.notes)


def test_a_pooler_in_the_folder_is_kept(saved: Callable[..., Path]) -> None:
    model = BertModel(BertConfig(**SMALL))
    base = load(saved(model))
    assert torch.equal(base.model.pooler.dense.weight, model.pooler.dense.weight)


def test_a_task_head_is_left_out_with_a_note(saved: Callable[..., Path]) -> None:
    base = load(saved(BertForSequenceClassification(BertConfig(**SMALL))))
    assert type(base.model) is BertModel
    assert any("2 weights in the folder were not used (classifier" in note for note in base.notes)


def test_decoders_and_two_stacks(saved: Callable[..., Path]) -> None:
    gpt = saved(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2)), "gpt")
    t5 = saved(T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)), "t5")
    assert type(load(gpt).model) is GPT2LMHeadModel
    assert type(load(gpt, head="causal-lm").model) is GPT2LMHeadModel
    assert type(load(t5).model) is T5ForConditionalGeneration
    with pytest.raises(BaseError, match=r"has no masked-lm form; it has: causal-lm, none"):
        load(gpt, head="masked-lm")


def test_an_encoder_with_a_causal_head_is_refused(tiny: EmbeddedBase, saved: Callable[..., Path]) -> None:
    with pytest.raises(BaseError, match="would see the words it predicts"):
        load("tiny-e5", head="causal-lm")
    decoder = saved(BertForMaskedLM(BertConfig(**SMALL)))
    config = json.loads((decoder / "config.json").read_text()) | {"is_decoder": True}
    (decoder / "config.json").write_text(json.dumps(config))
    assert load(decoder, head="causal-lm").model.config.is_decoder


# damage -----------------------------------------------------------------------------------------------------------


def test_missing_and_misshapen_weights(saved: Callable[..., Path]) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)))
    tensors = load_file(folder / "model.safetensors")
    some = {name: value for name, value in tensors.items() if "layer.1.attention.self" not in name}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"6 weights are missing or have another shape: encoder\.layer\.1"):
        load(folder)
    name = "encoder.layer.1.output.dense.bias"
    save_file({**tensors, name: torch.zeros(31)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"cannot load the weights|another shape"):
        load(folder)


def test_truncated_weights(saved: Callable[..., Path]) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)))
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(BaseError, match=r"model\.safetensors"):
            load(folder)
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(BaseError, match="no safetensors file"):
        load(folder)


def test_other_weights_under_an_embedded_name(tiny: EmbeddedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(BASES._items, "tiny-e5", replace(tiny, parameters=5))
    with pytest.raises(BaseError, match="weights, tiny-e5 has 5"):
        load("tiny-e5")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "m")
    with pytest.raises(BaseError, match="has no tokenizer"):
        load(tmp_path / "m")


def test_a_damaged_tokenizer(saved: Callable[..., Path]) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)))
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(BaseError, match="cannot load the tokenizer"):
        load(folder)


def test_code_in_a_folder_is_never_run(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": "evil.T"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    assert type(load(folder).model) is BertModel  # the library's own class of that name
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(BaseError, match="code from a model folder is never run"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_not_opened(saved: Callable[..., Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    folder = saved(BertModel(BertConfig(**SMALL)))
    torch.save(Bomb(), folder / "pytorch_model.bin")
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_what_was_loaded_can_be_saved_and_loaded_as_a_folder(tiny: EmbeddedBase, tmp_path: Path) -> None:
    base = load("tiny-e5")
    base.model.save_pretrained(tmp_path / "copy")
    base.tokenizer.save_pretrained(tmp_path / "copy")
    copy = load(tmp_path / "copy")
    batch = base.tokenizer(["ab é", "abc"], padding=True, return_tensors="pt")
    again = AutoTokenizer.from_pretrained(tmp_path / "copy")(["ab é", "abc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == again["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(base.model(**batch).last_hidden_state, copy.model(**batch).last_hidden_state)
