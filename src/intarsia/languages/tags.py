"""Language tags as this room uses them: BCP-47 in, ISO 639-3 out (by `langcodes`)."""

from __future__ import annotations

import langcodes

from intarsia.errors import UsageError


def iso639_3(tag: str) -> str:
    """The ISO 639-3 code of a BCP-47 tag or an ISO 639 code: `sw` -> `swa`, `kab-Latn` -> `kab`.

    Raises:
        UsageError: the tag is malformed or no such language is registered.
    """
    try:
        found = langcodes.Language.get(tag)
        if found.is_valid() and found.language:
            return found.to_alpha3()
    except (ValueError, LookupError):
        pass
    raise UsageError(f"{tag[:80]!r} is not a registered language; expected a BCP-47 tag or ISO 639 code such as 'swh' or 'kab-Latn'")


def alternatives(code: str) -> tuple[str, ...]:
    """Codes under which a data set may keep the same language: the code itself, the macro-language, its best known member.

    `swa` and `swh` stand for each other; the first one a data set has is taken.
    """
    from langcodes.data_dicts import MACROLANGUAGES

    found = [code]
    macro = MACROLANGUAGES.get(code) or MACROLANGUAGES.get(langcodes.standardize_tag(code))
    for other in (macro, *_MEMBERS.get(code, ())):
        if other:
            found.append(langcodes.Language.get(other).to_alpha3())
    return tuple(dict.fromkeys(found))


#: macro-language -> the member that data sets mean by it
_MEMBERS = {
    "swa": ("swh",), "zho": ("cmn",), "msa": ("zsm",), "ara": ("arb",), "fas": ("pes",), "nor": ("nob",), "est": ("ekk",), "lav": ("lvs",),
    "uzb": ("uzn",), "mlg": ("plt",), "mon": ("khk",), "ori": ("ory",), "nep": ("npi",), "sqi": ("als",), "aze": ("azj",), "yid": ("ydd",),
    "orm": ("gaz",), "pus": ("pbt",), "kon": ("kng",), "grn": ("gug",), "que": ("quy",), "aym": ("ayr",), "ful": ("fuv",), "kur": ("kmr",),
}  # fmt: skip
