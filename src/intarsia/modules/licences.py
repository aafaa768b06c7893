"""Licences by what they demand, and the licence of what is made from several works.

A row says what a licence demands of those who pass on what they made from the work.  One licence is at least as strict as
another if it demands all that the other does; the strictest of several exists only if one of them demands all that any
does.  Where none does, or a licence is not in the table, the answer is "unknown" and a person decides: it is never laxer
than a parent.  Licences that bind what is derived to themselves demand each their own (`share: ...`), so that two of them
do not mix, except where their texts say so.  Texts: spdx.org/licenses.

What is not here: legal advice.  What a module owes to its training data is for the person who states its licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from intarsia.modules.card import UNKNOWN


@dataclass(frozen=True, slots=True)
class Licence:
    """One licence.

    Attributes:
        spdx: its identifier.
        demands: what it asks for.
        hub: how the Hugging Face Hub calls it.
    """

    spdx: str
    demands: frozenset[str]
    hub: str


_NOTICE = ("notice",)
_CHANGES = ("notice", "changes")
_CREDIT = ("notice", "changes", "attribution")
_FILES = (*_CREDIT, "source of changed files")
_GPL = (*_FILES, "share: GPL-3.0")
#: a licence that is as strict as the one above it stands below it if it is to be preferred
_ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("CC0-1.0", (), "cc0-1.0"),
    ("Unlicense", (), "unlicense"),
    ("PDDL-1.0", (), "pddl"),
    ("MIT", _NOTICE, "mit"),
    ("ISC", _NOTICE, "isc"),
    ("BSD-2-Clause", _NOTICE, "bsd-2-clause"),
    ("BSD-3-Clause", _NOTICE, "bsd-3-clause"),
    ("Apache-2.0", _CHANGES, "apache-2.0"),
    ("ODC-By-1.0", _CREDIT, "odc-by"),
    ("CC-BY-3.0", _CREDIT, "cc-by-3.0"),
    ("CC-BY-4.0", _CREDIT, "cc-by-4.0"),
    ("MPL-2.0", _FILES, "mpl-2.0"),
    ("LGPL-3.0-or-later", _FILES, "lgpl-3.0"),
    ("CC-BY-SA-3.0", (*_CREDIT, "share: CC-BY-SA-3.0"), "cc-by-sa-3.0"),
    ("CC-BY-SA-4.0", (*_CREDIT, "share: CC-BY-SA-3.0", "share: CC-BY-SA-4.0"), "cc-by-sa-4.0"),
    ("GPL-3.0-or-later", _GPL, "gpl-3.0"),
    ("GPL-3.0-only", (*_GPL, "this version"), "gpl-3.0"),
    ("AGPL-3.0-or-later", (*_GPL, "source over a network"), "agpl-3.0"),
    ("AGPL-3.0-only", (*_GPL, "source over a network", "this version"), "agpl-3.0"),
    ("ODbL-1.0", (*_CREDIT, "share: ODbL-1.0"), "odbl"),
    ("CC-BY-NC-3.0", (*_CREDIT, "not commercial"), "cc-by-nc-3.0"),
    ("CC-BY-NC-4.0", (*_CREDIT, "not commercial"), "cc-by-nc-4.0"),
    ("CC-BY-NC-SA-3.0", (*_CREDIT, "not commercial", "share: CC-BY-NC-SA-3.0"), "cc-by-nc-sa-3.0"),
    ("CC-BY-NC-SA-4.0", (*_CREDIT, "not commercial", "share: CC-BY-NC-SA-3.0", "share: CC-BY-NC-SA-4.0"), "cc-by-nc-sa-4.0"),
    ("CC-BY-ND-4.0", (*_CREDIT, "nothing derived"), "cc-by-nd-4.0"),
    ("CC-BY-NC-ND-4.0", (*_CREDIT, "not commercial", "nothing derived"), "cc-by-nc-nd-4.0"),
)
LICENCES: Mapping[str, Licence] = MappingProxyType({spdx: Licence(spdx, frozenset(demands), hub) for spdx, demands, hub in _ROWS})
_ANY_CASE: Mapping[str, str] = MappingProxyType({name.lower(): spdx for spdx, row in LICENCES.items() for name in (row.hub, spdx)})


def canonical(licence: str) -> str:
    """The identifier as SPDX writes it (`cc-by-4.0` -> `CC-BY-4.0`); what is not in the table stays as it is."""
    return _ANY_CASE.get(licence.strip().lower(), licence.strip())


def strictest(licences: Sequence[str]) -> tuple[str, str | None]:
    """The licence of what is made from works under these, and a warning where that is for a person to decide.

    Returns:
        The strictest, which demands all that any of them does; `"unknown"` and a warning if there is none, or a work has no
        licence or one that is not in the table while others have another; `""` if none of the works has one.
    """
    named = list(dict.fromkeys(canonical(licence) for licence in licences if licence.strip()))
    silent = sum(not licence.strip() for licence in licences)
    if not named:
        return "", None
    if len(named) == 1 and not silent:
        barred = named[0] in LICENCES and "nothing derived" in LICENCES[named[0]].demands
        return named[0], f"{named[0]} does not allow to pass on what is made from the work" if barred else None
    lead = f"the licence of the result is for a person to decide: parents under {', '.join(named)}"
    strange = [licence for licence in named if licence not in LICENCES]
    if silent or strange:
        reasons = [f"{silent} without a licence"] * bool(silent) + [f"not in the table: {', '.join(strange)}"] * bool(strange)
        return UNKNOWN, f"{lead} ({'; '.join(reasons)})"
    demands = frozenset().union(*(LICENCES[licence].demands for licence in named))
    if "nothing derived" in demands:
        return UNKNOWN, f"{lead} (one of them does not allow to pass on what is made from the work)"
    found = [spdx for spdx, row in LICENCES.items() if spdx in named and row.demands == demands]
    return (found[-1], None) if found else (UNKNOWN, f"{lead} (no one of them demands all that the others do)")
