"""What is special about an architecture, as data: which path plays which role.

One row per family, keyed by `config.model_type`, with paths relative to `model.base_model` (so every task head is
free; T5 and models without a head are their own base).  There is no code per model here or anywhere else; a row is
10 to 15 lines, and `infer.verify` proves it by arithmetic on a traced forward.

What is not here: turning a row into the sites of a model (`resolve.py`), finding a row without one (`infer.py`).
Source: transformers 5.24, `models/*/modeling_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Order = Literal["post", "pre", "sandwich", "out"]

#: Sub-layers in the order in which a block runs them.
SUBLAYERS = ("attn", "xattn", "ffn")

#: Roles that have parameters worth naming, but no output that is one vector per token of the stream.
WEIGHT_ONLY = frozenset(
    {"embed.relative", "embed.relative.norm", "ffn.experts", "ffn.router"}
    | {f"{attention}.{word}" for attention in ("attn", "xattn") for word in ("relative", "pos_q", "pos_k")}
)

#: Those of them whose output has no batch dimension: tables of relative positions.
ROWLESS = frozenset(role for role in WEIGHT_ONLY if not role.startswith("ffn."))


@dataclass(frozen=True, slots=True)
class Fused:
    """How the output of one projection divides into several roles.

    Attributes:
        parts: roles in the order in which they lie in the output, e.g. `("q", "k", "v")`.  `gate` is the half that
            goes through the activation function.
        by_head: False: the parts lie one after the other (GPT-2).  True: the output is a row of key/value heads and
            each holds its own parts (GPT-NeoX).
    """

    parts: tuple[str, ...]
    by_head: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of equal blocks and what stands around it.

    Attributes:
        blocks: path of the list of blocks, below the base; `*` stands for every index (ALBERT's groups).
        order: where the layer norms sit.  `post`: on `h + residual`; `pre`: on what the sub-layer reads; `sandwich`:
            `pre`, and one more on the sub-layer's output; `out`: only on the sub-layer's output.
        roles: role -> path below a block.  Words: `attn`, `xattn`, `ffn` = the *last* module whose output is the
            sub-layer's result before it joins the residual stream; below them `.q .k .v .o` (or a fused `.qkv`,
            `.kv`), `.gate .up .down` (or `.gate_up`, or `.experts` with `.router`), `.norm` = its layer norm,
            `.out.norm` = the second one of `sandwich`, `.q.norm .k.norm` = norms of queries and keys, `.relative`,
            `.pos_q`, `.pos_k` = relative positions.
        around: role -> path below the base: `embed`, `embed.position`, `.type`, `.norm`, `.project`, `.relative`,
            `stem` (only where the input of block 0 is not it), `final.norm`, `final.project`, `pooler`.
        fused: fused role -> how its output divides.
        parallel: both sub-layers read the input of the block.
        tokens: the stack reads embeddings of tokens (False: frames of sound).
        lend: path of a module whose parameters are read outside its own forward -> path of the module that reads.
        unsited: role -> why its output is not a site, although it has parameters.
        reused: roles whose module also runs on something else than the tokens in the same block.
        entry: path, below the base, of the module that takes the token ids and returns the states; empty for the base
            itself (OPT's models call the decoder past their base).

    A path that ends in `?` may be missing from a model of the family, or from some of its blocks.
    """

    blocks: str
    order: Order
    roles: Mapping[str, str]
    around: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    parallel: bool = False
    tokens: bool = True
    lend: Mapping[str, str] = field(default_factory=dict)
    unsited: Mapping[str, str] = field(default_factory=dict)
    reused: frozenset[str] = frozenset()
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The row of one family.

    Attributes:
        stacks: `""` for a model with one stack, else `encoder` and `decoder`.
        shared: path of an embedding that holds the tied weight of both stacks and is never executed itself.
        when: settings of the configuration under which the row holds, e.g. `{"use_parallel_residual": True}`.
    """

    stacks: Mapping[str, Stack]
    shared: str = ""
    when: Mapping[str, object] = field(default_factory=dict)


def bare(path: str) -> str:
    """The path without the mark that it may be missing."""
    return path.removesuffix("?")


def optional(path: str) -> bool:
    """Whether the path may be missing from a model."""
    return path.endswith("?")


def row(config: Any) -> Anatomy | None:
    """The first row of `config.model_type` whose conditions the configuration meets, or None."""
    for anatomy in ROWS.get(getattr(config, "model_type", ""), ()):
        if all(getattr(config, name, None) == value for name, value in anatomy.when.items()):
            return anatomy
    return None


def _one(stack: Stack, **when: object) -> Anatomy:
    return Anatomy({"": stack}, when=when)


def _under(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {role: f"{prefix}.{path}" for role, path in names.items()}


def _with(stack: Stack, **changes: Any) -> Stack:
    """A copy in which the given mappings are laid over the old ones (None removes a word) and other fields replaced."""
    for name, change in changes.items():
        if isinstance(change, Mapping):
            merged = {**getattr(stack, name), **change}
            changes[name] = {word: value for word, value in merged.items() if value is not None}
    return replace(stack, **changes)


# ---------------------------------------------------------------------------------------------------- encoders

_BERT = Stack(
    blocks="encoder.layer",
    order="post",
    roles={
        **_under("attention.self", {"attn.q": "query", "attn.k": "key", "attn.v": "value"}),
        **_under("attention.output", {"attn.o": "dense", "attn": "dropout", "attn.norm": "LayerNorm"}),
        **_under("crossattention.self", {"xattn.q": "query?", "xattn.k": "key?", "xattn.v": "value?"}),
        **_under("crossattention.output", {"xattn.o": "dense?", "xattn": "dropout?", "xattn.norm": "LayerNorm?"}),
        "ffn.up": "intermediate.dense",
        **_under("output", {"ffn.down": "dense", "ffn": "dropout", "ffn.norm": "LayerNorm"}),
    },
    around={
        "embed": "embeddings.word_embeddings",
        "embed.position": "embeddings.position_embeddings",
        "embed.type": "embeddings.token_type_embeddings",
        "embed.norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense?",
    },
)
_ELECTRA = _with(_BERT, around={"embed.project": "embeddings_project?", "pooler": None})
_ALBERT = Stack(
    blocks="encoder.albert_layer_groups.*.albert_layers",
    order="post",
    roles={
        **_under("attention", {"attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.o": "dense"}),
        **_under("attention", {"attn": "output_dropout", "attn.norm": "LayerNorm"}),
        "ffn.up": "ffn", "ffn.down": "ffn_output", "ffn": "ffn_output", "ffn.norm": "full_layer_layer_norm",
    },
    around={
        **_BERT.around,
        "embed.project": "encoder.embedding_hidden_mapping_in",
        "stem": "encoder.embedding_hidden_mapping_in",  # its blocks run many times: their input is not the stem
        "pooler": "pooler?",
    },
)
_DISTILBERT = Stack(
    blocks="transformer.layer",
    order="post",
    roles={
        **_under("attention", {"attn.q": "q_lin", "attn.k": "k_lin", "attn.v": "v_lin", "attn.o": "out_lin"}),
        "attn": "attention", "attn.norm": "sa_layer_norm",
        "ffn.up": "ffn.lin1", "ffn.down": "ffn.lin2", "ffn": "ffn", "ffn.norm": "output_layer_norm",
    },
    around={word: path for word, path in _BERT.around.items() if word not in ("embed.type", "pooler")},
)
_DEBERTA = _with(
    _BERT,
    roles={
        **{word: None for word in _BERT.roles if word.startswith("xattn")},
        **_under("attention.self", {"attn.q": "query_proj", "attn.k": "key_proj", "attn.v": "value_proj"}),
        **_under("attention.self", {"attn.pos_q": "pos_query_proj?", "attn.pos_k": "pos_key_proj?"}),
    },
    around={
        "embed.position": "embeddings.position_embeddings?",
        "embed.type": "embeddings.token_type_embeddings?",
        "embed.project": "embeddings.embed_proj?",
        "embed.relative": "encoder.rel_embeddings?",
        "embed.relative.norm": "encoder.LayerNorm?",
        "pooler": None,
    },
    lend={"encoder.rel_embeddings": "encoder"},
)
_MODERNBERT = Stack(
    blocks="layers",
    order="pre",
    roles={
        "attn.qkv": "attn.Wqkv", "attn.o": "attn.Wo", "attn": "attn", "attn.norm": "attn_norm",
        "ffn.gate_up": "mlp.Wi", "ffn.down": "mlp.Wo", "ffn": "mlp", "ffn.norm": "mlp_norm",
    },
    around={"embed": "embeddings.tok_embeddings", "embed.norm": "embeddings.norm", "final.norm": "final_norm"},
    fused={"attn.qkv": Fused(("q", "k", "v")), "ffn.gate_up": Fused(("gate", "up"))},
)
# The dropout after ffn.down runs a second time, after the adapter of the language; so ffn is the output before it.
_XMOD = _with(
    _BERT,
    roles={"ffn": "output.dense"},
    unsited={"ffn.norm": "X-MOD runs this norm twice in a block, before and after the adapter of the language"},
)
_XMOD_PRENORM = _with(_XMOD, order="pre", around={"final.norm": "encoder.LayerNorm"})

# ---------------------------------------------------------------------------------------------------- decoders

_GPT2 = Stack(
    blocks="h",
    order="pre",
    roles={
        "attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "attn": "attn", "attn.norm": "ln_1",
        **_under("crossattention", {"xattn.q": "q_attn?", "xattn.kv": "c_attn?", "xattn.o": "c_proj?"}),
        "xattn": "crossattention?", "xattn.norm": "ln_cross_attn?",
        "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj", "ffn": "mlp", "ffn.norm": "ln_2",
    },
    around={"embed": "wte", "embed.position": "wpe", "final.norm": "ln_f"},
    fused={"attn.qkv": Fused(("q", "k", "v")), "xattn.kv": Fused(("k", "v"))},
)
_LLAMA = Stack(
    blocks="layers",
    order="pre",
    roles={
        **_under("self_attn", {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.o": "o_proj"}),
        "attn": "self_attn", "attn.norm": "input_layernorm",
        **_under("mlp", {"ffn.gate": "gate_proj", "ffn.up": "up_proj", "ffn.down": "down_proj"}),
        "ffn": "mlp", "ffn.norm": "post_attention_layernorm",
    },
    around={"embed": "embed_tokens", "final.norm": "norm"},
)
_QK_NORM = {"attn.q.norm": "self_attn.q_norm", "attn.k.norm": "self_attn.k_norm"}
_GEMMA2 = _with(
    _LLAMA,
    order="sandwich",
    roles={
        "attn": "post_attention_layernorm", "attn.out.norm": "post_attention_layernorm",
        "ffn.norm": "pre_feedforward_layernorm",
        "ffn": "post_feedforward_layernorm", "ffn.out.norm": "post_feedforward_layernorm",
    },
)
_OLMO2 = _with(
    _LLAMA,
    order="out",
    roles={
        "attn": "post_attention_layernorm", "attn.norm": "post_attention_layernorm",
        "ffn": "post_feedforward_layernorm", "ffn.norm": "post_feedforward_layernorm",
        **_QK_NORM,
    },
)
_PHI3 = _with(
    _LLAMA,
    roles={
        "attn.q": None, "attn.k": None, "attn.v": None, "attn.qkv": "self_attn.qkv_proj", "attn": "resid_attn_dropout",
        "ffn.gate": None, "ffn.up": None, "ffn.gate_up": "mlp.gate_up_proj", "ffn": "resid_mlp_dropout",
    },
    fused={"attn.qkv": Fused(("q", "k", "v")), "ffn.gate_up": Fused(("gate", "up"))},
)
_MIXTRAL = _with(
    _LLAMA,
    roles={
        "ffn.gate": None, "ffn.up": None, "ffn.down": None,
        "ffn.experts": "mlp.experts", "ffn.router": "mlp.gate",
    },
)
_NEOX = Stack(
    blocks="layers",
    order="pre",
    parallel=True,
    roles={
        "attn.qkv": "attention.query_key_value", "attn.o": "attention.dense",
        "attn": "post_attention_dropout", "attn.norm": "input_layernorm",
        "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h",
        "ffn": "post_mlp_dropout", "ffn.norm": "post_attention_layernorm",
    },
    around={"embed": "embed_in", "final.norm": "final_layer_norm"},
    fused={"attn.qkv": Fused(("q", "k", "v"), by_head=True)},
)
# BLOOM adds the residual inside its attention and feed-forward, so their last linears are the sub-layers' outputs.
_BLOOM = Stack(
    blocks="h",
    order="pre",
    roles={
        "attn.qkv": "self_attention.query_key_value", "attn.o": "self_attention.dense",
        "attn": "self_attention.dense", "attn.norm": "input_layernorm",
        "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h",
        "ffn": "mlp.dense_4h_to_h", "ffn.norm": "post_attention_layernorm",
    },
    around={"embed": "word_embeddings", "embed.norm": "word_embeddings_layernorm", "final.norm": "ln_f"},
    fused={"attn.qkv": Fused(("q", "k", "v"), by_head=True)},
)
_FAIRSEQ = Stack(
    blocks="layers",
    order="pre",
    roles={
        **_under("self_attn", {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.o": "out_proj"}),
        "attn": "self_attn", "attn.norm": "self_attn_layer_norm",
        "ffn.up": "fc1", "ffn.down": "fc2", "ffn": "fc2", "ffn.norm": "final_layer_norm",
    },
)
_OPT = _with(
    _FAIRSEQ,
    blocks="decoder.layers",
    entry="decoder",
    around={
        **_under("decoder", {"embed": "embed_tokens", "embed.position": "embed_positions"}),
        **_under("decoder", {"embed.project": "project_in?"}),
        **_under("decoder", {"final.norm": "final_layer_norm?", "final.project": "project_out?"}),
    },
)
_XGLM = _with(
    _FAIRSEQ, around={"embed": "embed_tokens", "embed.position": "embed_positions", "final.norm": "layer_norm"}
)

# ------------------------------------------------------------------------------------------- encoder-decoders

_CROSS = {
    **_under("encoder_attn", {"xattn.q": "q_proj", "xattn.k": "k_proj", "xattn.v": "v_proj", "xattn.o": "out_proj"}),
    "xattn": "encoder_attn", "xattn.norm": "encoder_attn_layer_norm",
}


def _fairseq(
    order: Order, *, shared: str, encoder: Mapping[str, str], decoder: Mapping[str, str], tokens: bool = True
) -> Anatomy:
    """The two stacks of a model of fairseq's descent; `encoder` and `decoder` say what stands around them."""
    left = _with(_FAIRSEQ, blocks="encoder.layers", order=order, around=_under("encoder", encoder), tokens=tokens)
    right = _with(_FAIRSEQ, blocks="decoder.layers", order=order, roles=_CROSS, around=_under("decoder", decoder))
    return Anatomy({"encoder": left, "decoder": right}, shared=shared)


