"""`Glottolog`: the family tree of the CLDF data package (`languages.csv`, and `values.csv` where it is there).

`languages.csv` alone knows the family of a language (and the language of a dialect); the whole path comes from the parameter
`classification` of `values.csv`.  Hammarström et al., glottolog.org, CC BY 4.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from intarsia.data import read as read_table
from intarsia.errors import DataError, UsageError, listing
from intarsia.languages.tags import alternatives, iso639_3

_NEEDED = ("ID", "Name", "Family_ID", "Level", "ISO639P3code")


@dataclass(frozen=True, slots=True)
class Glottolog:
    """Languages with their ancestors.

    Attributes:
        names: name by glottocode, of families too.
        codes: glottocode by ISO 639-3 code.
        ancestors: by glottocode, from the family downwards, the languoid itself not among them.
    """

    names: Mapping[str, str]
    codes: Mapping[str, str]
    ancestors: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Glottolog:
        """From a folder with `languages.csv` (or one that has it in `cldf/`).

        Raises:
            DataError: there is none, or it lacks a column.
        """
        place = Path(folder)
        place = place / "cldf" if (place / "cldf" / "languages.csv").is_file() else place
        table = read_table(place / "languages.csv", format="csv")
        missing = [name for name in _NEEDED if name not in table.names]
        if missing:
            raise DataError(f"{place / 'languages.csv'}: no column {listing(map(repr, missing))}; expected Glottolog's CLDF table")
        ids, names, families, codes = (table.texts(name) for name in ("ID", "Name", "Family_ID", "ISO639P3code"))
        ancestors: dict[str, tuple[str, ...]] = {code: (family,) if family and family != code else () for code, family in zip(ids, families)}
        if (place / "values.csv").is_file():
            ancestors.update(_classified(place / "values.csv"))
        return cls(dict(zip(ids, names)), {iso: code for iso, code in zip(codes, ids) if iso}, ancestors)

    @property
    def deep(self) -> bool:
        """Whether more than families is known."""
        return any(len(above) > 1 for above in self.ancestors.values())

    def code(self, language: str) -> str:
        """The glottocode of a language, or a glottocode itself.

        Raises:
            UsageError: it is not in the tree.
        """
        if language in self.names:
            return language
        wanted = alternatives(iso639_3(language))
        for iso in wanted:
            if iso in self.codes:
                return self.codes[iso]
        raise UsageError(f"Glottolog has no language {language!r} (looked for {listing(wanted)})")

    def path(self, language: str) -> tuple[str, ...]:
        """Glottocodes from the family to the language; (language,) for an isolate."""
        code = self.code(language)
        return (*self.ancestors.get(code, ()), code)

    def relatives(self, language: str, pool: Iterable[str], k: int = 5) -> tuple[tuple[str, int], ...]:
        """ISO codes of a pool that share most ancestors, with the number of shared ones (at least one); ties by code."""
        mine = self.code(language)
        own = set(self.ancestors.get(mine, ()))
        found = []
        for other in pool:
            code = self.codes.get(other)
            if code is not None and code != mine:
                found.append((other, len(own.intersection(self.ancestors.get(code, ())))))
        return tuple(sorted(((o, n) for o, n in found if n), key=lambda pair: (-pair[1], pair[0]))[:k])


def _classified(path: Path) -> dict[str, tuple[str, ...]]:
    table = read_table(path, format="csv", columns=["Language_ID", "Parameter_ID", "Value"])
    rows = zip(table.texts("Language_ID"), table.texts("Parameter_ID"), table.texts("Value"))
    return {code: tuple(part for part in value.split("/") if part) for code, parameter, value in rows if parameter == "classification"}
