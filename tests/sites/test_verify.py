"""Rows and inference agree on every family; and a wrong row is found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import Anatomy, Fused, Stack, resolve, verify
from intarsia.sites.anatomy import ROWS, WEIGHT_ONLY, bare, row
from intarsia.sites.infer import Inference
from intarsia.sites.verify import BEYOND, compare
from tests import zoo


@pytest.mark.parametrize("headless", [False, True], ids=["head", "headless"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rows_and_inference_agree(name: str, headless: bool) -> None:
    assert verify(zoo.make(name, headless=headless)[0]) == []


#: Configurations of known families in which something sits elsewhere.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "OPT-350m, norms after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "_remove_final_layer_norm": True}),
    "X-MOD, norms before": ("xmod", {"pre_norm": True}),
    "ALBERT, two groups of two": ("albert", {"num_hidden_groups": 2, "inner_group_num": 2, "num_hidden_layers": 4}),
    "ELECTRA without projection": ("electra", {"embedding_size": 32}),
    "DeBERTa with convolution": ("deberta-v2", {"conv_kernel_size": 3}),
    "DeBERTa without relative positions": ("deberta-v2", {"relative_attention": False}),
    "DeBERTa-v3, relative table not normalised": ("deberta-v3", {"norm_rel_ebd": "none"}),
    "Marian with two embeddings": ("marian", {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}),
    "T5, three layers and one": ("t5", {"num_layers": 3, "num_decoder_layers": 1}),
    "gated T5": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "wide heads": ("qwen3", {"head_dim": 16}),
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "GPT-2, six layers": ("gpt2", {"n_layer": 6}),
    "ModernBERT, biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_configuration(variant: str) -> None:
    name, settings = VARIANTS[variant]
    assert verify(zoo.make(name, **settings)[0]) == []


def cross_attending(build: Callable[..., PreTrainedModel], config: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config.is_decoder = config.add_cross_attention = True
    batch = {"input_ids": zoo.token_ids(5), "encoder_hidden_states": torch.randn(2, 7, 32)}
    return build(config), batch


@pytest.mark.parametrize(
    ("build", "family"), [(hf.BertLMHeadModel, "bert"), (hf.RobertaForCausalLM, "roberta"), (hf.GPT2LMHeadModel, "gpt2")]
)
def test_decoders_made_of_encoders(build: Callable[..., PreTrainedModel], family: str) -> None:
    model, batch = cross_attending(build, zoo.config(family))
    assert verify(model, batch=batch) == []
    sites = resolve(model)
    assert len(sites.select("xattn.mem")) == 2 and sites["0.xattn.k"].features == 32


def test_models_with_one_of_two_stacks() -> None:
    assert verify(hf.T5EncoderModel(zoo.config("t5"))) == []
    batch = {"input_ids": zoo.token_ids(5), "encoder_hidden_states": torch.randn(2, 7, 32)}
    assert verify(hf.BartForCausalLM(zoo.config("bart")), batch=batch) == []


def test_modernbert_has_no_norm_before_its_first_attention() -> None:
    """The one true irregularity among the families: an Identity stands in the place of the norm.

    The site is there (its output is what the attention reads), but it has no weight; inference finds it because an
    identity fulfils what a norm must: its input is the residual, its output what the sub-layer reads.
    """
    model, _ = zoo.make("modernbert")
    sites = resolve(model)
    assert isinstance(model.get_submodule(sites["0.attn.norm"].path), nn.Identity)
    assert "0.attn.norm.weight" not in sites and "1.attn.norm.weight" in sites
    assert verify(model) == []


# ------------------------------------------------------------------------------------------------ wrong rows


def known(model: PreTrainedModel) -> Anatomy:
    found = row(model.config)
    assert found is not None
    return found


def wrong(anatomy: Anatomy, stack: str, **changes: Any) -> Anatomy:
    return replace(anatomy, stacks={**anatomy.stacks, stack: replace(anatomy.stacks[stack], **changes)})


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "olmo2", "gpt_neox", "mixtral", "phi3", "mt5", "bart", "xmod", "modernbert"])
def test_every_wrong_path_is_found_out(name: str) -> None:
    """Point each word of the row, one after the other, at another module of the block."""
    model, _ = zoo.make(name)
    anatomy, inference = known(model), Inference(model, None)
    for stack_name, stack in anatomy.stacks.items():
        paths = sorted({bare(path) for path in stack.roles.values() if not path.endswith("?")})
        for role, path in stack.roles.items():
            if path.endswith("?") or role in BEYOND:
                continue
            other = next(candidate for candidate in paths if candidate != path)
            found = compare(wrong(anatomy, stack_name, roles={**stack.roles, role: other}), inference)
            assert any(d.word == role and d.stack == stack_name and d.inferred == path for d in found), role
            found = compare(wrong(anatomy, stack_name, roles={r: p for r, p in stack.roles.items() if r != role}), inference)
            assert any(d.word == role and d.row is None for d in found), role


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("bert", "", {"order": "pre"}, "order"),
    ("llama", "", {"order": "sandwich"}, "order"),
    ("gpt_neox", "", {"parallel": False}, "parallel"),
    ("gpt_neox-sequential", "", {"parallel": True}, "parallel"),
    ("gpt2", "", {"fused": {"attn.qkv": Fused(("k", "q", "v"))}}, "fused attn.qkv"),
    ("gpt_neox", "", {"fused": {"attn.qkv": Fused(("q", "k", "v"))}}, "fused attn.qkv"),
    ("bloom", "", {"fused": {"attn.qkv": Fused(("q", "k", "v"))}}, "fused attn.qkv"),
    ("modernbert", "", {"fused": {"attn.qkv": Fused(("q", "k", "v")), "ffn.gate_up": Fused(("up", "gate"))}}, "fused ffn.gate_up"),
    ("deberta-v2", "", {"lend": {}}, "lend"),
    ("bert", "", {"lend": {"embeddings.word_embeddings": "encoder"}}, "lend"),
    ("bert", "", {"blocks": "encoder"}, "blocks"),
    ("bert", "", {"around": {"embed": "embeddings.words", "embed.norm": "embeddings.LayerNorm"}}, "embed"),
    ("whisper", "encoder", {"tokens": True}, "tokens"),
    ("xmod", "", {"unsited": {}}, "executions of ffn.norm"),
    ("bert", "", {"unsited": {"ffn.norm": "no"}}, "executions of ffn.norm"),
    ("opt", "", {"entry": ""}, "entry"),
    ("deberta-v3", "", {"reused": frozenset()}, "executions of attn.q"),
    ("albert", "", {"around": {"embed": "embeddings.word_embeddings"}}, "stem"),
    ("bart", "decoder", {"around": {"embed": "encoder.embed_tokens"}}, "embed"),
]


@pytest.mark.parametrize(("name", "stack", "change", "word"), WRONG)
def test_other_wrong_words_are_found_out(name: str, stack: str, change: dict[str, Any], word: str) -> None:
    model, _ = zoo.make(name)
    assert word in {d.word for d in verify(model, wrong(known(model), stack, **change))}


def test_a_wrong_shared_embedding_is_found_out() -> None:
    model, _ = zoo.make("t5")
    assert [d.word for d in verify(model, replace(known(model), shared=""))] == ["shared"]


def test_nothing_to_verify() -> None:
    model, _ = zoo.make("bert")
    model.config.model_type = "unheard-of"
    with pytest.raises(SiteError, match="no row is known for model_type 'unheard-of'"):
        verify(model)


# ------------------------------------------------------------------------------------------------- the rows themselves


def test_every_row_is_tried_here() -> None:
    """No row without a model that proves it."""
    tried: set[int] = set()
    for name in zoo.FAMILIES:
        tried.add(id(row(zoo.config(name))))
    for name, settings in VARIANTS.values():
        tried.add(id(row(zoo.config(name, **settings))))
    untried = [kind for kind, rows in ROWS.items() for entry in rows if id(entry) not in tried]
    assert untried == []


def test_rows_use_known_words_only() -> None:
    attention = ("", ".q", ".k", ".v", ".o", ".qkv", ".kv", ".norm", ".out.norm", ".q.norm", ".k.norm", ".relative", ".pos_q", ".pos_k")
    feed_forward = ("", ".gate", ".up", ".down", ".gate_up", ".experts", ".router", ".norm", ".out.norm")
    roles = {f"{word}{rest}" for word in ("attn", "xattn") for rest in attention} | {f"ffn{rest}" for rest in feed_forward}
    around = {"embed", "embed.position", "embed.type", "embed.norm", "embed.project", "embed.relative", "embed.relative.norm"}
    around |= {"stem", "final.norm", "final.project", "pooler"}
    stacks: list[Stack] = [stack for rows in ROWS.values() for entry in rows for stack in entry.stacks.values()]
    for stack in stacks:
        assert set(stack.roles) <= roles and set(stack.around) <= around
        assert set(stack.fused) <= set(stack.roles) and set(stack.unsited) <= set(stack.roles) and stack.reused <= set(stack.roles)
    assert roles | around >= WEIGHT_ONLY
