"""Trainable counts against the closed formulas and published numbers, on full-size shapes (meta device, no memory)."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

from intarsia.host import Host
from intarsia.methods import build
from intarsia.patches import Head

SHAPES = {
    "bert-base": lambda: transformers.BertModel(transformers.BertConfig()),
    "roberta-large": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
        ),
        add_pooling_layer=False,
    ),
    "t5-base": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    ),
    "llama-3.2-3b": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
        )
    ),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config()),
    "bert-large": lambda: transformers.BertModel(transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
    "bart-large": lambda: transformers.BartModel(transformers.BartConfig()),
    "t0-3b": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu")
    ),
    "t0-11b": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    ),
    "llama-7b": lambda: transformers.LlamaModel(transformers.LlamaConfig()),
}


@functools.cache
def host(name: str) -> Host:
    with torch.device("meta"):
        return Host(SHAPES[name]())


D, L, FF = 768, 12, 3072
CASES = [
    ("bert-base", "full", {}, 109_482_240),
    ("bert-base", "bitfit", {}, 102_912),
    ("bert-base", "bitfit", {"at": "attn.q.bias, ffn.up.bias"}, L * (D + FF)),
    ("bert-base", "ln", {}, 38_400),
    ("bert-base", "freeze_k", {"k": 3}, 21_263_616),
    ("bert-base", "prompt", {"length": 100}, 76_800),
    ("bert-base", "prefix", {"length": 30, "reparameterise": None}, 552_960),
    ("bert-base", "prefix", {"length": 30, "reparameterise": 512}, 9_872_384),
    ("bert-base", "houlsby", {"width": 64, "norms": False}, 2_379_264),
    ("bert-base", "houlsby", {"width": 64}, 2_379_264 + 38_400),
    ("bert-base", "houlsby", {"width": 48, "norms": False}, 1_789_056),
    ("bert-base", "pfeiffer", {"reduction": 16}, 894_528),
    ("bert-base", "pfeiffer", {"reduction": 16, "layers": "5:"}, 521_808),
    ("bert-base", "parallel", {"reduction": 2}, 7_091_712),
    ("bert-base", "ia3", {}, 55_296),
    ("bert-base", "lora", {"rank": 8}, 294_912),
    ("bert-base", "lora", {"rank": 8, "at": "attn.{q,k,v,o}, ffn.{up,down}"}, 1_327_104),
    ("roberta-large", "lora", {"rank": 8}, 786_432),
    ("roberta-large", "full", {}, 354_310_144),
    ("roberta-large", "pfeiffer", {"width": 64}, 24 * (2 * 1024 * 64 + 64 + 1024)),
    ("roberta-large", "bitfit", {}, 24 * (7 * 1024 + 4096) + 1024),
    ("t5-base", "full", {}, 222_882_048),
    ("t5-base", "ln", {}, 47_616),
    ("t5-base", "houlsby", {"width": 24}, 1_855_104),
    ("t5-base", "prompt", {"length": 100}, 76_800),
    ("t5-base", "ia3", {}, 129_024),
    ("llama-3.2-3b", "lora", {"rank": 32}, 9_175_040),
    ("llama-3.2-3b", "prefix", {"length": 200, "reparameterise": None}, 11_468_800),
    ("llama-3.2-3b", "prompt", {"length": 200}, 614_400),
    ("llama-3.2-3b", "ln", {}, 175_104),
    ("llama-7b", "lora", {"rank": 32, "at": "attn.{q,k,v}, ffn.{up,down}"}, 56_098_816),
    ("llama-3.2-3b", "ia3", {}, 286_720),
    ("gpt2", "full", {}, 124_439_808),
    ("bert-large", "full", {}, 335_141_888),
    ("bert-large", "bitfit", {}, 272_384),
    ("bert-large", "fish", {}, 1_675_709),  # 0.5 % of all, as diff pruning's and FISH's papers have it
    ("bert-large", "child_tuning_d", {"density": 0.3, "at": "**"}, int(0.3 * 335_141_888)),
    ("bart-large", "full", {}, 406_291_456),
    # with the biases of the adapters, which the paper's 27,377,664 leaves out
    ("bart-large", "mam", {"length": 30, "reparameterise": None, "width": 512}, 27_377_664 + 24 * (512 + 1024)),
    ("t0-3b", "ia3", {}, 540_672),
    ("t0-11b", "ia3", {}, 1_081_344),
    ("t5-base", "houlsby", {"width": 24, "at": "ffn"}, 951_360),
    ("t5-base", "bitfit", {"create": True, "at": "{attn,xattn}.{q,k,v,o}, ffn.{gate,up,down}, **.norm, head"}, 282_468),
    ("gpt2", "lora", {"rank": 4}, L * 2 * 4 * (D + D)),
]


@pytest.mark.parametrize(("shape", "method", "settings", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_count(shape: str, method: str, settings: dict[str, object], expected: int) -> None:
    assert host(shape).count(build(method, **settings)) == expected


def test_head_count() -> None:
    """A two-label head on bert-base: d * 2 + 2."""
    assert host("bert-base").count(build("head").with_head(Head(("no", "yes")))) == D * 2 + 2


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.startswith("t0")])
def test_full_covers_every_parameter_once(shape: str) -> None:
    expected = sum(p.numel() for p in host(shape).model.parameters() if p.device.type == "meta")
    names = [n for n, _ in host(shape).model.named_parameters() if "intarsia" not in n]
    assert host(shape).count(build("full")) == expected
    assert len(host(shape).sites.parameters()) == len(names)


def test_parts_sum_to_the_whole() -> None:
    """freeze_k of all layers, embeddings and pooler add up to full."""
    h = host("bert-base")
    layers = h.count(build("freeze_k", k=12))
    rest = sum(p.numel() for n, p in h.model.named_parameters() if "encoder.layer" not in n)
    assert layers + rest == h.count(build("full"))
