"""Architectures nobody wrote a row for: found by arithmetic, or refused with what could not be found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from intarsia.errors import SiteError
from intarsia.sites import Fused, infer, resolve, verify
from intarsia.sites.anatomy import bare
from intarsia.sites.roles import BlockRoles
from intarsia.sites.trace import trace
from tests import zoo

# ------------------------------------------------------------------------------------- the families, names taken away


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_family_without_its_row_gets_the_same_sites(name: str) -> None:
    """Only what arithmetic cannot name differs: DeBERTa's relative positions, and X-MOD's norm that runs twice."""
    model, batch = zoo.make(name)
    known = resolve(model)
    model.config.model_type = "unheard-of"
    found = resolve(model, anatomy=infer(model, batch))
    unnamed = {"embed.relative", "pos_q", "pos_k"}
    expected = {key: site for key, site in known.items() if not any(word in key for word in unnamed)}
    for key, site in expected.items():
        other = found[key]
        assert (other.path, other.port, other.view, other.features, other.heads, other.owners) == (
            site.path, site.port, site.view, site.features, site.heads, site.owners,
        ), key  # fmt: skip
        assert (other.residual, other.norm, other.reads) == (site.residual, site.norm, site.reads), key
        assert other.reused == site.reused or name == "xmod", key
    assert {key for key in found if not key.startswith("other.")} - set(known) <= {"0.ffn.norm", "1.ffn.norm"}
    assert len(found.parameters()) == len(known.parameters())


def test_resolve_infers_when_no_row_is_known() -> None:
    model, _ = zoo.make("qwen2")
    names = set(resolve(model))
    model.config.model_type = "unheard-of"
    assert set(resolve(model)) == names


def test_inference_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(zoo.config("llama"))
    model.config.model_type = "unheard-of"
    assert "1.ffn.gate" in resolve(model)


LLAMA = {key: value for key, value in zoo.config("llama").to_dict().items() if key in (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)}  # fmt: skip
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0}

#: Models without a row: class, configuration, (order, parallel, fused roles) of the last stack.
STRANGERS: dict[str, tuple[str, Callable[[], Any], tuple[str, bool, set[str]]]] = {
    "gptj": ("GPTJForCausalLM", lambda: hf.GPTJConfig(**GPT, rotary_dim=4), ("pre", True, set())),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", lambda: hf.GPTBigCodeConfig(**GPT), ("pre", False, {"attn.qkv"})),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        ("pre", False, set()),
    ),
    "codegen": ("CodeGenForCausalLM", lambda: hf.CodeGenConfig(**GPT, rotary_dim=4), ("pre", True, {"attn.qkv"})),
    "mpt": ("MptForCausalLM", lambda: hf.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4), ("pre", False, {"attn.qkv"})),
    "phi": ("PhiForCausalLM", lambda: hf.PhiConfig(**LLAMA), ("pre", True, set())),
    "cohere": ("CohereForCausalLM", lambda: hf.CohereConfig(**LLAMA), ("pre", True, set())),
    "glm": ("GlmForCausalLM", lambda: hf.GlmConfig(**LLAMA, head_dim=8), ("pre", False, {"ffn.gate_up"})),
    "starcoder2": ("Starcoder2ForCausalLM", lambda: hf.Starcoder2Config(**LLAMA), ("pre", False, set())),
    "olmo": ("OlmoForCausalLM", lambda: hf.OlmoConfig(**LLAMA), ("pre", False, set())),
    "prelayernorm": ("RobertaPreLayerNormForMaskedLM", lambda: hf.RobertaPreLayerNormConfig(**BERT), ("pre", False, set())),
    "mpnet": ("MPNetForMaskedLM", lambda: hf.MPNetConfig(**BERT), ("post", False, set())),
    "pegasus": ("PegasusForConditionalGeneration", lambda: hf.PegasusConfig(**zoo._BART), ("pre", False, set())),
    "umt5": ("UMT5ForConditionalGeneration", lambda: hf.UMT5Config(**zoo._T5), ("pre", False, set())),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers(name: str) -> None:
    """What is inferred resolves, is confirmed by a second look with other numbers, and covers every parameter."""
    kind, config, (order, parallel, fused) = STRANGERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = getattr(hf, kind)(config()).eval()
    anatomy = infer(model)
    stack = list(anatomy.stacks.values())[-1]
    assert (stack.order, stack.parallel, set(stack.fused)) == (order, parallel, fused)
    sites = resolve(model, anatomy=anatomy)
    assert {"0.attn", "0.ffn"} <= {".".join(key.split(".")[-2:]) for key in sites}
    assert sorted(id(p) for p in model.parameters()) == sorted(id(model.get_submodule(s.path)._parameters[s.param or ""]) for s in sites.parameters())
    zoo.perturb_(model, 3)
    assert verify(model, anatomy) == []


# ------------------------------------------------------------------------------------------------ home-made models


class HomeConfig(PreTrainedConfig):
    """Settings of the home-made model: `order` of its norms, and faults to build in."""

    model_type = "home-made"

    def __init__(self, order: str = "pre", fault: str = "", hidden_size: int = 24, num_hidden_layers: int = 4, vocab_size: int = 50, **kwargs: Any) -> None:
        self.order, self.fault = order, fault
        self.hidden_size, self.num_hidden_layers, self.vocab_size, self.num_attention_heads = hidden_size, num_hidden_layers, vocab_size, 3
        super().__init__(**kwargs)


class Look(nn.Module):
    def __init__(self, config: HomeConfig, layer: int) -> None:
        super().__init__()
        self.config, self.head_dim, self.is_causal = config, config.hidden_size // 3, False
        width = config.hidden_size
        self.alpha, self.beta, self.gamma, self.delta = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        a, b, c = (m(x).view(*x.shape[:2], 3, -1).transpose(1, 2) for m in (self.alpha, self.beta, self.gamma))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        values = c * 2 if self.config.fault == "values" else c
        return self.delta(attend(self, a, b, values, None)[0].reshape(x.shape))


class Think(nn.Module):
    def __init__(self, config: HomeConfig) -> None:
        super().__init__()
        self.wide, self.act, self.narrow = nn.Linear(config.hidden_size, 40), nn.GELU(), nn.Linear(40, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)))


class Storey(nn.Module):
    def __init__(self, config: HomeConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.look, self.think = Look(config, layer), Think(config)
        self.first, self.second = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        half = 0.5 if self.config.fault == "residual" else 1.0
        if self.config.order == "pre":
            x = x + half * self.look(self.first(x))
            return x + self.think(self.second(x))
        x = self.first(x + self.look(x))
        return self.second(x + self.think(x))


class Home(PreTrainedModel):
    config_class = HomeConfig
    base_model_prefix = "home"

    def __init__(self, config: HomeConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        storeys = [Storey(config, layer) for layer in range(config.num_hidden_layers)]
        self.storeys = nn.Sequential(*storeys) if config.fault == "list" else nn.ModuleList(storeys)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutput:
        if self.config.fault == "raises":
            raise ZeroDivisionError("the roof leaks")
        x = self.words(input_ids)
        for storey in self.storeys:
            x = storey(x)
        return BaseModelOutput(last_hidden_state=x)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_home_made_model(order: str) -> None:
    model = Home(HomeConfig(order=order)).eval()
    stack = infer(model).stacks[""]
    assert stack.blocks == "storeys" and stack.order == order
    assert {role: bare(path) for role, path in stack.roles.items()} == {
        "attn.q": "look.alpha", "attn.k": "look.beta", "attn.v": "look.gamma", "attn.o": "look.delta", "attn": "look",
        "attn.norm": "first", "ffn.up": "think.wide", "ffn.down": "think.narrow", "ffn": "think", "ffn.norm": "second",
    }  # fmt: skip
    sites = resolve(model)
    assert sites.layers == {"": 4} and sites["3.attn.mem"].heads == (3, 8) and sites["embed"].path == "words"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("values", r"storeys\.0: cannot find the value projection of the attention 'storeys\.0\.look'"),
        ("residual", r"storeys\.0: cannot find where attn joins the residual stream"),
        ("list", r"Home: cannot find its blocks"),
        ("raises", r"Home: a forward pass of its small twin failed \(ZeroDivisionError: the roof leaks\)"),
    ],
)
def test_what_cannot_be_found_is_named(fault: str, message: str) -> None:
    model = Home(HomeConfig(fault=fault)).eval()
    with pytest.raises(SiteError, match=message):
        resolve(model)


def test_blocks_that_differ_too_much_are_refused() -> None:
    model = Home(HomeConfig(num_hidden_layers=2)).eval()
    second = model.storeys[1]
    second.think = nn.Sequential(second.think)  # the same computation under other paths

    class Odd(Home):
        def __init__(self, config: HomeConfig) -> None:
            super().__init__(config)
            self.storeys[1].think = nn.Sequential(self.storeys[1].think)

    with pytest.raises(SiteError, match=r"role 'ffn.(up|down|)'? ?.*in one block and at .* in another"):
        infer(Odd(HomeConfig(num_hidden_layers=2)).eval())
    # a model that was changed after it was built is copied instead of built anew, and refused for the same reason
    with pytest.raises(SiteError, match="in one block and at"):
        infer(model)


def test_a_changed_model_on_the_meta_device_cannot_be_copied() -> None:
    with torch.device("meta"):
        model = Home(HomeConfig())
        del model.storeys[0].look.alpha
    with pytest.raises(SiteError, match="quantised or on the meta device"):
        infer(model)


def test_a_model_that_reads_something_else_needs_a_batch() -> None:
    model = Home(HomeConfig()).eval()
    model.main_input_name = "smells"  # type: ignore[misc]
    type(model).main_input_name = "smells"
    try:
        with pytest.raises(SiteError, match="reads 'smells', for which no example can be made up"):
            infer(model)
        assert infer(model, {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}).stacks[""].blocks == "storeys"
    finally:
        type(model).main_input_name = "input_ids"


# ------------------------------------------------------------------------------------------------------ the tracing


def test_the_layout_of_a_fused_projection() -> None:
    """Values must be equal; queries and keys, which are rotated or scaled, are told apart by the lengths of their heads."""
    draw = torch.Generator().manual_seed(0)
    heads = {word: torch.randn(2, 4, 5, 8, generator=draw) for word in "qkv"}  # [B, H, T, D]
    sizes = dict.fromkeys("qkv", 32)
    for by_head in (False, True):
        for order in (("q", "k", "v"), ("k", "q", "v"), ("v", "q", "k"), ("q", "v", "k")):
            parts = [heads[word].transpose(1, 2) for word in order]  # [B, T, H, D]
            y = torch.cat(parts, -1).reshape(2, 5, -1) if by_head else torch.cat([p.reshape(2, 5, -1) for p in parts], -1)
            scaled = {"q": heads["q"] * 0.3, "k": heads["k"].flip(-1), "v": heads["v"]}
            assert BlockRoles.layout(y, "qkv", scaled, sizes) == Fused(order, by_head)


def test_a_trace_shows_who_reads_a_parameter() -> None:
    model, batch = zoo.make("deberta-v2")
    readers = trace(model, batch).readers
    assert readers == {("deberta.encoder.rel_embeddings", "weight"): {"deberta.encoder", "deberta.encoder.LayerNorm"}}


def test_a_trace_does_not_change_the_result() -> None:
    for name in ("bert", "t5", "bloom"):
        model, batch = zoo.make(name)
        with torch.no_grad():
            before = model(**batch).logits
        assert trace(model, batch).calls[0].y is not None
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, before)
