"""The tree of languages with what a store has for each: groups of a family tree, macro-languages, languages, modules.

Which groups a language belongs to is data from elsewhere, given as a mapping (`languages.typology` reads Glottolog, URIEL and
files of one's own); without it languages stand below their macro-language (ISO 639-3, by `langcodes`).

What is not here: reading such data, lineage of modules (`lineage.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import langcodes
from langcodes.data_dicts import LANGUAGE_ALPHA3, NORMALIZED_MACROLANGUAGES

from intarsia.store.entry import Stored
from intarsia.store.finding import languages_of
from intarsia.store.language import macro_of, scripts

Groups = Mapping[str, tuple[str, ...]]
"""By ISO 639-3 code the groups a language belongs to, from the largest to the smallest."""
_SHORT = {long: short for short, long in LANGUAGE_ALPHA3.items()}
OTHER = "(no language)"


@dataclass(slots=True)
class Branch:
    """A group, a macro-language or a language.

    Attributes:
        name: of the group, or ISO 639-3 code of the language.
        language: it is a language.
        modules: what the store has for the language itself: names, or the first digits of the sha256.
        scripts: scripts of those modules.
        known: languages below it in the data, itself among them if it is one; 0 without data.
        covered: those of them that have a module.
        below: the parts, by name.
    """

    name: str
    language: bool = False
    modules: list[str] = field(default_factory=list)
    scripts: set[str] = field(default_factory=set)
    known: int = 0
    covered: int = 0
    below: dict[str, Branch] = field(default_factory=dict)


def language_tree(entries: Iterable[Stored], groups: Groups | None = None, *, whole: bool = False) -> Branch:
    """The tree of the languages that modules are for.

    Args:
        groups: the family tree; None for macro-languages only.  A macro-language and the member that it usually means
            (`swa` and `swh`) are one language of it.
        whole: keep branches without modules too, to see what is missing.

    Returns:
        The root, which is no group itself.  Modules without a language stand below `OTHER`.
    """
    root = Branch("")
    for entry in entries:
        if entry.header is None:
            continue
        tags = languages_of(entry.header)
        for tag in tags:
            leaf = _leaf(root, code_of(tag), groups)
            if entry.title not in leaf.modules:
                leaf.modules.append(entry.title)
            leaf.scripts |= scripts([tag], entry.header.card.script)
        if not tags:
            root.below.setdefault(OTHER, Branch(OTHER)).modules.append(entry.title)
    if groups is not None:
        for code in groups:
            if whole or _meets(root, groups, code):
                _leaf(root, code, groups)
    _count(root, groups is not None)
    return root if whole else _pruned(root)


def code_of(tag: str) -> str:
    """The ISO 639-3 code of a tag's language (`sw` -> `swa`); the tag itself where it has none."""
    try:
        return langcodes.Language.get(tag).to_alpha3()
    except (ValueError, LookupError):
        return tag


def _leaf(root: Branch, code: str, groups: Groups | None) -> Branch:
    code = next((other for other in _same(code) if other in groups), code) if groups is not None else code
    branch = root
    for group in _path(code, groups):
        branch = branch.below.setdefault(group, Branch(group))
    leaf = branch.below.setdefault(code, Branch(code))
    leaf.language = True
    return leaf


def _path(code: str, groups: Groups | None) -> tuple[str, ...]:
    if groups is not None and code in groups:
        return tuple(group for group in groups[code] if group != code)
    try:
        macro = macro_of(code)
    except ValueError:
        return ()
    return (code_of(macro),) if macro else ()


def _same(code: str) -> tuple[str, ...]:
    """The code, its macro-language, and the member that stands for it where it is one."""
    members = [member for member, macro in NORMALIZED_MACROLANGUAGES.items() if macro == _SHORT.get(code, code)]
    macro = NORMALIZED_MACROLANGUAGES.get(code)
    return (code, *members, *([code_of(macro)] if macro else []))


def _meets(root: Branch, groups: Groups, code: str) -> bool:
    """Whether a language's family already stands in the tree."""
    path = groups[code]
    return bool(path) and path[0] in root.below


def _count(branch: Branch, data: bool) -> None:
    for part in branch.below.values():
        _count(part, data)
    own = int(branch.language)
    branch.covered = int(own and bool(branch.modules)) + sum(part.covered for part in branch.below.values())
    branch.known = own + sum(part.known for part in branch.below.values()) if data else 0


def _pruned(branch: Branch) -> Branch:
    branch.below = {name: _pruned(part) for name, part in branch.below.items() if part.covered or part.modules}
    return branch
