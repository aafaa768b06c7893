"""Plain text, one sentence a line, and parallel text, two line-aligned files or one file with two tab-separated columns.

Blank lines are rows with an empty text: line numbers and alignment stay what they are; `check` counts empty texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from intarsia.data.delimited import TSV
from intarsia.data.layout import Columns, Format, Options, Parsed, Row
from intarsia.data.source import Bad, Lines
from intarsia.errors import DataError, UsageError


def _parse_text(files: Sequence[Lines], options: Options) -> Parsed:
    return _names(options.columns, ("text",)), _aligned(files)


def _parse_parallel(files: Sequence[Lines], options: Options) -> Parsed:
    if len(files) == 1:
        columns = options.columns or (None if options.header else (("source", "source"), ("target", "target")))
        names, rows = TSV.parse(files, replace(options, columns=columns, header=bool(options.header)))
        if len(names) != 2:
            raise DataError(f"{files[0].name}: parallel text has two columns, found {len(names)}; choose two with --columns")
        return names, rows
    first, second = files
    if options.header:
        raise UsageError("two line-aligned files have no header; header=True is for one tab-separated file")
    if len(first.texts) != len(second.texts):
        raise DataError(
            f"parallel files must have the same number of lines: {first.name} has {len(first.texts)}, "
            f"{second.name} has {len(second.texts)}"
        )
    return _names(options.columns, ("source", "target")), _aligned(files)


def _names(columns: Columns | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if columns is None:
        return default
    if len(columns) != len(default) or any(new != old for new, old in columns):
        raise UsageError(f"this format has {len(default)} column{'s' * (len(default) > 1)}; columns= may only name them, in order")
    return tuple(new for new, _ in columns)


def _aligned(files: Sequence[Lines]) -> Iterator[Row | Bad]:
    for index in range(len(files[0].texts)):
        problems = [(lines.name, problem) for lines in files if (problem := lines.problem(index))]
        if problems:
            name, problem = problems[0]
            prefix = f"in {name}: " if len(files) > 1 else ""
            yield Bad(problem.line, problem.column, prefix + problem.what, problem.text)
        else:
            yield index + 1, tuple(lines.texts[index] for lines in files)


TEXT = Format("text", "one sentence a line", (".txt",), _parse_text)
PARALLEL = Format("parallel", "two line-aligned files, or one with two columns", (), _parse_parallel, frozenset({"header"}), 2)
