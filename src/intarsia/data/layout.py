"""What all formats share: the options of a reader, the shape of its answer and the choice of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from intarsia.data.source import Bad, Lines
from intarsia.data.table import Cell
from intarsia.errors import DataError, UsageError, listing, nearest

#: `(name in the table, name or position in the file)`
Columns = tuple[tuple[str, str | int], ...]
Row = tuple[int, tuple[Cell, ...]]
Parsed = tuple[tuple[str, ...], Iterator[Row | Bad]]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may say about a file; None means the format's own default.

    Attributes:
        columns: the columns to keep and what to call them.
        header: the first line names the columns.
        delimiter: one character between fields.
        quoting: double quotes enclose fields (otherwise they are text).
        numeric: columns whose JSON numbers are accepted (and kept as written, as strings).
        form: Unicode normalisation, which names in the file get too.
    """

    columns: Columns | None = None
    header: bool | None = None
    delimiter: str | None = None
    quoting: bool | None = None
    numeric: frozenset[str] = frozenset()
    form: str = "NFC"


@dataclass(frozen=True, slots=True)
class Format:
    """One file format.

    Attributes:
        name: as in `--format`.
        summary: one line for the documentation.
        suffixes: file names that mean this format.
        parse: `(files, options) -> (column names, rows)`; rows that are malformed come as `Bad`.
        takes: names of the options that mean something to it, besides `columns`.
        most_files: how many line-aligned files it may be given.
    """

    name: str
    summary: str
    suffixes: tuple[str, ...]
    parse: Callable[[Sequence[Lines], Options], Parsed]
    takes: frozenset[str] = frozenset()
    most_files: int = 1


def parse_columns(columns: str | Sequence[str] | Mapping[str, str | int] | None) -> Columns | None:
    """The `columns` argument in its one inner form.

    Args:
        columns: None for all; names; `{name: name or position in the file}`; or the text form of the command line,
            `"text=sentence,label=3"`.

    Raises:
        UsageError: empty, a name twice, or not of these kinds.
    """
    if columns is None:
        return None
    pairs: list[tuple[str, str | int]]
    if isinstance(columns, str):
        halves = [part.partition("=") for part in columns.split(",")]
        pairs = [(new.strip(), (old if equals else new).strip()) for new, equals, old in halves]
    elif isinstance(columns, Mapping):
        pairs = list(columns.items())
    else:
        pairs = [(name, name) for name in columns]
    names = [new for new, _ in pairs]
    if not pairs or not all(isinstance(new, str) and new and old != "" for new, old in pairs) or len(set(names)) < len(names):
        raise UsageError(f"columns={columns!r} is not a list of distinct names such as 'text,label' or 'text=sentence,label=3'")
    return tuple(pairs)


def choose(columns: Columns | None, header: Sequence[str], place: str, hint: str = "") -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and positions of the chosen columns of a file that names its columns.

    Raises:
        DataError: a name occurs twice in the header, a chosen one is missing, or a column to be kept has no name.
    """
    named = [name for name in header if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise DataError(f"{place}: the header has {listing(map(repr, twice))} more than once")
    if columns is None:
        if len(named) < len(header):
            raise DataError(
                f"{place}: column {list(header).index('') + 1} of {len(header)} has no name in the header; "
                f"say which columns to keep, e.g. --columns {','.join(named[:2]) or 'text=0'}"
            )
        return tuple(header), tuple(range(len(header)))
    return tuple(new for new, _ in columns), tuple(_position(old, header, place, hint) for _, old in columns)


def choose_positions(columns: Columns, width: int, place: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The same for a file without a header: bare names name all fields in order, `name=3` takes field 3 (from 0).

    Raises:
        DataError: the file has fewer or more fields.
        UsageError: names and positions are mixed.
    """
    names = tuple(new for new, _ in columns)
    if all(new == old for new, old in columns):
        if len(columns) != width:
            raise DataError(
                f"{place}: {width} fields, but columns= names {len(columns)} ({listing(map(repr, names))}); "
                f"name all fields in order, or pick some by position, e.g. --columns text=0,label={width - 1}"
            )
        return names, tuple(range(width))
    positions = [old if isinstance(old, int) else _integer(old) for _, old in columns]
    if None in positions:
        raise UsageError(f"the file has no header: columns={dict(columns)!r} must give positions, e.g. --columns text=0,label=1")
    return names, tuple(_in_range(p, width, place) for p in positions if p is not None)


def _position(wanted: str | int, header: Sequence[str], place: str, hint: str) -> int:
    if isinstance(wanted, int):
        return _in_range(wanted, len(header), place)
    if wanted in header:
        return list(header).index(wanted)
    named = [name for name in header if name]
    raise DataError(f"{place}: no column {wanted!r}{nearest(wanted, named)} its columns are: {listing(map(repr, named))}{hint}")


def _in_range(position: int, width: int, place: str) -> int:
    if not -width <= position < width:
        raise DataError(f"{place}: no field {position}: the line has {width} fields (0 ... {width - 1})")
    return position % width


def _integer(text: str) -> int | None:
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None
