"""Tokenizers for a language: trained on text, kept as pieces and scores, made again from these without running anything of a file.

A piece that begins a word begins with `▁`.  The special tokens are the base's; in a vocabulary that takes the place of the base's they keep
their ids where these are small enough, as models fix some of them (padding).

Training: pieces by byte-pair encoding of the `tokenizers` library (Sennrich et al. 2016) over words split at white space; their scores by
rounds of best segmentation under a unigram model (Kudo 2018) and counting.  The library's own unigram trainer is not used: it gives
other scores each time, and nothing here may depend on chance.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from intarsia.errors import ModuleError, UsageError, listing
from intarsia.patches.vocabulary import Vocabulary

MARK = "▁"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ROUNDS = 2
LOWEST = -99.0
"""Score of special tokens: never chosen for text."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary.

    Attributes:
        texts: V pieces by id, words' first ones with `▁`; special tokens among them.
        scores: V log-probabilities.
        specials: which of them are special tokens.
        normaliser: Unicode form of the text: NFC, NFKC or none.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    specials: frozenset[str]
    normaliser: str = "NFKC"

    def __len__(self) -> int:
        return len(self.texts)

    def as_bytes(self) -> Tensor:
        """uint8: the pieces in UTF-8 with a line feed between them."""
        return torch.from_numpy(np.frombuffer("\n".join(self.texts).encode(), np.uint8).copy())


def train(texts: Iterable[str], size: int, base: Any, *, normaliser: str = "NFKC", replace: bool = True) -> Pieces:
    """Train pieces on text.

    Args:
        size: number of pieces, special tokens included where they `replace` the base's.
        base: the base's tokenizer, whose special tokens are kept.

    Raises:
        UsageError: the text is too small for so many pieces, or the base has no unknown token.
    """
    specials = special_tokens(base)
    wanted = size - (len(specials) if replace else 0)
    if wanted < 16:
        raise UsageError(f"a vocabulary of {size} leaves no room for pieces beside {len(specials)} special tokens")
    lines = list(texts)
    learner = Tokenizer(models.BPE())
    learner.normalizer = _normaliser(normaliser)
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    learner.train_from_iterator(lines, trainer=trainers.BpeTrainer(vocab_size=wanted + len(specials), show_progress=False))
    learnt = [text for text in learner.get_vocab() if "\n" not in text and text not in specials]
    found = _scored(lines, learnt, learner, normaliser)
    if len(found) < 16:
        raise UsageError(f"the text gives {len(found)} pieces only; it is too small for a vocabulary")
    ordered = sorted(found.items(), key=lambda item: (len(item[0]) > 1, -item[1], item[0]))[:wanted]  # characters first: none may be lacking
    ordered.sort(key=lambda item: (-item[1], item[0]))
    if not replace:
        ordered = _whole_words(ordered, base)
        if not ordered:
            raise UsageError("every word that was learnt is a piece of the base already: there is nothing to append")
        return Pieces(tuple(t for t, _ in ordered), tuple(float(np.float32(s)) for _, s in ordered), frozenset(), normaliser)
    return _laid_out(ordered, base, specials, normaliser)


def _whole_words(ordered: Sequence[tuple[str, float]], base: Any) -> list[tuple[str, float]]:
    """What can be appended: whole words as the base normalises them, each once, that it has no piece for."""
    normaliser = getattr(getattr(base, "backend_tokenizer", None), "normalizer", None)
    known = canonical(base)
    found: dict[str, float] = {}
    for text, score in ordered:
        word = text.removeprefix(MARK)
        if normaliser is not None:
            word = normaliser.normalize_str(word).replace(MARK, " ").strip()
        if text.startswith(MARK) and len(word) > 1 and word.isalpha() and MARK + word not in known:
            found.setdefault(MARK + word, score)
    return list(found.items())