_POSITIONS = {"embed.position": "embed_positions"}
_EMBED = {"embed": "embed_tokens", **_POSITIONS}
_EMBED_NORM = {"embed.norm": "layernorm_embedding"}
_FINAL = {"final.norm": "layer_norm"}
_BART = _fairseq("post", shared="shared?", encoder=_EMBED | _EMBED_NORM, decoder=_EMBED | _EMBED_NORM)
_MARIAN = _fairseq("post", shared="shared?", encoder=_EMBED, decoder=_EMBED)
_MBART = _fairseq("pre", shared="shared?", encoder=_EMBED | _EMBED_NORM | _FINAL, decoder=_EMBED | _EMBED_NORM | _FINAL)
_M2M100 = _fairseq("pre", shared="shared?", encoder=_EMBED | _FINAL, decoder=_EMBED | _FINAL)
_SPEECH = _fairseq("pre", shared="", encoder=_POSITIONS | _FINAL, decoder=_EMBED | _FINAL, tokens=False)


def _t5(gated: bool) -> Anatomy:
    def feed_forward(layer: int) -> dict[str, str]:
        wide = {"ffn.gate": "wi_0", "ffn.up": "wi_1"} if gated else {"ffn.up": "wi"}
        inner = _under(f"layer.{layer}.DenseReluDense", {**wide, "ffn.down": "wo"})
        return {**inner, "ffn": f"layer.{layer}.dropout", "ffn.norm": f"layer.{layer}.layer_norm"}

    def attention(word: str, layer: int, name: str) -> dict[str, str]:
        inner = _under(f"layer.{layer}.{name}", {f"{word}.{letter}": letter for letter in "qkvo"})
        return {**inner, word: f"layer.{layer}.dropout", f"{word}.norm": f"layer.{layer}.layer_norm"}

    relative = {"attn.relative": "layer.0.SelfAttention.relative_attention_bias?"}  # the first block has one for all
    encoder = Stack(
        blocks="encoder.block",
        order="pre",
        roles={**attention("attn", 0, "SelfAttention"), **relative, **feed_forward(1)},
        around={"embed": "encoder.embed_tokens", "final.norm": "encoder.final_layer_norm"},
    )
    decoder = Stack(
        blocks="decoder.block",
        order="pre",
        roles={
            **attention("attn", 0, "SelfAttention"),
            **relative,
            **attention("xattn", 1, "EncDecAttention"),
            **feed_forward(2),
        },
        around={"embed": "decoder.embed_tokens", "final.norm": "decoder.final_layer_norm"},
    )
    return Anatomy({"encoder": encoder, "decoder": decoder}, shared="shared", when={"is_gated_act": gated})


