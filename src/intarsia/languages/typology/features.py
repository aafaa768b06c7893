"""`Typology`: features of languages by block, with what is missing explicit.

Observed values lie in [0, 1] (fractions where sources disagree) and are NaN where no source has one; imputed values, where a
data set has them, are kept apart and never taken for observed ones.  URIEL: Littell et al. 2017 (EACL); most languages lack
most values (88.5 % in its syntax block), and what is imputed from relatives makes relatives look more alike than they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import DataError, UsageError, listing, nearest
from intarsia.languages.tags import alternatives, iso639_3

Missing = Literal["knn", "mask", "mean", "zero"]
Values = NDArray[np.float64]
Mask = NDArray[np.bool_]

BLOCKS = {"syntax": "S_", "phonology": "P_", "inventory": "INV_"}
"""Block -> how its features' names begin."""


@dataclass(frozen=True, slots=True)
class Vector:
    """Features of a language.

    Attributes:
        values: [F]; what stands where nothing was observed depends on `missing`.
        mask: [F], True where the value was observed.
        imputed: values where nothing was observed are imputed ones.
    """

    values: Values
    mask: Mask
    imputed: bool

    @property
    def observed(self) -> int:
        """Number of observed features."""
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A language near another one.

    Attributes:
        language: ISO 639-3 code.
        distance: cosine distance, 0 for the same direction.
        shared: features that were observed for both.
    """

    language: str
    distance: float
    shared: int


@dataclass(frozen=True, slots=True)
class Typology:
    """Feature vectors of languages.

    Attributes:
        source: where they come from, with version.
        licence: of the data.
        languages: L ISO 639-3 codes.
        features: F names.
        observed: [L, F], NaN where nothing was observed.
        imputed: [L, F] without NaN, or None.
        families: groups that a language belongs to, by code, the largest group first; empty where the source has none.
    """

    source: str
    licence: str
    languages: tuple[str, ...]
    features: tuple[str, ...]
    observed: Values
    imputed: Values | None = None
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.languages), len(self.features))
        for name, values in (("observed", self.observed), ("imputed", self.imputed)):
            if values is not None and values.shape != shape:
                raise DataError(f"{self.source}: {name} values have the shape {values.shape}, expected {shape}")
        present = self.observed[~np.isnan(self.observed)]
        if len(present) and (present.min() < 0 or present.max() > 1):
            raise DataError(f"{self.source}: values lie between {present.min():g} and {present.max():g}, expected 0 ... 1")

    def code(self, language: str) -> str:
        """The code under which a language is kept here; a macro-language and its best known member stand for each other.

        Raises:
            UsageError: it is not here; the message suggests codes.
        """
        wanted = alternatives(iso639_3(language))
        for code in wanted:
            if code in self.languages:
                return code
        raise UsageError(f"{self.source} has no language {language!r} (looked for {listing(wanted)}){nearest(wanted[0], self.languages)}; it has {len(self.languages):,}")

    def columns(self, blocks: Iterable[str]) -> NDArray[np.int64]:
        """Positions of the features of some blocks.

        Raises:
            UsageError: a block is unknown, or has no feature here.
        """
        found: list[int] = []
        for block in blocks:
            if block not in BLOCKS:
                raise UsageError(f"unknown block {block!r}{nearest(block, BLOCKS)}; known: {listing(BLOCKS)}")
            own = [i for i, name in enumerate(self.features) if name.startswith(BLOCKS[block])]
            if not own:
                raise UsageError(f"{self.source} has no features of the block {block!r} (names that begin with {BLOCKS[block]})")
            found += own
        return np.array(found, dtype=np.int64)

    def vector(self, language: str, blocks: Sequence[str] = ("syntax",), missing: Missing = "mask") -> Vector:
        """Features of a language.

        Args:
            missing: what stands for what was not observed: the imputed value (`knn`), the `mean` over all languages, or
                zero (`zero`, and `mask`, which says that the mask is to be used beside the values).

        Raises:
            UsageError: unknown language or block, or nothing is imputed here.
        """
        values, mask = self._filled([self.languages.index(self.code(language))], self.columns(blocks), missing)
        return Vector(values[0], mask[0], missing in ("knn", "mean") and not bool(mask.all()))

    def _filled(self, rows: Sequence[int], columns: NDArray[np.int64], missing: Missing) -> tuple[Values, Mask]:
        """Values [n, F] of some rows with what stands for missing ones, and where they were observed; raises as `vector`."""
        at = np.ix_(np.array(rows, dtype=np.int64), columns)
        raw = self.observed[at]
        mask = ~np.isnan(raw)
        if missing == "knn":
            if self.imputed is None:
                raise UsageError(f"{self.source} has no imputed values; take missing='mask', 'mean' or 'zero'")
            return np.where(mask, raw, self.imputed[at]), mask
        if missing == "mean":
            return np.where(mask, raw, self._means(columns)), mask
        if missing not in ("mask", "zero"):
            raise UsageError(f"missing={missing!r} is not one of knn, mask, mean, zero")
        return np.where(mask, raw, 0.0), mask

    def _means(self, columns: NDArray[np.int64]) -> Values:
        """Mean of each feature over the languages that have it; one half where none has."""
        part = self.observed[:, columns]
        known = ~np.isnan(part)
        count = known.sum(0)
        total = np.where(known, part, 0.0).sum(0)
        return np.where(count > 0, total / np.maximum(count, 1), 0.5)

    def distance(self, a: str, b: str, blocks: Sequence[str] = ("syntax",), missing: Missing = "mask") -> Neighbour:
        """How far `b` is from `a`: cosine distance; under `mask` over the features observed for both.  NaN if there are none."""
        return self._distances(self.code(a), [self.code(b)], blocks, missing)[0]

    def nearest(
        self, language: str, pool: Iterable[str] | None = None, k: int = 5, blocks: Sequence[str] = ("syntax",), missing: Missing = "mask", least: int = 20
    ) -> tuple[Neighbour, ...]:
        """The k nearest languages; ties by code.

        Args:
            pool: codes to choose from; None for all.  Codes that are not here are passed over, and so are the language's own
                other codes (its macro-language).
            least: under `mask`, features that must have been observed for both.
        """
        own = self.code(language)
        known = set(self.languages)
        chosen = sorted((known if pool is None else known.intersection(pool)).difference(alternatives(iso639_3(language)), {own}))
        found = self._distances(own, chosen, blocks, missing)
        kept = [n for n in found if not np.isnan(n.distance) and (missing != "mask" or n.shared >= least)]
        return tuple(sorted(kept, key=lambda n: (n.distance, -n.shared, n.language))[:k])

    def _distances(self, own: str, others: Sequence[str], blocks: Sequence[str], missing: Missing) -> list[Neighbour]:
        """`distance` of codes that are here to one of them."""
        row = {code: i for i, code in enumerate(self.languages)}
        filled, mask = self._filled([row[own], *map(row.__getitem__, others)], self.columns(blocks), missing)
        both = mask[0] & mask[1:]
        use = both if missing == "mask" else np.ones_like(both)
        a, b = filled[0] * use, filled[1:] * use
        dots = (a * b).sum(1)
        norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        cosine = np.divide(dots, norms, out=np.full_like(dots, np.nan), where=norms > 0)
        return [Neighbour(code, float(1 - c), int(s)) for code, c, s in zip(others, cosine, both.sum(1))]

    def twins(self, language: str, blocks: Sequence[str] = ("syntax",), missing: Missing = "knn") -> tuple[str, ...]:
        """Other languages whose vector is exactly the same: nothing that reads the vectors can tell them apart."""
        code = self.code(language)
        values, _ = self._filled(range(len(self.languages)), self.columns(blocks), missing)
        same = (values == values[self.languages.index(code)]).all(1)
        return tuple(other for other, equal in zip(self.languages, same) if equal and other != code)

    def path(self, language: str) -> tuple[str, ...]:
        """Families from the largest to the smallest group, then the language itself."""
        code = self.code(language)
        return (*self.families.get(code, ()), code)

    def relatives(self, language: str, pool: Iterable[str] | None = None, k: int = 5) -> tuple[tuple[str, int], ...]:
        """The languages that share most groups of the family tree, with the number of shared groups (at least one)."""
        code = self.code(language)
        own = set(self.families.get(code, ()))
        others = set(self.languages if pool is None else pool).difference(alternatives(iso639_3(language)), {code})
        found = [(other, len(own.intersection(self.families.get(other, ())))) for other in others]
        return tuple(sorted(((o, n) for o, n in found if n), key=lambda pair: (-pair[1], pair[0]))[:k])
