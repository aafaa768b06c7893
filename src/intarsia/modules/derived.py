"""The card of a module made from others: strictest licence, union of warnings and data, parents by name and digest.

Numbers measured on the parents say nothing about the result and are not taken over; neither is a bias evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from intarsia.modules.card import Card, Cost
from intarsia.modules.licences import strictest
from intarsia.modules.module import Module

T = TypeVar("T")


def derived_card(modules: Sequence[Module], operation: str, settings: Mapping[str, Any], *, nbytes: int | None = None, inside: Sequence[str] = ()) -> Card:
    """A card for what `operation` made of `modules`.

    Args:
        settings: what the operation was told, plain values.
        nbytes: size of the result's tensors.
        inside: licences of what else is in the result (the base, if its weights are).
    """
    cards = [module.card for module in modules]
    licence, doubt = strictest([*(card.licence for card in cards), *inside])
    warnings = _union(warning for card in cards for warning in card.warnings)
    parents = {module.digest: module.name for module in reversed(modules)}  # the first name of a module that stands twice
    digests = _union(module.digest for module in modules)
    return Card(
        title=f"{operation} of {', '.join(module.name for module in modules)}"[:200],
        languages=_union(tag for card in cards for tag in card.languages),
        script="+".join(_union(script for card in cards for script in card.script.split("+") if script)),
        task=_common([card.task for card in cards]),
        data=_union(source for card in cards for source in card.data),
        base=_common([card.base for card in cards if card.base]),
        method=" + ".join(_union(module.method.name for module in modules)),
        recipe={"operation": operation, **settings},
        cost=Cost(trainable=0, bytes=nbytes),
        intended_use=_common([card.intended_use for card in cards]),
        out_of_scope="\n".join(_union(card.out_of_scope for card in cards if card.out_of_scope)),
        licence=licence,
        contact=_common([card.contact for card in cards]),
        warnings=_union((*warnings, doubt)) if doubt else warnings,
        parents=digests,
        parent_names=tuple(parents[digest] for digest in digests),
        conflicts=_union(digest for card in cards for digest in card.conflicts),
    )


def _union(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _common(values: Sequence[str]) -> str:
    """The value if all agree, else none."""
    return values[0] if len(set(values)) == 1 else ""
