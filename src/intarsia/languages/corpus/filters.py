"""Filters of a corpus: each takes lines and gives back those that stay, and says of every other line why it went.

| filter | drops |
|---|---|
| `Normalise` | nothing but lines that are empty afterwards: Unicode form, white space to single blanks, control characters away |
| `Length` | lines with fewer words or more characters than told |
| `Script` | lines in which too few letters belong to the wanted script |
| `Words` | lines that hold an entry of a list that the user supplies (names, addresses, slurs) |
| `Identity` | lines that another language's profile explains better, see `identity.py` |
| `Duplicates` | lines that repeat an earlier one, exactly after normalisation or nearly, see `duplicates.py` |

No list comes with the library: what is personal or hurtful in a language is known by those who speak it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from intarsia.data.characters import script, word_spans
from intarsia.data.check import normal_form
from intarsia.data.source import check_form, normalise
from intarsia.errors import UsageError
from intarsia.languages.corpus.sources import Line
from intarsia.languages.romanise import romaniser

EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Dropped:
    """A line that went, and why."""

    line: Line
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one filter did.

    Attributes:
        name: of the filter.
        settings: plain values.
        before: lines that came in.
        dropped: counts by reason.
        changed: lines whose text was changed.
        examples: a few of what was dropped, as (id, reason, text).
    """

    name: str
    settings: dict[str, Any]
    before: int
    dropped: dict[str, int]
    changed: int = 0
    examples: tuple[tuple[str, str, str], ...] = ()

    @property
    def after(self) -> int:
        return self.before - sum(self.dropped.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "after": self.after, "examples": [list(example) for example in self.examples]}


class Filter(Protocol):
    """One step; a frozen dataclass with a `name` and `settings()`."""

    name: str

    def settings(self) -> dict[str, Any]: ...
    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]: ...


def apply(step: Filter, lines: Sequence[Line]) -> tuple[list[Line], Step, list[Dropped]]:
    """Run a filter and count."""
    kept, dropped = step.run(lines)
    before = {(line.source, line.ident): line.text for line in lines}
    changed = sum(before[line.source, line.ident] != line.text for line in kept)
    counts = Counter(d.why for d in dropped)
    shown = tuple((d.line.ident, d.why, d.line.text[:200]) for d in dropped[:EXAMPLES])
    return kept, Step(step.name, step.settings(), len(lines), dict(counts.most_common()), changed, shown), dropped


@dataclass(frozen=True, slots=True)
class Normalise:
    """Unicode form, single blanks, no control characters.

    Attributes:
        form: NFC, NFD, NFKC, NFKD or none.
        lower: lower case as well (for a text in capitals whose task is not).
        romanise: name of a romanisation, empty for none; applied last.
        strip_marks: code points to take away, e.g. `("U+0305",)`; combining strokes that the task's text does not write.
    """

    form: str = "NFC"
    lower: bool = False
    strip_marks: tuple[str, ...] = ()
    romanise: str = ""
    name = "normalise"

    def __post_init__(self) -> None:
        check_form(self.form)
        for point in self.strip_marks:
            _character(point)
        if self.romanise:
            romaniser(self.romanise)

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "strip_marks": list(self.strip_marks)}

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        kept, dropped = [], []
        for line in lines:
            text = self.text(line.text)
            if text:
                kept.append(replace(line, text=text))
            else:
                dropped.append(Dropped(line, "empty"))
        return kept, dropped

    def text(self, text: str) -> str:
        """One text, normalised."""
        text = normalise(text, self.form)
        text = "".join(c if unicodedata.category(c) != "Cc" else " " for c in text) if not text.isprintable() else text
        if self.lower:
            text = text.lower()
        if self.strip_marks:
            away = {_character(point) for point in self.strip_marks}
            bare = "".join(c for c in unicodedata.normalize("NFD", text) if c not in away)
            text = normalise(bare, self.form)
        if self.romanise:
            text = romaniser(self.romanise)(text)
        return " ".join(text.split())


def _character(point: str) -> str:
    digits = point.upper().removeprefix("U+")
    try:
        return chr(int(digits, 16))
    except (ValueError, OverflowError):
        raise UsageError(f"{point!r} is no code point; expected one such as U+0305") from None


@dataclass(frozen=True, slots=True)
class Length:
    """Attributes:
    least_words: words a line has at least.
    most_characters: characters a line has at most.
    """

    least_words: int = 1
    most_characters: int = 5_000
    name = "length"

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        return sift(lines, self._why)

    def _why(self, line: Line) -> str:
        if len(line.text) > self.most_characters:
            return f"more than {self.most_characters} characters"
        return f"fewer than {self.least_words} words" if len(word_spans(line.text)) < self.least_words else ""


@dataclass(frozen=True, slots=True)
class Script:
    """Attributes:
    script: as Unicode names it: `Latin`, `Coptic`, `Ol Chiki`.
    share: of a line's letters that must belong to it.
    """

    script: str
    share: float = 0.5
    name = "script"

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        return sift(lines, self._why)

    def _why(self, line: Line) -> str:
        found = Counter(name for char in line.text if (name := script(char)))
        total = sum(found.values())
        if not total:
            return "no letters"
        return "" if found[self.script] >= self.share * total else f"mostly {found.most_common(1)[0][0]}"


@dataclass(frozen=True, slots=True)
class Words:
    """Attributes:
    what: what the list is for: `personal data`, `toxicity`.
    entries: words or phrases; a line that holds one (case, marks and punctuation aside, whole words) goes.
    sha256: of the list's file; the list itself is not written into the manifest.
    keys: the entries as they are compared.
    """

    what: str
    entries: tuple[str, ...]
    sha256: str = ""
    keys: frozenset[tuple[str, ...]] = field(init=False, compare=False)
    name = "words"

    def __post_init__(self) -> None:
        keys = frozenset(key for entry in self.entries if (key := _key(entry)))
        if not keys:
            raise UsageError(f"the list for {self.what} has no words")
        object.__setattr__(self, "keys", keys)

    def settings(self) -> dict[str, Any]:
        return {"what": self.what, "entries": len(self.entries), "sha256": self.sha256}

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        lengths = sorted({len(key) for key in self.keys})

        def why(line: Line) -> str:
            words = _key(line.text)
            hit = any(words[i : i + n] in self.keys for n in lengths for i in range(len(words) - n + 1))
            return f"on the list for {self.what}" if hit else ""

        return sift(lines, why)


def _key(text: str) -> tuple[str, ...]:
    return tuple(key for word in text.split() if (key := normal_form(word)))


def sift(lines: Sequence[Line], why: Callable[[Line], str]) -> tuple[list[Line], list[Dropped]]:
    """The lines for which there is no reason to go (an empty one), and the others with theirs."""
    kept, dropped = [], []
    for line in lines:
        reason = why(line)
        if reason:
            dropped.append(Dropped(line, reason))
        else:
            kept.append(line)
    return kept, dropped