def _scored(lines: Sequence[str], learnt: Sequence[str], learner: Tokenizer, normaliser: str) -> dict[str, float]:
    """Log-probabilities of pieces: counts of their use, then rounds of best segmentation and counting; a single character never goes."""
    counts: Counter[str] = Counter()
    for one in learner.encode_batch(list(lines)):
        counts.update(one.tokens)
    for _ in range(ROUNDS):
        scores = _logs(counts, learnt)
        model = Tokenizer(models.Unigram([("<unk>", LOWEST), *sorted(scores.items())], unk_id=0))
        model.normalizer, model.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
        counts = Counter()
        for one in model.encode_batch(list(lines)):
            counts.update(one.tokens)
    return _logs(counts, learnt)


def _logs(counts: Counter[str], learnt: Sequence[str]) -> dict[str, float]:
    total = sum(counts[text] + 0.5 for text in learnt)
    return {text: math.log((counts[text] + 0.5) / total) for text in learnt}


def _laid_out(ordered: Sequence[tuple[str, float]], base: Any, specials: Sequence[str], normaliser: str) -> Pieces:
    """Special tokens at the base's ids where these lie in the new vocabulary, at its end else; pieces in between."""
    size = len(ordered) + len(specials)
    own = base.convert_tokens_to_ids(list(specials))
    fixed = {i: token for i, token in zip(own, specials) if i < size}
    late = [token for i, token in zip(own, specials) if i >= size]
    for place, token in zip(range(size - len(late), size), late):
        while place in fixed:
            place -= 1
        fixed[place] = token
    rest = iter(ordered)
    texts, scores = [], []
    for i in range(size):
        text, score = (fixed[i], LOWEST) if i in fixed else next(rest)
        texts.append(text)
        scores.append(float(np.float32(score)))
    return Pieces(tuple(texts), tuple(scores), frozenset(specials), normaliser)


def special_tokens(base: Any) -> tuple[str, ...]:
    """The base's tokens with a role, in the order of their ids.

    Raises:
        UsageError: none stands for what is unknown.
    """
    found = {str(getattr(base, role)) for role in ROLES if getattr(base, role, None) is not None}
    if base.unk_token is None:
        raise UsageError(f"the tokenizer {type(base).__name__} has no unknown token (it is byte-level): another vocabulary would be no gain in coverage; use 'append' or another base")
    return tuple(sorted(found, key=base.convert_tokens_to_ids))


def _normaliser(form: str) -> Any:
    """Unicode form, then single blanks and none at the ends, so that no piece stands for white space alone."""
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*([] if form == "none" else [getattr(normalizers, form)()]), *spaces])


def make(pieces: Pieces, base: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of some pieces, with the base's special tokens and what the base puts around a text and a pair."""
    unk = pieces.texts.index(str(base.unk_token))
    inner = Tokenizer(models.Unigram([(t, s) for t, s in zip(pieces.texts, pieces.scores)], unk_id=unk))
    inner.normalizer = _normaliser(pieces.normaliser)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    inner.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    inner.add_special_tokens(sorted(pieces.specials, key=pieces.texts.index))
    ids = {token: i for i, token in enumerate(pieces.texts) if token in pieces.specials}
    single, pair = _templates(base)
    used = [(token, ids[token]) for token in dict.fromkeys(part.split(":")[0] for part in [*single, *pair] if not part.startswith("$"))]
    if used:
        inner.post_processor = processors.TemplateProcessing(single=" ".join(single), pair=" ".join(pair), special_tokens=used)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=base.model_max_length, model_input_names=base.model_input_names, padding_side=base.padding_side,
        truncation_side=base.truncation_side, **{role: str(getattr(base, role)) for role in ROLES if getattr(base, role, None) is not None},
    )  # fmt: skip
    if len(made) != len(pieces):
        raise ModuleError(f"a vocabulary of {len(pieces)} pieces gave a tokenizer of {len(made)}: a piece occurs twice")
    return made


def _templates(base: Any) -> tuple[list[str], list[str]]:
    """What the base puts around a text and around a pair, as templates: `<s> $A </s>`."""
    a, b = "a", "e"
    bare_a, bare_b = (list(base(text, add_special_tokens=False)["input_ids"]) for text in (a, b))
    single = _template(base, base(a), [("$A:0", bare_a)])
    pair = _template(base, base(a, b), [("$A:0", bare_a), ("$B", bare_b)])
    return single, pair


