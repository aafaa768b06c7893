"""`read`: one function for all file formats, strict by default.

Strict means: UTF-8 unless told otherwise, every row has the shape of the first, nothing is converted, guessed or dropped
silently.  The first malformed row is an error with file, line, column and text; `skip_bad=N` skips up to N of them, counts
them and keeps their messages in `Table.bad`.  Text is brought to Unicode NFC unless told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from intarsia._registry import Registry
from intarsia.data.conll import CONLL, CONLL_U, IOB2
from intarsia.data.delimited import CSV, TSV
from intarsia.data.jsonl import JSONL
from intarsia.data.layout import Columns, Format, Options, Row, parse_columns
from intarsia.data.plain import PARALLEL, TEXT
from intarsia.data.source import Bad, Limits, Lines, check_form, read_lines
from intarsia.data.source import normalise as normalise_text
from intarsia.data.table import Cell, Table
from intarsia.errors import DataError, UsageError, listing

PathLike = str | os.PathLike[str]

FORMATS: Registry[Format] = Registry("format")
for _format in (CSV, TSV, JSONL, CONLL, IOB2, CONLL_U, TEXT, PARALLEL):
    FORMATS.add(_format.name, _format)


def read(
    path: PathLike | Sequence[PathLike],
    *,
    format: str | None = None,
    columns: str | Sequence[str] | Mapping[str, str | int] | None = None,
    encoding: str = "utf-8",
    normalise: str = "NFC",
    skip_bad: int = 0,
    header: bool | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    numeric: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Table:
    """Read a file into a table of strings.

    Args:
        path: a file, `"-"` for standard input, or two line-aligned files (parallel text).
        format: csv, tsv, jsonl, conll, iob2, conllu, text or parallel; by default what the file name says.
        columns: which columns to keep, and what to call them: names, `{name: name or position in the file}`, or the text
            `"text=sentence,label=3"` (positions count from 0).  Without a header, bare names name all fields in order.
        encoding: how the file is encoded; never guessed.
        normalise: NFC, NFD, NFKC, NFKD or none.
        skip_bad: how many malformed rows may be skipped.
        header: the first line names the columns (default: yes for csv and tsv, no for parallel).
        delimiter, quoting: change what csv and tsv mean.
        numeric: columns in which JSON numbers are accepted; they are kept as written.
        limits: see `Limits`.

    Raises:
        DataError: the file is missing, malformed or empty; the message names file, line and column.
        UsageError: an option is unknown or means nothing to this format.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    kind = FORMATS[format or _format_of(paths)]
    check_form(normalise)
    if skip_bad < 0:
        raise UsageError(f"skip_bad={skip_bad} must not be negative")
    if not 1 <= len(paths) <= kind.most_files:
        raise UsageError(f"format {kind.name!r} reads {kind.most_files} file(s) at a time, found {len(paths)}; join tables with concat")
    said = {"header": header, "delimiter": delimiter, "quoting": quoting, "numeric": frozenset(numeric) or None}
    useless = [name for name, value in said.items() if value is not None and name not in kind.takes]
    if useless:
        raise UsageError(f"{useless[0]}= means nothing to the format {kind.name!r} (it takes: {listing(['columns', *sorted(kind.takes)])})")
    options = Options(_normalised(parse_columns(columns), normalise), header, delimiter, quoting, frozenset(numeric), normalise)
    files = [read_lines(one, encoding, limits) for one in paths]
    names, rows = kind.parse(files, options)
    return _collect(files[0], names, rows, normalise, skip_bad)


def _format_of(paths: Sequence[PathLike]) -> str:
    """The format a file name stands for."""
    if len(paths) == 2:
        return PARALLEL.name
    suffix = Path(paths[0]).suffix.lower() if paths else ""
    for kind in FORMATS.values():
        if suffix in kind.suffixes:
            return kind.name
    hint = "; a .json file is read if it has one object per line: --format jsonl" if suffix == ".json" else ""
    raise UsageError(
        f"{os.fspath(paths[0]) if paths else 'no file'}: the name does not say which format this is; "
        f"say --format with one of {listing(FORMATS)}{hint}"
    )


def _normalised(columns: Columns | None, form: str) -> Columns | None:
    """Column names a user types are normalised like the file's."""
    return columns and tuple(
        (normalise_text(new, form), normalise_text(old, form) if isinstance(old, str) else old) for new, old in columns
    )


def _collect(lines: Lines, names: tuple[str, ...], rows: Iterator[Row | Bad], form: str, skip_bad: int) -> Table:
    """Normalise rows, count the bad ones and build the table."""
    bad: list[str] = []
    numbers: list[int] = []
    kept: list[tuple[Cell, ...]] = []
    changed = 0
    for row in rows:
        if isinstance(row, Bad):
            bad.append(row.message(lines.name))
            if len(bad) > skip_bad:
                raise DataError(bad[-1] + _advice(len(bad), skip_bad))
            continue
        cells = tuple(_normalised_cell(cell, form) for cell in row[1])
        changed += cells != row[1]
        numbers.append(row[0])
        kept.append(cells)
    if not kept:
        raise DataError(f"{lines.name}: no rows{f' left, {len(bad)} were malformed and skipped' if bad else ''}")
    return Table(names, tuple(zip(*kept)), (lines.name,) * len(kept), tuple(numbers), tuple(bad), changed)


def _normalised_cell(cell: Cell, form: str) -> Cell:
    return normalise_text(cell, form) if isinstance(cell, str) else tuple(normalise_text(token, form) for token in cell)


def _advice(count: int, skip_bad: int) -> str:
    if count == 1:
        return " (correct the file, or skip up to N malformed rows with --skip-bad N)"
    return f" (malformed row {count}, --skip-bad {skip_bad} allows {skip_bad})"