#: model_type -> rows, of which the first whose `when` holds is used.
ROWS: Mapping[str, tuple[Anatomy, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), (_one(_BERT),)),
        "electra": (_one(_ELECTRA),),
        "albert": (_one(_ALBERT),),
        "distilbert": (_one(_DISTILBERT),),
        "deberta-v2": (
            _one(_with(_DEBERTA, reused=frozenset({"attn.q", "attn.k"})), share_att_key=True, relative_attention=True),
            _one(_DEBERTA),
        ),
        "modernbert": (_one(_MODERNBERT),),
        "xmod": (_one(_XMOD, pre_norm=False), _one(_XMOD_PRENORM, pre_norm=True)),
        "gpt2": (_one(_GPT2),),
        **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), (_one(_LLAMA),)),
        "qwen3": (_one(_with(_LLAMA, roles=_QK_NORM)),),
        "gemma2": (_one(_GEMMA2),),
        "gemma3_text": (_one(_with(_GEMMA2, roles=_QK_NORM)),),
        "olmo2": (_one(_OLMO2),),
        "phi3": (_one(_PHI3),),
        "mixtral": (_one(_MIXTRAL),),
        "gpt_neox": (
            _one(_NEOX, use_parallel_residual=True),
            _one(_with(_NEOX, parallel=False), use_parallel_residual=False),
        ),
        "bloom": (_one(_BLOOM, apply_residual_connection_post_layernorm=False),),
        "opt": (
            _one(_OPT, do_layer_norm_before=True),
            _one(_with(_OPT, order="post"), do_layer_norm_before=False),
        ),
        "xglm": (_one(_XGLM),),
        **dict.fromkeys(("t5", "mt5"), (_t5(gated=False), _t5(gated=True))),
        "bart": (_BART,),
        "marian": (_MARIAN,),
        "mbart": (_MBART,),
        "m2m_100": (_M2M100,),
        **dict.fromkeys(("speech_to_text", "whisper"), (_SPEECH,)),
    }
)
