"""Training and development parts: whole books of a Bible, blocks of other texts; and verses in parallel.

Parallel passages (the synoptic gospels) leak between verses of one book and the next, so whole books are held out.  Which books:
those whose lines together come nearest to the wanted share, small books preferred over parts of large ones; the four gospels are never
chosen by themselves, as their passages recur in each other.  Texts without verses are held out in blocks of neighbouring lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intarsia.errors import UsageError, listing, nearest
from intarsia.languages.corpus.sources import Line

GOSPELS = ("MAT", "MAR", "LUK", "JOH")
BLOCK = 20


@dataclass(frozen=True, slots=True)
class Split:
    """A corpus in two parts.

    Attributes:
        train, dev: lines, in their order.
        books: held out.
    """

    train: tuple[Line, ...]
    dev: tuple[Line, ...]
    books: tuple[str, ...]


def split(lines: Sequence[Line], share: float = 0.05, books: Sequence[str] | None = None, seed: int = 0) -> Split:
    """Hold out whole books, and of every source without verses blocks of lines.

    Args:
        share: of the lines that the dev part is to have, of each kind.
        books: to hold out; None for a choice, see above.

    Raises:
        UsageError: a book is not in the corpus, or nothing would be left to train on.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the share of the dev part lies between 0 and 1, found {share}")
    counts = Counter(line.book for line in lines if line.book)
    if books is None:
        books = choose_books(counts, share)
    for book in books:
        if book not in counts:
            raise UsageError(f"no book {book!r} in this corpus{nearest(book, counts)} it has: {listing(counts, 30) or 'none'}")
    held = set(books)
    blocks = _blocks([line for line in lines if not line.book], share, seed)
    dev = tuple(line for line in lines if (line.book in held if line.book else (line.source, line.ident) in blocks))
    chosen = {(line.source, line.ident) for line in dev}
    train = tuple(line for line in lines if (line.source, line.ident) not in chosen)
    if not train:
        raise UsageError(f"nothing is left to train on: all {len(lines)} lines are in the dev part")
    return Split(train, dev, tuple(books))


def choose_books(counts: Mapping[str, int], share: float) -> tuple[str, ...]:
    """Books whose lines add up nearest to a share of all lines, by a search over sums; ties by fewer, then by name."""
    total = sum(counts.values())
    wanted = round(share * total)
    if not wanted:
        return ()
    candidates = sorted(book for book in counts if book not in GOSPELS and counts[book] < total) or sorted(b for b in counts if counts[b] < total)
    sums: dict[int, tuple[str, ...]] = {0: ()}
    for book in candidates:
        for value, chosen in list(sums.items()):
            new, longer = value + counts[book], (*chosen, book)
            if new <= 2 * wanted and (new not in sums or (len(longer), longer) < (len(sums[new]), sums[new])):
                sums[new] = longer
    best = min((value for value in sums if value), key=lambda value: (abs(value - wanted), len(sums[value])), default=0)
    return sums[best] if best else tuple(sorted(candidates, key=lambda book: counts[book])[:1])


def _blocks(lines: Sequence[Line], share: float, seed: int) -> set[tuple[int, str]]:
    """Ids of the lines of drawn blocks, about a share of them in each source."""
    held: set[tuple[int, str]] = set()
    for source in dict.fromkeys(line.source for line in lines):
        own = [line for line in lines if line.source == source]
        size = max(1, min(BLOCK, round(len(own) * share / 2)))
        blocks = [own[i : i + size] for i in range(0, len(own), size)]
        count = round(len(blocks) * share)
        for index in np.random.default_rng([seed, source]).permutation(len(blocks))[:count]:
            held.update((line.source, line.ident) for line in blocks[index])
    return held


@dataclass(frozen=True, slots=True)
class Pair:
    """A verse in two languages."""

    ident: str
    other: str
    text: str


def pairs(lines: Sequence[Line], other: Sequence[Line], ratio: float = 3.0) -> tuple[list[Pair], dict[str, int]]:
    """Verses that both texts have, where their lengths agree: numberings differ between Bibles, and a verse may stand for several.

    Args:
        ratio: largest factor by which a pair's lengths may differ from the median proportion of all pairs.

    Returns:
        The pairs, and counts of what was left out.
    """
    by_ident = {line.ident: line.text for line in other if line.book}
    verses = [line for line in lines if line.book]
    both = [(line, by_ident[line.ident]) for line in verses if line.ident in by_ident]
    if not both:
        return [], {"not in the other text": len(verses)}
    lengths = np.array([len(line.text) / max(1, len(text)) for line, text in both])
    middle = float(np.median(lengths))
    kept = [Pair(line.ident, text, line.text) for (line, text), length in zip(both, lengths) if 1 / ratio <= length / middle <= ratio]
    counts = {"not in the other text": len(verses) - len(both), "lengths that do not agree": len(both) - len(kept)}
    return kept, {why: count for why, count in counts.items() if count}
