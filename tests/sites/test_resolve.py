"""Names, parameters, ties, partial models, messages; and that looking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intarsia.errors import SiteError
from intarsia.sites import Site, SiteMap, anatomy_of, fingerprint, infer, resolve, verify
from intarsia.sites.anatomy import row
from tests import zoo

VARIANTS = [(name, headless) for name in zoo.FAMILIES for headless in (False, True)]


def parameter(model: nn.Module, site: Site) -> nn.Parameter:
    found = model.get_submodule(site.path)._parameters[site.param or ""]
    assert found is not None
    return found


# ----------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(("name", "headless"), VARIANTS)
def test_every_parameter_is_covered_exactly_once(name: str, headless: bool) -> None:
    model, _ = zoo.make(name, headless=headless)
    sites = resolve(model)
    covered = [id(parameter(model, site)) for site in sites.parameters()]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_owners_are_all_who_hold_the_parameter(name: str) -> None:
    model, _ = zoo.make(name)
    held: dict[int, set[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for param, value in module.named_parameters(recurse=False):
            held.setdefault(id(value), set()).add((path, param))
    for site in resolve(model).values():
        if site.port == "weight":
            value = parameter(model, site)
            assert site.owners[0] == (site.path, site.param) and set(site.owners) == held[id(value)]
            assert site.shape == tuple(value.shape)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_lending_where_the_sites_say_equals_changing_the_weights(name: str) -> None:
    """The law of the weight port: every parameter is read only while an owner, or `lend_at`, runs."""
    model, batch = zoo.make(name)
    changed = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(7)
    lent: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    for site in resolve(model).parameters():
        new = nn.Parameter(parameter(model, site) + 0.1 * torch.randn(site.shape, generator=noise))
        for path, param in site.owners:
            host = path if site.lend_at is None else site.lend_at
            lent.setdefault(host, []).append((model.get_submodule(path), param, new))
            changed.get_submodule(path)._parameters[param] = new
    handles = []
    for path, loans in lent.items():
        kept = [(owner, param, owner._parameters[param]) for owner, param, _ in loans]
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(_setter(loans)))
        handles.append(module.register_forward_hook(_setter(kept)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, changed(**batch).logits, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def _setter(loans: list[Any]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        for owner, param, value in loans:
            owner._parameters[param] = value

    return hook


def test_the_tied_embedding_of_two_stacks() -> None:
    sites = resolve(zoo.make("t5")[0])
    embedding = sites["embed.weight"]
    assert embedding.owners == (
        ("encoder.embed_tokens", "weight"), ("decoder.embed_tokens", "weight"), ("lm_head", "weight"), ("shared", "weight"),
    )  # fmt: skip
    assert "head.weight" not in sites and "embed.weight" in sites.missing["head.weight"]
    with pytest.raises(SiteError, match=r"tied to 'embed\.weight'"):
        sites.select("head.weight")


def test_ties_are_read_from_objects_not_from_the_configuration() -> None:
    untied, _ = zoo.make("llama")
    tied, _ = zoo.make("llama-tied")
    assert "head.weight" in resolve(untied) and "head.weight" not in resolve(tied)
    assert resolve(tied)["embed.weight"].owners == (("model.embed_tokens", "weight"), ("lm_head", "weight"))
    tied.config.tie_word_embeddings = False
    assert "head.weight" not in resolve(tied)


def test_marian_with_an_embedding_per_stack() -> None:
    model = hf.MarianMTModel(zoo.config("marian", share_encoder_decoder_embeddings=False, tie_word_embeddings=False))
    sites = resolve(model)
    assert {"encoder.embed.weight", "decoder.embed.weight"} <= set(sites)
    assert "embed.weight" not in sites


def test_conv1d_is_transposed_and_nothing_else_is() -> None:
    sites = resolve(zoo.make("gpt2")[0])
    transposed = {site.name.split(".", 1)[1] for site in sites.parameters() if site.transposed}
    assert transposed == {"attn.qkv.weight", "attn.o.weight", "ffn.up.weight", "ffn.down.weight"}
    assert sites["0.attn.qkv.weight"].shape == (32, 96)
    assert not any(site.transposed for site in resolve(zoo.make("bert")[0]).parameters())


def test_relative_positions_of_deberta_are_read_by_the_encoder() -> None:
    site = resolve(zoo.make("deberta-v2")[0])["embed.relative.weight"]
    assert (site.path, site.lend_at) == ("deberta.encoder.rel_embeddings", "deberta.encoder")


def test_xmod_adapters_are_part_of_the_base() -> None:
    sites = resolve(zoo.make("xmod")[0])
    adapter = sites["other.encoder.layer.1.output.adapter_modules.en_XX.dense1.weight"]
    assert (adapter.layer, adapter.stack) == (1, "")
    assert "1.ffn.norm.weight" in sites and "1.ffn.norm" not in sites
    with pytest.raises(SiteError, match="twice in a block"):
        sites.select("ffn.norm")


def test_experts_are_weights_only() -> None:
    sites = resolve(zoo.make("mixtral")[0])
    assert sites["0.ffn.experts.gate_up_proj"].shape == (4, 128, 32)
    assert "0.ffn.experts" not in sites and "0.ffn.router.weight" in sites
    assert sites["0.ffn"].reads == "model.layers.0.mlp"
    with pytest.raises(SiteError, match="mixture of experts"):
        sites.select("ffn.up")


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_head_class_does_not_matter_to_names(name: str) -> None:
    """A module saved on the model with a head fits the model without one: same names, same tensors."""
    with_head, without = (resolve(zoo.make(name, headless=headless)[0]) for headless in (False, True))
    for site in without.values():
        if site.name != "logits" and not site.name.startswith("pooler"):
            other = with_head[site.name]
            assert (other.features, other.shape, other.layer, other.stack, other.view) == (
                site.features, site.shape, site.layer, site.stack, site.view,
            )  # fmt: skip


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_names_are_well_formed(name: str) -> None:
    model, _ = zoo.make(name)
    sites = resolve(model)
    for key, site in sites.items():
        assert key == site.name
        assert site.stack in sites.layers or site.stack == ""
        words = site.name.split(".")
        if words[0] not in ("other", "head"):
            numbers = [int(word) for word in words if word.isdigit()]
            assert numbers == ([] if site.layer is None else [site.layer])
            assert (words[0] if words[0] in ("encoder", "decoder") else "") == site.stack
        model.get_submodule(site.path)
        for path in (site.residual, site.norm, site.reads, site.lend_at):
            assert path is None or model.get_submodule(path) is not None
    assert resolve(model, anatomy=anatomy_of(model)).keys() == sites.keys()


def test_task_heads_are_named_by_their_path() -> None:
    sites = resolve(zoo.make("xlm-roberta-cls")[0])
    heads = [site.name for site in sites.parameters() if site.name.startswith("head.")]
    assert heads == [f"head.classifier.{layer}.{param}" for layer in ("dense", "out_proj") for param in ("weight", "bias")]
    assert sites["logits"].features == 3 and "head" not in sites and "head.<path>" in sites.missing["head"]
    t5 = hf.T5ForSequenceClassification(zoo.config("t5", num_labels=3))
    assert "head.classification_head.dense.weight" in resolve(t5) and "encoder.0.attn.q" in resolve(t5)


def test_pooler() -> None:
    model = hf.BertModel(zoo.config("bert"))
    assert resolve(model)["pooler"].path == "pooler.dense"
    bare = hf.BertModel(zoo.config("bert"), add_pooling_layer=False)
    with pytest.raises(SiteError, match="built without one"):
        resolve(bare).select("pooler")


def test_order_of_sites_is_the_order_of_the_forward_pass() -> None:
    names = [name for name, site in resolve(zoo.make("llama")[0]).items() if site.port != "weight"]
    assert names[:13] == [
        "seq", "embed", "stem", "0.attn.norm", "0.attn.q", "0.attn.k", "0.attn.v", "0.attn.mem", "0.attn.heads", "0.attn.o",
        "0.attn", "0.ffn.norm", "0.ffn.gate",
    ]  # fmt: skip
    assert names[-4:] == ["final.norm", "head.in", "head", "logits"]


@pytest.mark.parametrize(
    ("build", "present", "absent"),
    [
        (lambda: hf.T5EncoderModel(zoo.config("t5")), "encoder", "decoder"),
        (lambda: hf.BartForCausalLM(zoo.config("bart")), "decoder", "encoder"),
        (lambda: hf.MT5EncoderModel(zoo.config("mt5")), "encoder", "decoder"),
    ],
)
def test_models_with_one_of_two_stacks(build: Callable[[], PreTrainedModel], present: str, absent: str) -> None:
    model = build()
    sites = resolve(model)
    assert set(sites.layers) == {present} and absent in sites.missing
    assert f"{present}.seq" in sites and f"{present}.0.attn.q" in sites
    assert sorted(id(parameter(model, s)) for s in sites.parameters()) == sorted(id(p) for p in model.parameters())


def test_albert_has_one_block_per_group_element() -> None:
    sites = resolve(zoo.make("albert", num_hidden_layers=6, num_hidden_groups=2, inner_group_num=2)[0])
    assert sites.layers == {"": 4}
    assert sites["2.attn.q"].path == "albert.encoder.albert_layer_groups.1.albert_layers.0.attention.query"
    assert sites["stem"].port == "out"


def test_layers_of_a_deeper_model() -> None:
    sites = resolve(zoo.make("bart", encoder_layers=3, decoder_layers=1)[0])
    assert sites.layers == {"encoder": 3, "decoder": 1}
    assert len(sites.select("attn.{q,v}")) == 8 and len(sites.select("xattn.q")) == 1
    assert [s.name for s in sites.select("encoder.*.attn.q", layers="-1:")] == ["encoder.2.attn.q"]


def test_heads_follow_the_configuration() -> None:
    assert resolve(zoo.make("llama")[0])["0.attn.mem"].heads == (2, 8)
    wide = zoo.make("qwen3", head_dim=16)[0]
    assert resolve(wide)["0.attn.mem"].heads == (2, 16) and resolve(wide)["0.attn.heads"].features == 64
    assert resolve(zoo.make("t5", d_kv=4)[0])["decoder.0.xattn.mem"].heads == (4, 4)


# ------------------------------------------------------------------------------------------------ changes nothing


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a careless visitor could change."""
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": [id(p) for p in model.parameters()],
        "grad": [p.requires_grad for p in model.parameters()],
        "modules": [(path, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for path, m in model.named_modules()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "random": torch.get_rng_state().clone(),
        "dtype": torch.get_default_dtype(),
        "registries": (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "deberta-v2", "albert", "mixtral", "whisper"])
def test_looking_changes_nothing(name: str) -> None:
    model, _ = zoo.make(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    resolve(model)
    fingerprint(model)
    infer(model)
    verify(model)
    assert same(before, state(model))


def test_a_failed_inference_changes_nothing_either() -> None:
    model, _ = zoo.make("bert")
    before = state(model)
    with pytest.raises(SiteError, match="forward pass of its small twin failed"):
        infer(model, {"input_ids": torch.tensor([[10_000]])})
    assert same(before, state(model))


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_meta_device_gives_the_same_sites(name: str) -> None:
    model, _ = zoo.make(name)
    with torch.device("meta"):
        ghost = type(model)(zoo.config(name))
    assert list(resolve(ghost).values()) == list(resolve(model).values())
    assert all(p.is_meta for p in ghost.parameters())


def test_sockets_are_no_part_of_the_model() -> None:
    model, _ = zoo.make("bert")
    before = list(resolve(model).values())
    model.get_submodule("bert.encoder.layer.0.output.dense").add_module("intarsia_out", nn.Linear(3, 3))
    assert list(resolve(model).values()) == before


# ------------------------------------------------------------------------------------------------------- messages


def test_not_a_transformers_model() -> None:
    with pytest.raises(SiteError, match="expected a transformers PreTrainedModel, found Linear"):
        resolve(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_missing_module_is_named_with_its_nearest_relative() -> None:
    model, _ = zoo.make("bert")
    layer = model.get_submodule("bert.encoder.layer.1.attention.self")
    layer.add_module("query_x", layer.query)
    del layer.query
    with pytest.raises(SiteError) as caught:
        resolve(model)
    message = str(caught.value)
    assert "role 'attn.q'" in message and "'bert.encoder.layer.1.attention.self.query'" in message
    assert "did you mean 'bert.encoder.layer.1.attention.self.query_x'" in message and "infer" in message


def test_one_role_for_two_modules_is_refused() -> None:
    model, _ = zoo.make("bert")
    known = row(model.config)
    assert known is not None
    with pytest.raises(SiteError, match=r"would both be called 'embed\.weight'"):
        resolve(model, anatomy=replace(known, shared="embeddings.position_embeddings"))


def test_heads_that_do_not_divide() -> None:
    model, _ = zoo.make("llama")
    model.get_submodule("model.layers.0.self_attn").head_dim = 7  # type: ignore[assignment]
    with pytest.raises(SiteError, match="16 features, which heads of size 7 do not divide"):
        resolve(model)


@pytest.mark.parametrize("name", ["deberta-v2", "bloom", "xglm"])
def test_a_closed_attention_says_why_it_has_no_memory(name: str) -> None:
    with pytest.raises(SiteError, match="does not go through transformers' attention interface"):
        resolve(zoo.make(name)[0]).select("attn.mem", port="mem")


def every_map() -> Iterator[SiteMap]:
    for name in zoo.FAMILIES:
        yield resolve(zoo.make(name)[0])


def test_whatever_is_missing_is_not_there() -> None:
    for sites in every_map():
        for family in sites.missing:
            assert not any(f".{site}".endswith(f".{family}") for site in sites if "weight" not in family), (sites.model, family)
