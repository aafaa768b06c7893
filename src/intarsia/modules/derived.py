"""The card of a module made from others: strictest licence, union of warnings and data, parents by digest.

Numbers measured on the parents say nothing about the result and are not taken over; neither is a bias evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.modules.card import Card
from intarsia.modules.module import Module

#: how much a licence asks for; combinations across families of copyleft are left to a person
STRICTNESS: Mapping[str, int] = {
    "CC0-1.0": 0, "Unlicense": 0, "MIT": 1, "BSD-2-Clause": 1, "BSD-3-Clause": 1, "Apache-2.0": 2, "CC-BY-4.0": 3,
    "MPL-2.0": 4, "CC-BY-SA-4.0": 5, "GPL-3.0-only": 6, "GPL-3.0-or-later": 6, "AGPL-3.0-only": 7,
    "CC-BY-NC-4.0": 8, "CC-BY-NC-SA-4.0": 9,
}  # fmt: skip
_ALONE = ({"CC-BY-SA-4.0", "GPL-3.0-only", "GPL-3.0-or-later", "AGPL-3.0-only", "CC-BY-NC-SA-4.0"}, {"CC-BY-NC-4.0"})


def strictest(licences: Sequence[str]) -> tuple[str, str | None]:
    """The licence of a work made from works under these, and a warning where that is not certain.

    An empty or unknown licence, or two that both bind derived works, gives no licence and a warning.
    """
    named = sorted({licence for licence in licences if licence})
    missing = sum(not licence for licence in licences)
    unknown = [licence for licence in named if licence not in STRICTNESS]
    if not named:
        return "", None
    if len(named) == 1 and not missing:
        return named[0], None
    if missing or unknown:
        what = f"{missing} without a licence" if missing else f"unknown to the table: {', '.join(unknown)}"
        return "", f"the licence of the result is for a person to decide: parents under {', '.join(named)} ({what})"
    binding = [licence for licence in named if licence in _ALONE[0]]
    if len(binding) > 1 or (binding and any(licence in _ALONE[1] for licence in named)):
        return "", f"the licence of the result is for a person to decide: {', '.join(named)} each bind what is derived from them"
    return max(named, key=lambda licence: STRICTNESS[licence]), None


def derived_card(modules: Sequence[Module], operation: str, settings: Mapping[str, Any]) -> Card:
    """A card for what `operation` made of `modules`."""
    cards = [module.card for module in modules]
    licence, doubt = strictest([card.licence for card in cards])
    names = ", ".join(module.name for module in modules)
    warnings = _union(warning for card in cards for warning in card.warnings)
    return Card(
        title=f"{operation} of {names}"[:200],
        languages=_union(tag for card in cards for tag in card.languages),
        script=_common([card.script for card in cards]),
        task=_common([card.task for card in cards]),
        data=_union(source for card in cards for source in card.data),
        base=_common([card.base for card in cards]),
        method=_common([card.method for card in cards]),
        recipe={"operation": operation, **settings},
        intended_use=_common([card.intended_use for card in cards]),
        out_of_scope="\n".join(_union(card.out_of_scope for card in cards if card.out_of_scope)),
        licence=licence,
        contact=_common([card.contact for card in cards]),
        warnings=(*warnings, doubt) if doubt else warnings,
        parents=_union(module.digest for module in modules),
    )


def _union(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _common(values: Sequence[str]) -> str:
    """The value if all agree, else none."""
    return values[0] if len(set(values)) == 1 else ""
