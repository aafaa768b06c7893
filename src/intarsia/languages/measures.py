"""What a tokenizer does to a text in a language, in counts: words, scripts, pieces, words with unknown pieces, coverage.

Words are runs without white space, with combining marks kept inside (`data.characters`): a word splitter that drops marks
shreds the Indic scripts.  Words that hold an unknown piece are counted, not only unknown pieces, whose share saturates near one half.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from intarsia.data.characters import code_point, name_of, script, scripts, word_spans
from intarsia.data.pieces import Tokenizer, lacking, measure

GRAM = 4


@dataclass(frozen=True, slots=True)
class Measures:
    """Counts for one text.

    Attributes:
        lines: lines that are not blank.
        words: runs without white space (in unspaced scripts, characters).
        characters: of the lines, blanks included.
        scripts: letters per script, most frequent first.
        pieces: of the tokenizer, without special tokens.
        unknown_pieces: pieces that are the unknown token.
        unknown_words: words that hold one of them.
        lacking: characters that the tokenizer has no piece for, as (code point, name, count), most frequent first.
        pieces_in_script: pieces of the vocabulary that hold a letter of the text's first script.
    """

    lines: int
    words: int
    characters: int
    scripts: Mapping[str, int]
    pieces: int
    unknown_pieces: int
    unknown_words: int
    lacking: tuple[tuple[str, str, int], ...]
    pieces_in_script: int

    @property
    def script(self) -> str:
        """The script of most letters; empty for a text without letters."""
        return next(iter(self.scripts), "")

    @property
    def pieces_per_word(self) -> float:
        return self.pieces / self.words if self.words else 0.0

    @property
    def unknown_word_share(self) -> float:
        return self.unknown_words / self.words if self.words else 0.0

    @property
    def unknown_piece_share(self) -> float:
        return self.unknown_pieces / self.pieces if self.pieces else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the derived ones."""
        derived = ("script", "pieces_per_word", "unknown_word_share", "unknown_piece_share")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def measures(tokenizer: Tokenizer, texts: Sequence[str]) -> Measures:
    """Count what is in some texts, and what a tokenizer does to it.

    Args:
        texts: lines; blank ones do not count.
    """
    lines = [text for text in texts if text.strip()]
    words = [word_spans(line) for line in lines]
    found = measure(tokenizer, lines, words)
    by_script = scripts(lines)
    lacks = lacking(tokenizer, found.suspects)
    counts = Counter("".join(lines)) if lacks else Counter()
    missing = sorted(((code_point(c), name_of(c), counts[c]) for c in lacks), key=lambda entry: (-entry[2], entry[0]))
    return Measures(
        lines=len(lines),
        words=sum(map(len, words)),
        characters=sum(map(len, lines)),
        scripts=by_script,
        pieces=sum(found.lengths),
        unknown_pieces=found.unknown_pieces,
        unknown_words=found.unknown_words,
        lacking=tuple(missing),
        pieces_in_script=pieces_in_script(tokenizer, next(iter(by_script), "")),
    )


def pieces_in_script(tokenizer: Any, name: str) -> int:
    """Pieces of a vocabulary that hold a letter of a script."""
    if not name:
        return 0
    specials = set(getattr(tokenizer, "all_special_tokens", ()))
    return sum(1 for text in shown_pieces(tokenizer) if text not in specials and any(script(char) == name for char in text))


def shown_pieces(tokenizer: Any) -> Iterator[str]:
    """The pieces of a vocabulary as text; those of a byte-level one are decoded where they are whole characters."""
    vocabulary = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        yield from vocabulary
        return
    for piece in vocabulary:
        yield tokenizer.convert_tokens_to_string([piece])


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a text and a task speak the same variety; four shares between 0 and 1.

    Attributes:
        words: of the task's words (lower case), how many occur in the text.
        stripped: the same after combining marks are taken away.
        characters: of the task's letters and marks, how many are characters of the text.
        grams: of the 4-grams of the task's lines (lower case, without marks), how many occur in the text.
    """

    words: float
    stripped: float
    characters: float
    grams: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def fit(text: Iterable[str], task: Iterable[str]) -> Fit:
    """Compare the words of a task with those of a text; every occurrence in the task counts."""
    known, asked = _Bag(text), _Bag(task)
    bare_seen = {bare(word) for word in known.words}
    letters = set("".join(known.words))
    occurrences: Counter[str] = Counter()
    for word, count in asked.words.items():
        for char in word:
            occurrences[char] += count
    return Fit(
        words=_share(asked.words, known.words.__contains__),
        stripped=_share(asked.words, lambda word: bare(word) in bare_seen),
        characters=_share(occurrences, letters.__contains__),
        grams=_share(asked.grams, known.grams.__contains__),
    )


class _Bag:
    """Words of some lines with their counts, and 4-grams of the lines without marks."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.words: Counter[str] = Counter()
        self.grams: Counter[str] = Counter()
        for line in lines:
            words = split(line)
            self.words.update(words)
            joined = " ".join(map(bare, words))
            self.grams.update(joined[i : i + GRAM] for i in range(len(joined) - GRAM + 1))


def split(text: str) -> list[str]:
    """Runs of letters and marks, NFC and in lower case."""
    return unicodedata.normalize("NFC", text).lower().translate(_BLANKS).split()


class _NotInWords(dict[int, int | str]):
    """Translation table, filled as characters are met: a blank for what belongs to no word."""

    def __missing__(self, point: int) -> int | str:
        self[point] = point if unicodedata.category(chr(point))[0] in "LM" else " "
        return self[point]


_BLANKS = _NotInWords()


@lru_cache(maxsize=1 << 17)
def bare(word: str) -> str:
    """A word without combining marks."""
    return word if word.isascii() else "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.category(c).startswith("M"))


def _share(counts: Counter[str], known: Callable[[str], bool]) -> float:
    whole = sum(counts.values())
    return sum(count for item, count in counts.items() if known(item)) / whole if whole else 0.0
