"""Writing tables: the inverse of `read` for each format.

A format that cannot hold a text (a tab in a tsv cell, a blank in a CoNLL token) refuses it; nothing is escaped or
replaced behind the reader's back.  The file is written beside its place and moved there, so that a reader never sees half.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from intarsia.data.table import Cell, Table
from intarsia.errors import DataError, StoreError, UsageError, listing, nearest


def write(table: Table, path: str | os.PathLike[str], *, format: str | None = None) -> None:
    """Write a table as csv, tsv, jsonl, conll or text; `read` with the same format gives it back.

    Raises:
        DataError: a cell cannot be held by the format.
        UsageError: the format cannot be written.
        StoreError: the file cannot be written.
    """
    name = format or Path(path).suffix.lower().removeprefix(".").replace("txt", "text")
    if name not in _WRITERS:
        raise UsageError(f"cannot write the format {name!r}{nearest(name, _WRITERS)} known: {listing(_WRITERS)}")
    write_lines(path, _readable(_WRITERS[name](table), name))


def _readable(lines: Iterator[str], format: str) -> Iterator[str]:
    """Refuse what `read` refuses or would change: NUL, and U+FEFF in front of the file."""
    for i, line in enumerate(lines):
        if "\0" in line or (format == "jsonl" and "\\u0000" in line):
            raise DataError(f"{format} cannot hold NUL; found: {line!r:.80}")
        if i == 0 and line.startswith("\ufeff"):
            raise DataError(f"the file would begin with U+FEFF, which readers take for a byte order mark; found: {line!r:.80}")
        yield line


def write_jsonl(rows: Iterable[Mapping[str, object]], path: str | os.PathLike[str]) -> None:
    """Write rows of JSON values (predictions with their numbers); NaN and infinities are refused."""
    write_lines(path, (json_line(row) for row in rows))


def json_line(row: Mapping[str, object]) -> str:
    """One row as a line of JSON, without its end; U+2028 and its like are escaped so that no reader splits the line.

    Raises:
        DataError: a value is not JSON (NaN, infinity, an object).
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON: {error}; found: {row!r:.200}") from None
    for char in "\u0085\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines with `\\n` ends, atomically: a temporary file beside the target, synced and moved into place."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            for line in lines:
                stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except UnicodeEncodeError as error:
        raise DataError(f"{target}: half of a surrogate pair cannot be written: {error.object[error.start - 10 : error.end + 10]!r}") from None
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _csv(table: Table) -> Iterator[str]:
    yield ",".join(map(_quoted, table.names))
    for row in _string_rows(table, "csv"):
        yield ",".join(map(_quoted, row))


def _quoted(text: str) -> str:
    plain = text and not any(char in text for char in '",\r\n')
    return text if plain else '"' + text.replace('"', '""') + '"'


def _tsv(table: Table) -> Iterator[str]:
    for row in (table.names, *_string_rows(table, "tsv")):
        for text in row:
            _refuse(text, "\t\n\r", "tsv", "write csv or jsonl")
        yield "\t".join(row)


def _jsonl(table: Table) -> Iterator[str]:
    return (json_line({name: cell if isinstance(cell, str) else list(cell) for name, cell in row.items()}) for row in table)


def _text(table: Table) -> Iterator[str]:
    if len(table.names) != 1:
        raise DataError(f"plain text has one column, the table has {listing(map(repr, table.names))}; choose with table.only(...)")
    for (text,) in _string_rows(table, "text"):
        _refuse(text, "\n\r", "text", "write csv or jsonl")
        yield text


def _conll(table: Table) -> Iterator[str]:
    for name in table.names:
        table.tokens(name)
    if len(table.names) < 2:
        raise DataError(f"conll needs a column of tokens and one of tags, the table has {listing(map(repr, table.names))}")
    for i, sentence in enumerate(zip(*table.columns)):
        if len(set(map(len, sentence))) != 1 or not sentence[0]:
            raise DataError(f"{table.where(i)}: columns of {listing(str(len(cell)) for cell in sentence)} tokens; equal and at least 1 expected")
        for fields in zip(*sentence):
            for text in fields:
                _refuse(text, "\t\n\r", "conll", "write jsonl")
            if not all(text.strip(" ") for text in fields) or fields[0] == "-DOCSTART-":
                raise DataError(f"{table.where(i)}: {fields!r} would be read as a blank line or a document mark; write jsonl")
            yield "\t".join(fields)
        yield ""


def _string_rows(table: Table, format: str) -> Iterator[tuple[str, ...]]:
    for name in table.names:
        if table.column(name) and not isinstance(table.column(name)[0], str):
            raise DataError(f"column {name!r} holds lists of tokens, which {format} cannot hold; write conll or jsonl")
    rows: Iterator[tuple[Cell, ...]] = zip(*table.columns)
    for row in rows:
        yield tuple(str(cell) for cell in row)


def _refuse(text: str, signs: str, format: str, advice: str) -> None:
    found = [sign for sign in signs if sign in text]
    if found:
        raise DataError(f"{format} cannot hold {found[0]!r} inside a field; {advice}; found: {text!r:.80}")


_WRITERS: dict[str, Callable[[Table], Iterator[str]]] = {"csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "text": _text, "conll": _conll}
