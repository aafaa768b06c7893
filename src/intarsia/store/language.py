"""Which languages of modules answer to the language that is asked for (BCP-47 and ISO 639, by `langcodes`).

What is not here: distances between languages; a match is exact, or that of a macro-language and its members.
"""

from __future__ import annotations

from collections.abc import Iterable

import langcodes
from langcodes.data_dicts import ALL_SCRIPTS, MACROLANGUAGES

from intarsia.errors import UsageError


class LanguageQuery:
    """A language asked for; `swa`, `sw` and `swh` find each other, `arb` finds `ara` but not `arz`.

    A script or a region counts if the question names it: `kab` finds `kab-Latn`, `kab-Tfng` does not.

    Raises:
        UsageError: the tag is malformed or no such language is registered.
    """

    def __init__(self, tag: str) -> None:
        try:
            asked = langcodes.Language.get(tag)
            known = asked.is_valid() and asked.language is not None
        except ValueError:
            known = False
        if not known:
            raise UsageError(f"{tag[:80]!r} is not a registered language; expected a BCP-47 tag or ISO 639 code such as 'swh' or 'kab-Latn'")
        self._script, self._region = asked.script, asked.territory
        self._codes = _codes(asked)

    def matches(self, tag: str, script: str = "") -> bool:
        """Whether a module of language `tag` answers; a tag that cannot be read does not.

        Args:
            script: where the tag names none, the scripts that the card does (joined by `+`).
        """
        try:
            found = langcodes.Language.get(tag)
        except ValueError:
            return False
        (own, macro), (other, other_macro) = self._codes, _codes(found)
        if own not in (other, other_macro) and other != macro:
            return False
        if self._script and self._script not in _scripts(found, script):
            return False
        return not self._region or found.territory == self._region


def _codes(language: langcodes.Language) -> tuple[str, str]:
    """The code of the language and that of the macro-language it belongs to (itself, if to none)."""
    code = langcodes.standardize_tag(language.language or "und")
    return code, MACROLANGUAGES.get(code, code)


def check_script(code: str) -> str:
    """An ISO 15924 code as it is written (`Latn`).

    Raises:
        UsageError: no such script is registered.
    """
    found = code.title()
    if found not in ALL_SCRIPTS:
        raise UsageError(f"{code[:80]!r} is not a registered script; expected an ISO 15924 code such as 'Latn' or 'Tfng'")
    return found


def scripts(tags: Iterable[str], card: str = "") -> set[str]:
    """Scripts of languages: the tag's own, else the card's (joined by `+`), else the one a language is usually written in."""
    found: set[str] = set()
    for tag in tags:
        try:
            found |= _scripts(langcodes.Language.get(tag), card)
        except ValueError:
            continue
    return found or {code for code in card.split("+") if code}


def macro_of(code: str) -> str:
    """The macro-language that a language belongs to, "" if to none."""
    own, macro = _codes(langcodes.Language.get(code))
    return "" if own == macro else macro


def _scripts(language: langcodes.Language, card: str) -> set[str]:
    if language.script:
        return {language.script}
    usual = language.maximize().script
    return {code for code in card.split("+") if code} or ({usual} if usual else set())