def _template(base: Any, encoded: Any, parts: Sequence[tuple[str, list[int]]]) -> list[str]:
    ids = list(encoded["input_ids"])
    types = list(encoded.get("token_type_ids") or [0] * len(ids))
    found: list[str] = []
    at, left = 0, list(parts)
    while at < len(ids):
        if left and ids[at : at + len(left[0][1])] == left[0][1]:
            name, part = left.pop(0)
            found.append(f"{name.split(':')[0]}:{types[at]}")
            at += len(part)
        else:
            found.append(f"{base.convert_ids_to_tokens(ids[at])}:{types[at]}")
            at += 1
    if left:
        raise UsageError(f"cannot see what {type(base).__name__} puts around a text: {ids} does not hold {left[0][1]}")
    return found


def appended(pieces: Pieces, base: Any) -> PreTrainedTokenizerFast:
    """The base's tokenizer with more pieces behind its own, which win where they fit.

    They are found before the base's own splitting, as whole words, so text without them is split as before.

    Raises:
        UsageError: the base's tokenizer is no fast one.
    """
    if not getattr(base, "is_fast", False):
        raise UsageError(f"the tokenizer {type(base).__name__} is no fast one; pieces can only be appended to a fast one")
    made = copy.deepcopy(base)
    words = [text.removeprefix(MARK) for text in pieces.texts]
    made.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    if len(made) != len(base) + len(words):
        raise ModuleError(f"{len(words)} pieces were to be appended, the tokenizer took {len(made) - len(base)}: some are the base's own")
    return made


def canonical(base: Any) -> dict[str, int]:
    """Pieces of a base's tokenizer as this room writes them (`▁` in front of what begins a word), with their ids.

    Families mark differently: SentencePiece `▁` and byte-level BPE `Ġ` what begins a word, WordPiece `##` what does not.
    """
    vocabulary = base.get_vocab()
    specials = set(map(str, base.all_special_tokens))
    kind = _family(base)
    found: dict[str, int] = {}
    for piece, i in vocabulary.items():
        if piece in specials:
            continue
        if kind == "wordpiece":
            text = piece[2:] if piece.startswith("##") else MARK + piece
        elif kind == "bytes":
            text = base.convert_tokens_to_string([piece])
            text = MARK + text[1:] if text.startswith(" ") else text
            if "\ufffd" in text:
                continue
        else:
            text = piece
        found.setdefault(text, i)
    return found


def _family(base: Any) -> str:
    backend = getattr(base, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ == "WordPiece":
        return "wordpiece"
    return "bytes" if type(getattr(backend, "decoder", None)).__name__ == "ByteLevel" else "metaspace"


def vocabulary_of(module: Any) -> Vocabulary | None:
    """The vocabulary of a module's method, None if it has none."""
    return next((patch.form for patch in module.method.patches if isinstance(patch.form, Vocabulary)), None)


def tokenizer_of(module: Any, base: Any) -> Any:
    """The tokenizer that a module wants: its own, made again from its pieces, or the base's.

    Raises:
        ModuleError: its pieces cannot be read.
    """
    spec = vocabulary_of(module)
    if spec is None:
        return base
    raw, scores = (module.tensors[f"tied/vocabulary.{leaf}"] for leaf in ("pieces", "scores"))
    try:
        texts = bytes(raw.numpy().tobytes()).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ModuleError(f"module {module.name!r}: its pieces are not UTF-8: {error}") from None
    if len(texts) != spec.size or len(set(texts)) != len(texts):
        raise ModuleError(f"module {module.name!r}: {len(set(texts))} different pieces, its vocabulary has {spec.size}")
    if spec.mode == "append":
        return appended(Pieces(tuple(texts), tuple(scores.tolist()), frozenset(), spec.normaliser), base)
    specials = special_tokens(base)
    lacks = [token for token in specials if token not in texts]
    if lacks:
        raise ModuleError(f"module {module.name!r}: its vocabulary lacks the special tokens {listing(lacks)} of this base")
    return make(Pieces(tuple(texts), tuple(scores.tolist()), frozenset(specials), spec.normaliser), base)
