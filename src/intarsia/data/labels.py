"""`LabelMap`: the label names of a task, in the order of the head's outputs, looked up by name.

Two data sets with the same labels in another order give the same numbers; a label the map does not know is an error, never
a new number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from intarsia.data.table import Cell
from intarsia.errors import DataError, listing, nearest


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Label names; the position of a name is its id.

    Raises:
        DataError: no names, an empty name, or a name twice.
    """

    names: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names) or not all(self.names):
            raise DataError(f"a label inventory needs distinct, non-empty names, found {listing(map(repr, self.names))}")
        object.__setattr__(self, "_ids", {name: i for i, name in enumerate(self.names)})

    @classmethod
    def of(cls, *columns: Sequence[Cell], allow_twins: bool = False) -> LabelMap:
        """The labels (or tags) that occur, sorted; whole numbers are sorted as numbers.

        Raises:
            DataError: nothing there, an empty label, or twins such as "Sports" and "sports ".
        """
        found = set(flatten(cell for column in columns for cell in column))
        if not allow_twins and (pairs := twins(found)):
            raise DataError(
                f"labels that differ only in case, space or Unicode form: {listing(' / '.join(map(repr, p)) for p in pairs)}; "
                f"make them equal in the file, or allow twins if they are different labels"
            )
        return cls(tuple(sorted(found, key=_order)))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def id(self, name: str) -> int:
        """Id of a name; raises DataError if unknown."""
        if name not in self._ids:
            raise DataError(f"unknown label {name!r}{nearest(name, self.names)} known: {listing(map(repr, self.names), 20)}")
        return self._ids[name]

    def encode(self, column: Sequence[str], where: Callable[[int], str] | None = None) -> tuple[int, ...]:
        """Ids of a column of labels.

        Args:
            column: one label per row.
            where: row -> place, for the message (`Table.where`).

        Raises:
            DataError: unknown labels; the message gives the set difference, counts and the first place.
        """
        self._refuse_unknown(column, where)
        return tuple(self._ids[label] for label in column)

    def encode_tags(
        self, column: Sequence[Sequence[str]], where: Callable[[int], str] | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Ids of a column of tag sequences; raises as `encode`."""
        self._refuse_unknown([tuple(tags) for tags in column], where)
        return tuple(tuple(self._ids[tag] for tag in tags) for tags in column)

    def _refuse_unknown(self, column: Sequence[Cell], where: Callable[[int], str] | None) -> None:
        counts = Counter(flatten(column))
        unknown = sorted(set(counts) - set(self.names))
        if not unknown:
            return
        row = next(i for i, cell in enumerate(column) if set(flatten([cell])) & set(unknown))
        unseen = [name for name in self.names if name not in counts]
        raise DataError(
            f"{where(row) if where else f'row {row + 1}'}: labels that the inventory of {len(self)} does not have: "
            f"{listing(f'{name!r} ({counts[name]}x){nearest(name, self.names)}' for name in unknown)}. "
            f"In the inventory but not here: {listing(map(repr, unseen), 20) or 'none'}"
        )


def flatten(cells: Iterable[Cell]) -> Iterator[str]:
    """Labels of a column of labels or of a column of tag sequences."""
    for cell in cells:
        if isinstance(cell, str):
            yield cell
        else:
            yield from cell


def twins(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that are equal after NFKC, case folding and collapsing of white space and of `_`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        key = " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFKC", name).casefold())).strip()
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _order(name: str) -> tuple[int, int, str]:
    is_number = name.isascii() and name.removeprefix("-").isdecimal() and len(name) < 19
    return (0, int(name), name) if is_number else (1, 0, name)
