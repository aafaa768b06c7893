"""`Query`: which modules answer to a language, script, task, base, method and domain; by their headers alone.

What is not here: which languages answer to which (`language.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from intarsia.modules import Header
from intarsia.store.language import LanguageQuery, check_script, scripts


@dataclass(frozen=True)
class Query:
    """What is asked for; None for anything.

    Attributes:
        language: BCP-47 tag or ISO 639 code, see `LanguageQuery`; of the card's languages and the role `language`.
        script: ISO 15924 code: of the tags, the card, or the one a language is usually written in.
        task: as in the card or the role `task`.
        base: as in the card, or the fingerprint's architecture or weights.
        method: name of the method.
        domain: the role `domain`.

    Raises:
        UsageError: no such language or script is registered.
    """

    language: str | None = None
    script: str | None = None
    task: str | None = None
    base: str | None = None
    method: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.script is not None:
            object.__setattr__(self, "script", check_script(self.script))
        if self.language is not None:
            _ = self._languages  # refused now

    def fits(self, header: Header) -> bool:
        """Whether a module answers to all of it."""
        card, spoken = header.card, languages_of(header)
        return (
            (self._languages is None or any(self._languages.matches(tag, card.script) for tag in spoken))
            and (self.script is None or self.script in scripts(spoken, card.script))
            and (self.task is None or self.task in (card.task, header.roles.get("task")))
            and (self.base is None or self.base in (card.base, header.base.architecture, header.base.weights))
            and (self.method is None or self.method == method_name(header))
            and (self.domain is None or self.domain == header.roles.get("domain"))
        )

    @cached_property
    def _languages(self) -> LanguageQuery | None:
        return None if self.language is None else LanguageQuery(self.language)


def languages_of(header: Header) -> list[str]:
    """Languages of a module: those of its card, and of the role `language` (several joined by `+`)."""
    return list(dict.fromkeys((*header.card.languages, *filter(None, header.roles.get("language", "").split("+")))))


def method_name(header: Header) -> str:
    """The method's name; the method itself need not be installed."""
    found: Any = header.specification.get("name", "")
    return str(found)
