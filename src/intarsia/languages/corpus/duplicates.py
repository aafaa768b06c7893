"""Near-duplicates: lines that are equal after normalisation, or whose character 5-grams are nearly the same set.

Candidates come from MinHash (Broder 1997) in bands (Indyk & Motwani 1998): 64 hash functions in 16 bands of 4; every candidate
is then compared exactly, so that a line is dropped only where the Jaccard index of the 5-grams reaches the threshold.  Pairs at
0.8 are found with a chance of 1 - (1 - 0.8^4)^16 = 99.98 %, at 0.7 with 98.8 %.  The hash functions are fixed: a text gives the same
result everywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.data.check import normal_form
from intarsia.languages.corpus.filters import Dropped
from intarsia.languages.corpus.sources import Line

GRAM, HASHES, BANDS = 5, 64, 16
_PRIME = (1 << 31) - 1
_A, _B = (np.random.default_rng(8191).integers(low, _PRIME, size=HASHES, dtype=np.int64) for low in (1, 0))


def grams(text: str) -> frozenset[str]:
    """Character 5-grams of a normalised text; the text itself if it is shorter."""
    return frozenset(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))


def signature(found: frozenset[str]) -> NDArray[np.int64]:
    """MinHash of a set, [HASHES]."""
    codes = np.fromiter((zlib.crc32(gram.encode("utf-8", "surrogatepass")) % _PRIME for gram in found), dtype=np.int64, count=len(found))
    result: NDArray[np.int64] = ((_A[:, None] * codes[None, :] + _B[:, None]) % _PRIME).min(1)
    return result


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over that of the union."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Keeps the first of each group.

    Attributes:
        threshold: Jaccard index from which a line repeats an earlier one; above 1 only equal ones do.
        short: lines with fewer characters (normalised) are compared exactly only.
    """

    threshold: float = 0.8
    short: int = 20
    name = "duplicates"

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "short": self.short, "gram": GRAM, "hashes": HASHES, "bands": BANDS}

    def run(self, lines: Sequence[Line]) -> tuple[list[Line], list[Dropped]]:
        kept: list[Line] = []
        dropped: list[Dropped] = []
        seen: set[str] = set()
        buckets: dict[tuple[int, bytes], list[int]] = {}
        sets: dict[int, frozenset[str]] = {}
        for number, line in enumerate(lines):
            form = normal_form(line.text)
            if form in seen:
                dropped.append(Dropped(line, "repeats a line"))
                continue
            if self.threshold <= 1 and len(form) >= self.short:
                found = grams(form)
                keys = [(band, part.tobytes()) for band, part in enumerate(np.split(signature(found), BANDS))]
                near = {other for key in keys for other in buckets.get(key, ())}
                if any(jaccard(found, sets[other]) >= self.threshold for other in sorted(near)):
                    dropped.append(Dropped(line, "nearly repeats a line"))
                    continue
                sets[number] = found
                for key in keys:
                    buckets.setdefault(key, []).append(number)
            seen.add(form)
            kept.append(line)
        return kept, dropped
