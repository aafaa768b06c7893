"""JSON lines: one object per line, values that are strings or lists of strings.

Numbers, booleans and null are not text: whoever wrote `1` may have meant `"1"`, `"01"` or `1.0`, so they are refused
with advice, except numbers in a column declared numeric, which are kept exactly as written.  Duplicate keys, lone
surrogates, NUL and NaN are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from intarsia.data.layout import Columns, Format, Options, Parsed, Row
from intarsia.data.source import Bad, Lines, normalise
from intarsia.data.table import Cell
from intarsia.errors import DataError, UsageError, listing, nearest


class _Number(str):
    """A JSON number, as it is written."""


class _Refused(ValueError):
    """A value is legal JSON but not legal here."""


def _parse(files: Sequence[Lines], options: Options) -> Parsed:
    (lines,) = files
    columns = options.columns or _first_keys(lines, options.form)
    for _, old in columns:
        if not isinstance(old, str):
            raise UsageError(f"{lines.name}: JSON lines have keys, not positions; columns= must name keys, found {old!r}")
    unknown = sorted(options.numeric - {new for new, _ in columns})
    if unknown:
        raise UsageError(f"numeric={unknown[0]!r} is not a column{nearest(unknown[0], [new for new, _ in columns])}")
    return tuple(new for new, _ in columns), _rows(lines, columns, options)


def _first_keys(lines: Lines, form: str) -> Columns:
    """Keys of the first well-formed object."""
    for index in range(len(lines.texts)):
        found = None if lines.problem(index) else _load(lines, index, form)
        if isinstance(found, dict) and found:
            return tuple((key, key) for key in found)
    raise DataError(f"{lines.name}: no line is a JSON object with keys; JSON lines have one object per line")


def _rows(lines: Lines, columns: Columns, options: Options) -> Iterator[Row | Bad]:
    last = max((i for i, text in enumerate(lines.texts) if text.strip(" \t")), default=-1)
    kinds: dict[str, type] = {}
    for index, text in enumerate(lines.texts[: last + 1]):
        found = lines.problem(index) or _load(lines, index, options.form)
        if isinstance(found, Bad):
            yield found
            continue
        try:
            if options.columns is None:
                _refuse_extra(found, columns)
            cells = tuple(_cell(found, new, str(old), options.numeric, kinds) for new, old in columns)
            if "\\u" in text:
                _refuse_unfit(cells, columns)
        except _Refused as error:
            yield Bad(index + 1, _column(text, error.args[0]), error.args[1], text)
        else:
            kinds.update({new: type(cell) for (new, _), cell in zip(columns, cells)})
            yield index + 1, cells


def _load(lines: Lines, index: int, form: str) -> dict[str, object] | Bad:
    text = lines.texts[index]
    if not text.strip(" \t"):
        return Bad(index + 1, 1, "a blank line between rows", text)
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        return Bad(index + 1, error.pos + 1, f"not JSON: {error.msg}", text)
    except _Refused as error:
        return Bad(index + 1, _column(text, error.args[0]), error.args[1], text)
    except RecursionError:
        return Bad(index + 1, 0, "JSON is nested too deeply", text)
    if not isinstance(found, dict):
        return Bad(index + 1, 1, f"a JSON object was expected, this is a {_kind(found)}", text)
    if len(found) > lines.limits.fields:
        return Bad(index + 1, 0, f"{len(found)} keys, the limit is {lines.limits.fields}", text)
    normal = {normalise(key, form): value for key, value in found.items()}
    return normal if len(normal) == len(found) else Bad(index + 1, 0, f"two keys are the same after {form}", text)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(twice, f"the key {twice!r} occurs twice in one object")
    return found


def _no_constant(name: str) -> object:
    raise _Refused(name, f"{name} is not JSON")


def _refuse_extra(found: dict[str, object], columns: Columns) -> None:
    known = [old for _, old in columns]
    extra = [key for key in found if key not in known]
    if extra:
        what = f"the key {extra[0]!r} is not in the first row (its keys: {listing(map(repr, known))}); say --columns to ignore it"
        raise _Refused(extra[0], what)


def _cell(found: dict[str, object], new: str, key: str, numeric: frozenset[str], kinds: dict[str, type]) -> Cell:
    if key not in found:
        raise _Refused("", f"no key {key!r}{nearest(key, found)} the keys are: {listing(map(repr, found))}")
    value = found[key]
    cell: Cell
    if isinstance(value, _Number):
        if new not in numeric:
            what = f'{key!r} is a number; write it as "{value}" in quotes, or declare the column with --numeric {new}'
            raise _Refused(key, what)
        cell = str(value)
    elif isinstance(value, str):
        cell = value
    elif isinstance(value, list) and all(isinstance(item, str) and not isinstance(item, _Number) for item in value):
        cell = tuple(value)
    else:
        advice = "write it in quotes" if isinstance(value, bool) else "a string or a list of strings was expected"
        raise _Refused(key, f"{key!r} is a {_kind(value)}: {advice}, or leave the column out with --columns")
    if kinds.get(new, type(cell)) is not type(cell):
        raise _Refused(key, f"{key!r} is a {_kind(value)}, in the rows before it is a {'string' if isinstance(cell, tuple) else 'list'}")
    return cell


def _refuse_unfit(cells: Sequence[Cell], columns: Columns) -> None:
    """Escapes can bring in characters that no text file can hold."""
    for (_, key), cell in zip(columns, cells):
        text = cell if isinstance(cell, str) else "".join(cell)
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise _Refused(str(key), f"{key!r} holds NUL or half of a surrogate pair, written as an escape")


def _kind(value: object) -> str:
    if isinstance(value, _Number):
        return "number"
    kinds: dict[type, str] = {str: "string", bool: "boolean", dict: "object", type(None): "null"}
    if isinstance(value, list):
        others = {_kind(item) for item in value} - {"string"}
        return f"list with a {others.pop()} in it" if others else "list"
    return kinds.get(type(value), type(value).__name__)


def _column(text: str, key: str) -> int:
    """Where a key or a word stands in the line; 0 if it is written with escapes."""
    quoted = text.find(json.dumps(key, ensure_ascii=False))
    return (quoted if quoted >= 0 else text.find(key)) + 1 if key else 0


JSONL = Format("jsonl", "one JSON object per line", (".jsonl", ".ndjson"), _parse, frozenset({"numeric"}))
