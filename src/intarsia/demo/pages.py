"""Tables as markdown, for the demo's report and the generated pages of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def page_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; None is a dash, whole numbers are grouped, columns of numbers are set to the right."""
    text = [["-" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    right = [all(row[i][:1].isdigit() or row[i] in ("-", "") for row in text) for i in range(len(head))]
    return "\n".join([_line(head), "|" + "".join("---:|" if r else "---|" for r in right), *map(_line, text)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
