"""Comma- and tab-separated files.

csv: double quotes enclose fields (RFC 4180: a quote inside is doubled, a line end inside is kept as it is); a stray
quote is an error.  tsv: tabs separate fields and *quotes are text*, as in SST-2, SIB-200 and most corpora; there are no
escapes.  Both take `delimiter=` and `quoting=` to be changed.  Blank lines at the end of the file are ignored; elsewhere
they are malformed rows (but an empty cell where the file has one column).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from intarsia.data.layout import Format, Options, Parsed, Row, choose, choose_positions
from intarsia.data.source import Bad, Lines, normalise
from intarsia.errors import DataError, UsageError, listing


@dataclass(frozen=True, slots=True)
class Record:
    """Fields of one row, the index of its first line and the 1-based column each field starts at (0: another line)."""

    index: int
    fields: tuple[str, ...]
    starts: tuple[int, ...]


def _delimited(files: Sequence[Lines], options: Options, delimiter: str, quoting: bool) -> Parsed:
    (lines,) = files
    delimiter = options.delimiter or delimiter
    if len(delimiter) != 1 or delimiter in '"\n\r\0':
        raise UsageError(f"delimiter={delimiter!r} must be one character other than a quote or a line end")
    records = _records(lines, delimiter, quoting if options.quoting is None else options.quoting)
    first = next(records)
    if isinstance(first, Bad):
        raise DataError(first.message(lines.name) + " (the first line cannot be skipped)")
    place = f"{lines.name}:{first.index + 1}"
    width = len(first.fields)
    if options.header is False:
        if options.columns is None:
            raise UsageError(f"{lines.name}: a file without a header needs its columns named, e.g. --columns text,label")
        names, positions = choose_positions(options.columns, width, place)
        return names, _pick(lines, records, positions, width, first)
    if len(lines.texts) == 1 or (not any(lines.texts[1:]) and width > 1):
        raise DataError(f"{place}: the file holds a header ({listing(map(repr, first.fields))}) and no rows")
    hint = "; if the first line is not a header, say --no-header and name the columns in order"
    header = tuple(normalise(field, options.form) for field in first.fields)
    names, positions = choose(options.columns, header, place, hint)
    return names, _pick(lines, records, positions, width, None)


def _pick(
    lines: Lines, records: Iterator[Record | Bad], positions: tuple[int, ...], width: int, first: Record | None
) -> Iterator[Row | Bad]:
    """Chosen fields of each record that has the right number of them."""
    if first:
        yield first.index + 1, tuple(first.fields[p] for p in positions)
    last = max((i for i, text in enumerate(lines.texts) if text), default=-1)
    for record in records:
        if isinstance(record, Bad):
            yield record
        elif len(record.fields) == width:
            yield record.index + 1, tuple(record.fields[p] for p in positions)
        elif record.fields != ("",) or record.index < last:
            yield _ragged(lines, record, width)


def _ragged(lines: Lines, record: Record, width: int) -> Bad:
    text, found = lines.texts[record.index], len(record.fields)
    if not text:
        return Bad(record.index + 1, 1, "a blank line between rows", text)
    column = record.starts[width] if found > width else (len(text) + 1 if all(record.starts) else 0)
    return Bad(record.index + 1, column, f"{found} field{'s' * (found != 1)} where the first line has {width}", text)


def _records(lines: Lines, delimiter: str, quoting: bool) -> Iterator[Record | Bad]:
    index = 0
    while index < len(lines.texts):
        text = lines.texts[index]
        if problem := lines.problem(index, allow_cr=quoting):
            yield problem
        elif quoting and ('"' in text or "\r" in text):
            found, after = _quoted(lines, index, delimiter)
            if isinstance(found, Record) and len(found.fields) > lines.limits.fields:
                yield _too_many(lines, index, len(found.fields))
            else:
                yield found
            index = after
            continue
        else:
            fields = tuple(text.split(delimiter))
            if len(fields) > lines.limits.fields:
                yield _too_many(lines, index, len(fields))
            else:
                yield Record(index, fields, _starts(fields))
        index += 1


def _too_many(lines: Lines, index: int, count: int) -> Bad:
    return Bad(index + 1, 0, f"{count} fields, the limit is {lines.limits.fields}", lines.texts[index])


def _starts(fields: Sequence[str]) -> tuple[int, ...]:
    starts, at = [], 1
    for field in fields:
        starts.append(at)
        at += len(field) + 1
    return tuple(starts)


def _quoted(lines: Lines, index: int, delimiter: str) -> tuple[Record | Bad, int]:
    """One record with quotes, and the index of the line after it (after its first line, if it is malformed)."""
    fields: list[str] = []
    starts: list[int] = []
    row, at = index, 0
    while True:
        text = lines.texts[row]
        starts.append(at + 1 if row == index else 0)
        if text.startswith('"', at):
            closed = _quoted_field(lines, index, row, at)
            if isinstance(closed, Bad):
                return closed, index + 1
            opened = f"line {row + 1}, column {at + 1}"
            field, row, at = closed
            text = lines.texts[row]
            fields.append(field)
            if at < len(text) and text[at] != delimiter:
                what = f'text after a closing quote (the field opens in {opened}); inside a field a quote is written ""'
                return Bad(row + 1, at + 1, what, text), index + 1
        else:
            stop = text.find(delimiter, at)
            stop = len(text) if stop < 0 else stop
            field = text[at:stop]
            for sign, what in (
                ('"', "a quote inside an unquoted field: quote the whole field, or read quotes as text with --no-quoting"),
                ("\r", "a carriage return inside a line"),
            ):
                if sign in field:
                    return Bad(row + 1, at + field.index(sign) + 1, what, text), index + 1
            fields.append(field)
            at = stop
        if at == len(text):
            return Record(index, tuple(fields), tuple(starts)), row + 1
        at += 1


def _quoted_field(lines: Lines, index: int, row: int, at: int) -> tuple[str, int, int] | Bad:
    """The field whose opening quote is at `lines.texts[row][at]`, and the line and position after its closing quote."""
    opened_row, opened_at = row, at
    text, at = lines.texts[row], at + 1
    parts: list[str] = []
    size = sum(map(len, lines.texts[index : row + 1]))
    while True:
        quote = text.find('"', at)
        if quote >= 0 and text.startswith('""', quote):
            parts.append(text[at : quote + 1])
            at = quote + 2
        elif quote >= 0:
            parts.append(text[at:quote])
            return "".join(parts), row, quote + 1
        else:
            parts.append(text[at:] + lines.ends[row])
            row, at = row + 1, 0
            if row == len(lines.texts):
                return Bad(opened_row + 1, opened_at + 1, "unbalanced quote: it is never closed", lines.texts[opened_row])
            size += len(lines.texts[row])
            if size > lines.limits.line_chars:
                what = f"unbalanced quote: not closed within {lines.limits.line_chars} characters"
                return Bad(opened_row + 1, opened_at + 1, what, lines.texts[opened_row])
            if problem := lines.problem(row, allow_cr=True):
                return problem
            text = lines.texts[row]


_TAKES = frozenset({"header", "delimiter", "quoting"})
CSV = Format("csv", "comma-separated, quoted fields, header", (".csv",), lambda f, o: _delimited(f, o, ",", True), _TAKES)
TSV = Format(
    "tsv", "tab-separated, quotes are text, header", (".tsv", ".tab"), lambda f, o: _delimited(f, o, "\t", False), _TAKES
)
