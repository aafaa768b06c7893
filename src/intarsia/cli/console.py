"""`Console`: what a verb prints.  Results go to standard output, everything about the way there to standard error.

With `--json` a verb prints exactly one JSON document and no tables.  Output is plain text unless it goes to a terminal;
`NO_COLOR` switches colours off (rich and typer heed it).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from intarsia.errors import IntarsiaError

#: columns of a table that is not shown on a terminal: wide enough that nothing is ever wrapped or cut
UNLIMITED = 10_000

Align = Literal["left", "right"]


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream can show every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at the stream."""
    return bool(getattr(stream, "isatty", lambda: False)())


@dataclass(frozen=True, slots=True)
class Console:
    """Where a verb prints.

    Attributes:
        json: print one JSON document instead of text.
        quiet: leave out everything but results and errors.
        debug: let exceptions through with their traceback.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def result(self, payload: Mapping[str, Any] | Sequence[Any], human: Callable[[], None]) -> None:
        """Print a verb's result: `payload` as JSON, or what `human` prints."""
        if self.json:
            self.document(payload)
        else:
            human()

    def document(self, payload: Any) -> None:
        """Print a JSON document; characters are escaped where the stream could not hold them."""
        text = json.dumps(payload, indent=2, ensure_ascii=not is_utf8(sys.stdout), default=_plain, allow_nan=False)
        sys.stdout.write(text + "\n")

    def records(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Print one JSON object per line."""
        from intarsia.data import json_line

        for row in rows:
            text = json_line(row) if is_utf8(sys.stdout) else json.dumps(row, allow_nan=False)
            sys.stdout.write(text + "\n")

    def line(self, text: str = "") -> None:
        """Print a line of the result, at once: it may be long until the next."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something about the way to the result, on standard error; not with `--quiet`."""
        if not self.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """A warning, on standard error, whatever the options."""
        sys.stderr.write(f"warning: {text}\n")
        sys.stderr.flush()

    def heading(self, text: str) -> None:
        """A line above a table, with a blank line before it."""
        self.line()
        self.line(text)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table; columns that hold only numbers are set to the right."""
        self.line(table_text(head, rows, terminal=is_terminal(sys.stdout)))


def table_text(head: Sequence[str], rows: Iterable[Sequence[object]], *, terminal: bool = False) -> str:
    """A table as text.  On a terminal it fits its width and has a bold head; elsewhere lines are as long as they need.

    Args:
        head: names of the columns.
        rows: cells; None is shown as `-`.
    """
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    cells = [[shown(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, align in zip(head, alignments(len(head), cells)):
        table.add_column(name, justify=align, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    console = RichConsole(
        file=stream, width=None if terminal else UNLIMITED, force_terminal=terminal or None, highlight=False, emoji=False, markup=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def alignments(columns: int, rows: Sequence[Sequence[str]]) -> list[Align]:
    """`right` for the columns in which every cell is a number, a percentage, a size or missing."""
    return ["right" if rows and all(_numeric(row[i]) for row in rows) else "left" for i in range(columns)]


def _numeric(text: str) -> bool:
    return text in ("-", "") or text[0].isdigit() or (text[0] in "+-" and text[1:2].isdigit())


def shown(cell: object) -> str:
    """A cell as text: thousands are separated, None is a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def size_text(count: int) -> str:
    """A number of bytes for people: `612 kB`, `1.2 MB` (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count} B"


def _plain(value: object) -> object:
    """What JSON does not know: paths, tuples' kin, mappings that are no dictionaries."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, IntarsiaError):
        return str(value)
    return str(value)
