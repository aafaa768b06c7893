"""What a tokenizer does to a text: pieces per word, words with unknown pieces, characters it lacks.

The share of unknown *pieces* saturates near one half (a SentencePiece model gives each unknown word a known `▁`), so words
are what counts.  The tokenizer is any callable with the interface of a transformers fast tokenizer; without offsets each
word is tokenised on its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Span = tuple[int, int]
_BATCH = 256


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    unk_token_id: int | None

    def __call__(self, text: Any, /, **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Pieces:
    """Counts for one column of texts.

    Attributes:
        lengths: pieces of each text, without special tokens.
        unknown_pieces: pieces that are the unknown token.
        unknown_words: words that have at least one of them.
        suspects: characters of those words.
    """

    lengths: tuple[int, ...]
    unknown_pieces: int
    unknown_words: int
    suspects: frozenset[str]


def measure(tokenizer: Tokenizer, texts: Sequence[str], words: Sequence[Sequence[Span]]) -> Pieces:
    """Tokenise texts and attribute unknown pieces to words.

    Args:
        texts: N texts.
        words: start and end of the words of each text, in order.
    """
    lengths: list[int] = []
    unknown_pieces = unknown_words = 0
    suspects: set[str] = set()
    unknown = getattr(tokenizer, "unk_token_id", None)
    for text, spans, (ids, offsets) in zip(texts, words, _encoded(tokenizer, texts, words)):
        lengths.append(len(ids))
        places = [place for piece, place in zip(ids, offsets) if piece == unknown] if unknown is not None else []
        hit = _words_at(places, spans)
        unknown_pieces += len(places)
        unknown_words += len(hit)
        for word in hit:
            suspects.update(text[slice(*spans[word])])
    return Pieces(tuple(lengths), unknown_pieces, unknown_words, frozenset(suspects))


def special_tokens(tokenizer: Tokenizer, pair: bool) -> int:
    """How many special tokens the tokenizer adds to a text (or pair of texts)."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    return int(count(pair=pair)) if count else 0


def lacking(tokenizer: Tokenizer, characters: Iterable[str]) -> tuple[str, ...]:
    """Characters that become the unknown token, alone or after themselves (WordPiece distinguishes the two)."""
    chars = sorted(characters)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not chars:
        return ()
    ids = tokenizer([*chars, *(char * 2 for char in chars)], **_PLAIN)["input_ids"]
    return tuple(c for c, once, twice in zip(chars, ids, ids[len(chars) :]) if unknown in once or unknown in twice)


_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def _encoded(
    tokenizer: Tokenizer, texts: Sequence[str], words: Sequence[Sequence[Span]]
) -> Iterator[tuple[Sequence[int], Sequence[Span]]]:
    """Piece ids of each text, and where in the text each piece comes from."""
    if not getattr(tokenizer, "is_fast", True):
        yield from _encoded_by_word(tokenizer, texts, words)
        return
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(list(texts[start : start + _BATCH]), return_offsets_mapping=True, **_PLAIN)
        yield from zip(batch["input_ids"], batch["offset_mapping"])


def _encoded_by_word(
    tokenizer: Tokenizer, texts: Sequence[str], words: Sequence[Sequence[Span]]
) -> Iterator[tuple[Sequence[int], Sequence[Span]]]:
    known: dict[str, list[int]] = {}
    for text, spans in zip(texts, words):
        ids: list[int] = []
        offsets: list[Span] = []
        for span in spans:
            word = text[slice(*span)]
            if word not in known:
                known[word] = list(tokenizer([word], **_PLAIN)["input_ids"][0])
            ids += known[word]
            offsets += [span] * len(known[word])
        yield ids, offsets


def _words_at(places: Sequence[Span], spans: Sequence[Span]) -> set[int]:
    """Indices of the words that overlap any of the places."""
    starts = [start for start, _ in spans]
    hit: set[int] = set()
    for start, end in places:
        word = max(bisect_right(starts, start) - 1, 0)
        while word < len(spans) and spans[word][0] < end:
            if spans[word][1] > start:
                hit.add(word)
            word += 1
    return hit
