"""Text in Latin letters: the cheap alternative to a vocabulary of its own, and a cipher as its controlled opposite.

| how | what | needs |
|---|---|---|
| `anyascii` | each character by a table, the same in every language | anyascii (extra `romanise`) |
| `uroman` | the table of Hermjakob et al. 2018 with rules over several characters | uroman (extra `romanise`) |
| `marks` | marks and compatibility forms taken away, letters that have none stay | nothing |

Romanised text cannot be turned back.  Text and task must be romanised alike, so the name goes into the manifest of a corpus.  `Cipher` writes a
known language in letters that a tokenizer lacks, by a bijection: what a model loses by it is the script alone.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from intarsia._registry import Registry
from intarsia.errors import UsageError

ROMANISERS: Registry[Callable[[], Callable[[str], str]]] = Registry("romanisation")


def romaniser(how: str) -> Callable[[str], str]:
    """A function from text to text.

    Raises:
        UsageError: unknown name, or its package is not installed.
    """
    return ROMANISERS[how]()


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"romanisation by {name} needs its package: pip install 'intarsia[romanise]' (or use 'marks', which needs none)") from None


def _anyascii() -> Callable[[str], str]:
    found: Callable[[str], str] = _package("anyascii").anyascii
    return found


@lru_cache(maxsize=1)
def _uroman() -> Callable[[str], str]:
    found: Callable[[str], str] = _package("uroman").Uroman().romanize_string
    return found


def _marks() -> Callable[[str], str]:
    return lambda text: "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.category(c).startswith("M"))


ROMANISERS.add("anyascii", _anyascii)
ROMANISERS.add("uroman", _uroman)
ROMANISERS.add("marks", _marks)


@dataclass(frozen=True, slots=True)
class Cipher:
    """A bijection between letters.

    Attributes:
        table: letter -> letter of another script; what is not in it stays.
    """

    table: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(set(self.table.values())) != len(self.table) or any(len(c) != 1 for pair in self.table.items() for c in pair):
            raise UsageError("a cipher maps single letters to different single letters")
        both = set(self.table) & set(self.table.values())
        if both:
            raise UsageError(f"a cipher's letters must not occur in the text itself, found {sorted(both)[:5]}")

    @classmethod
    def of(cls, texts: Iterable[str], letters: Sequence[str]) -> Cipher:
        """For the letters of some texts, the most frequent first.

        Raises:
            UsageError: there are too few letters to write with, or one of them occurs in the texts.
        """
        counts = Counter(c for text in texts for c in text if unicodedata.category(c)[0] == "L")
        used = [c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        if len(used) > len(letters):
            raise UsageError(f"the texts have {len(used)} letters, {len(letters)} are there to write them with; lower-case the text first")
        return cls(dict(zip(used, letters)))

    def write(self, text: str) -> str:
        """Text in the other letters."""
        return text.translate({ord(a): b for a, b in self.table.items()})

    def read(self, text: str) -> str:
        """The text as it was."""
        return text.translate({ord(b): a for a, b in self.table.items()})
