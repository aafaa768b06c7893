"""`Table`: an immutable table of strings that remembers where each row came from.

A cell is a string, or a tuple of strings for token data.  Nothing is ever converted: `nan`, `NA`, `no`, `007` and `1e5`
stay what the file says.  Reading files is in `readers.py`, label inventories are in `labels.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from intarsia.errors import DataError, listing, nearest

Cell = str | tuple[str, ...]

MEMORY = "<memory>"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length, by name.

    `len(table)` counts rows, iteration gives rows as dictionaries, `table["text"]` is a column, `table[3]` a row and
    `table[2:5]` a table.

    Attributes:
        names: column names, in order.
        columns: one tuple of cells per name; all cells of a column are strings, or all are tuples of strings.
        files: per row, the file it was read from.
        lines: per row, the line its record starts at (1-based; 0 for rows made in memory).
        bad: one message per malformed row that was skipped on request.
        renormalised: rows that Unicode normalisation changed while reading.
    """

    names: tuple[str, ...]
    columns: tuple[tuple[Cell, ...], ...]
    files: tuple[str, ...]
    lines: tuple[int, ...]
    bad: tuple[str, ...] = ()
    renormalised: int = 0

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise DataError(f"a table needs distinct column names, found {listing(map(repr, self.names))}")
        if len(self.columns) != len(self.names):
            raise DataError(f"a table with {len(self.names)} column names was given {len(self.columns)} columns")
        for name, column in zip(self.names, self.columns):
            if len(column) != len(self.lines) or len(self.files) != len(self.lines):
                raise DataError(f"column {name!r} has {len(column)} cells, the table has {len(self.lines)} rows")
            _check_cells(name, column)

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[str] | Sequence[Sequence[str]]], source: str = MEMORY) -> Table:
        """A table from columns in memory, e.g. `Table.of({"text": [...], "label": [...]})`.

        Raises:
            DataError: a cell is neither a string nor a sequence of strings, or columns differ in length.
        """
        frozen = tuple(tuple(_cell(name, i, cell) for i, cell in enumerate(column)) for name, column in columns.items())
        count = len(frozen[0]) if frozen else 0
        return cls(tuple(columns), frozen, (source,) * count, (0,) * count)

    @property
    def source(self) -> str:
        """The files the rows came from, in order of appearance, joined by `+`."""
        return "+".join(dict.fromkeys(self.files)) or MEMORY

    @property
    def skipped(self) -> int:
        """Number of malformed rows that were skipped on request."""
        return len(self.bad)

    @property
    def digest(self) -> str:
        """sha256 over column names and cells in row order; file names, formats and column order do not enter."""
        state = hashlib.sha256(b"intarsia.table.1")
        for name, column in sorted(zip(self.names, self.columns)):
            state.update(_framed(name) + b"c%d:" % len(column))
            for cell in column:
                state.update(_framed(cell) if isinstance(cell, str) else b"t%d:" % len(cell) + b"".join(map(_framed, cell)))
        return state.hexdigest()

    def where(self, row: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.files[row]}:{self.lines[row]}" if self.lines[row] else f"{self.files[row]} row {row + 1}"

    def column(self, name: str) -> tuple[Cell, ...]:
        """Cells of one column.

        Raises:
            DataError: no such column; the message suggests the nearest name.
        """
        if name not in self.names:
            raise DataError(
                f"{self.source} has no column {name!r}{nearest(name, self.names)} "
                f"its columns are: {listing(map(repr, self.names))}"
            )
        return self.columns[self.names.index(name)]

    def texts(self, name: str) -> tuple[str, ...]:
        """A column of strings; raises DataError if its cells are lists of tokens."""
        column = self.column(name)
        if column and not isinstance(column[0], str):
            raise DataError(f"column {name!r} of {self.source} holds lists of tokens; a column of text was expected")
        return column  # type: ignore[return-value]

    def tokens(self, name: str) -> tuple[tuple[str, ...], ...]:
        """A column of token tuples; raises DataError if its cells are plain strings."""
        column = self.column(name)
        if column and isinstance(column[0], str):
            raise DataError(
                f"column {name!r} of {self.source} holds plain text; lists of tokens were expected "
                f"(read token files with --format conll, iob2 or conllu)"
            )
        return column  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[dict[str, Cell]]:
        return (dict(zip(self.names, cells)) for cells in zip(*self.columns))

    @overload
    def __getitem__(self, key: str) -> tuple[Cell, ...]: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Cell]: ...
    @overload
    def __getitem__(self, key: slice) -> Table: ...
    def __getitem__(self, key: str | int | slice) -> tuple[Cell, ...] | dict[str, Cell] | Table:
        if isinstance(key, str):
            return self.column(key)
        if isinstance(key, slice):
            return self.select(range(len(self))[key])
        return {name: column[key] for name, column in zip(self.names, self.columns)}

    def select(self, rows: Iterable[int]) -> Table:
        """The given rows, in the given order (repeats allowed)."""
        rows = tuple(rows)
        return Table(
            self.names,
            tuple(tuple(column[i] for i in rows) for column in self.columns),
            tuple(self.files[i] for i in rows),
            tuple(self.lines[i] for i in rows),
        )

    def only(self, *names: str) -> Table:
        """The given columns, in the given order."""
        return Table(names, tuple(map(self.column, names)), self.files, self.lines, self.bad, self.renormalised)

    def rename(self, names: Mapping[str, str]) -> Table:
        """The same table with columns renamed, `{old: new}`."""
        for old in names:
            self.column(old)
        renamed = tuple(names.get(name, name) for name in self.names)
        return Table(renamed, self.columns, self.files, self.lines, self.bad, self.renormalised)


def concat(tables: Sequence[Table]) -> Table:
    """Rows of several tables one after the other; the columns must have the same names.

    Raises:
        DataError: no table was given, or a column is not in all of them.
    """
    if not tables:
        raise DataError("concat needs at least one table")
    first = tables[0]
    for other in tables[1:]:
        if set(other.names) != set(first.names):
            raise DataError(
                f"cannot join {first.source} (columns {listing(map(repr, first.names))}) "
                f"and {other.source} (columns {listing(map(repr, other.names))}): the columns differ"
            )
    return Table(
        first.names,
        tuple(tuple(cell for table in tables for cell in table.column(name)) for name in first.names),
        tuple(file for table in tables for file in table.files),
        tuple(line for table in tables for line in table.lines),
        tuple(message for table in tables for message in table.bad),
        sum(table.renormalised for table in tables),
    )


def _framed(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"s%d:" % len(encoded) + encoded


def _cell(name: str, row: int, cell: object) -> Cell:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (list, tuple)) and all(isinstance(token, str) for token in cell):
        return tuple(cell)
    raise DataError(
        f"column {name!r}, row {row + 1}: {cell!r} is not a string or a list of strings; "
        f"convert it with str() where the table is made"
    )


def _check_cells(name: str, column: Sequence[object]) -> None:
    """All cells are strings, or all are tuples."""
    kinds = set(map(type, column))
    if not (kinds <= {str} or kinds <= {tuple}):
        raise DataError(f"column {name!r} mixes {listing(sorted(kind.__name__ for kind in kinds))}; cells must be of one kind")
