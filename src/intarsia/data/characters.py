"""Facts about characters: their script, whether they can be seen, and which words a text has.

Python's `unicodedata` has no script property; the script is taken from the character's name, which begins with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

#: characters a reader cannot see: zero width, soft hyphen, joiners, direction marks; and tatweel, which is no letter
INVISIBLE = frozenset(
    "\u00ad\u034f\u061c\u0640\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\ufeff"
)
_INVISIBLE = re.compile(f"[{''.join(sorted(INVISIBLE))}]")

# scripts whose name in character names has more than one word
_LONG_NAMES = (
    "BASSA VAH", "CANADIAN SYLLABICS", "CAUCASIAN ALBANIAN", "CYPRO MINOAN", "DIVES AKURU", "GUNJALA GONDI",
    "HANIFI ROHINGYA", "IMPERIAL ARAMAIC", "INSCRIPTIONAL PAHLAVI", "INSCRIPTIONAL PARTHIAN", "KAYAH LI",
    "LINEAR A", "LINEAR B", "MASARAM GONDI", "MEETEI MAYEK", "MENDE KIKAKUI", "NEW TAI LUE",
    "NYIAKENG PUACHUE HMONG", "OL CHIKI", "OL ONAL", "OLD HUNGARIAN", "OLD ITALIC", "OLD NORTH ARABIAN",
    "OLD PERMIC", "OLD PERSIAN", "OLD SOGDIAN", "OLD SOUTH ARABIAN", "OLD TURKIC", "OLD UYGHUR", "PAHAWH HMONG",
    "PAU CIN HAU", "PHAGS PA", "PSALTER PAHLAVI", "SORA SOMPENG", "SYLOTI NAGRI", "TAI LE", "TAI THAM", "TAI VIET",
    "WARANG CITI", "ZANABAZAR SQUARE",
)

# first words of names of letters that belong to no script, such as U+02BC MODIFIER LETTER APOSTROPHE
_COMMON = frozenset(
    ["MODIFIER", "CARON", "COMBINING", "SPACE", "VERTICAL", "IDEOGRAPHIC", "VEDIC", "MASU", "TURNED", "ROMAN", "OLD"]
)

# Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le and New Tai Lue, Tai Tham, kana, Han: written without spaces
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


@lru_cache(maxsize=4096)
def script(char: str) -> str | None:
    """Script of a letter, e.g. `Latin`, `Ol Chiki`, `Han`; None for everything else.

    Compatibility letters (fullwidth, mathematical, superscript) count for the letter they stand for.
    """
    if not unicodedata.category(char).startswith("L"):
        return None
    name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "").replace("-", " ")
    if name.startswith("CJK"):
        return "Han"
    long = next((known for known in _LONG_NAMES if name.startswith(known + " ")), None)
    first = long or name.partition(" ")[0]
    return first.title() if first and first not in _COMMON else None


def scripts(texts: Iterable[str]) -> dict[str, int]:
    """Letters per script, most frequent first."""
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(text)
    found: Counter[str] = Counter()
    for char, count in letters.items():
        if name := script(char):
            found[name] += count
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def invisible(text: str) -> list[str]:
    """Characters of the text that cannot be seen (zero width, direction marks, tatweel), with repeats."""
    return [] if text.isascii() else _INVISIBLE.findall(text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each word: runs without white space, with combining marks kept inside (`\\w` drops them).

    In scripts written without spaces (Han, kana, Thai, Lao, Tibetan, Myanmar, Khmer) each character counts as a word.
    """
    return [found.span() for found in _WORD.finditer(text)]


def code_point(char: str) -> str:
    """`U+1200`."""
    return f"U+{ord(char):04X}"


def name_of(char: str) -> str:
    """Unicode name, or the category of a character without one."""
    return unicodedata.name(char, f"<{unicodedata.category(char)}>")
