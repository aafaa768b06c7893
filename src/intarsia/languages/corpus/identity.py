"""Language identity by profiles of character n-grams: does another language explain a line better than the wanted one?

A profile is a smoothed distribution over the 1- to 4-grams of words, learnt from the texts that the user gives (for the
wanted language the corpus itself will do, where nothing better is at hand).  A line's score is its mean log-probability per
n-gram; it goes if another profile's score is higher by a margin.

What it can: throw out lines in another language that a profile was given for, of a few words or more, in any script.  What it
cannot: tell close relatives or varieties apart reliably, judge lines of one or two words, notice a language without a profile,
or clean a text whose greater part is in the wrong language.  Such filters delete more of small languages than of large ones
(names, loans, code-switching), so the rate is in the manifest and the dropped lines should be looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.errors import UsageError, listing
from intarsia.languages.corpus.filters import Dropped, sift
from intarsia.languages.corpus.sources import Line
from intarsia.languages.measures import split

LONGEST = 4
SHORT = 12
"""Letters below which a line is never dropped."""


def ngrams(text: str) -> Counter[str]:
    """1- to 4-grams of the words of a text, each word between blanks."""
    found: Counter[str] = Counter()
    for word in split(text):
        padded = f" {word} "
        for size in range(1, LONGEST + 1):
            found.update(padded[i : i + size] for i in range(len(padded) - size + 1))
    found.pop(" ", None)
    return found


@dataclass(frozen=True, slots=True)
class Profile:
    """A language's distribution over n-grams.

    Attributes:
        language: its tag.
        log: log-probability by n-gram.
        unseen: log-probability of an n-gram that did not occur.
    """

    language: str
    log: Mapping[str, float]
    unseen: float
    cache: dict[str, tuple[float, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, language: str, texts: Iterable[str], most: int = 20_000) -> Profile:
        """From texts; the most frequent n-grams are kept.

        Raises:
            UsageError: there are no words.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(ngrams(text))
        if not counts:
            raise UsageError(f"the text that is to show what {language} looks like has no words")
        total = sum(counts.values()) + len(counts) + 1
        log = {gram: math.log((count + 1) / total) for gram, count in counts.most_common(most)}
        return cls(language, log, math.log(1 / total))

    def score(self, words: Sequence[str]) -> float:
        """Mean log-probability per n-gram of some words."""
        sums, counts = zip(*(self._word(word) for word in words)) if words else ((0.0,), (1,))
        return sum(sums) / sum(counts)

    def _word(self, word: str) -> tuple[float, int]:
        """Log-probability of a word's n-grams, and their number; kept, as words come back."""
        found = self.cache.get(word)
        if found is None:
            grams = ngrams(word)
            total = sum(count * self.log.get(gram, self.unseen) for gram, count in grams.items())
            found = self.cache[word] = (total, sum(grams.values()))
        return found


@dataclass(frozen=True, slots=True)
class Identity:
    """Drops lines that another profile explains better.

    Attributes:
        wanted: profile of the corpus's language.
        others: profiles of languages that may have got into it.
        margin: by how much another score must be higher, in nats per n-gram.
    """

    wanted: Profile
    others: tuple[Profile, ...]
    margin: float = 0.1
    name = "identity"

    def __post_init__(self) -> None:
        if not self.others:
            raise UsageError("a language-identity filter needs the profile of at least one other language")
        twice = [p.language for p in self.others if p.language == self.wanted.language]
        if twice:
            raise UsageError(f"{listing(twice)} is the wanted language and one of the others")

    def settings(self) -> dict[str, Any]:
        return {"wanted": self.wanted.language, "others": [p.language for p in self.others], "margin": self.margin, "ngrams": LONGEST, "short": SHORT}

    def language(self, text: str) -> str:
        """The language whose profile fits best; the wanted one unless another is better by the margin."""
        words = split(text)
        if sum(map(len, words)) < SHORT:
            return self.wanted.language
        own = self.wanted.score(words)
        score, best = max((profile.score(words), profile.language) for profile in self.others)
        return best if score > own + self.margin else self.wanted.language

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        return sift(lines, self._why)

    def _why(self, line: Line) -> str:
        found = self.language(line.text)
        return "" if found == self.wanted.language else f"looks like {found}"
