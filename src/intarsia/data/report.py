"""What `check` found, as data and as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.errors import DataError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a count over the rows."""

    least: int
    median: float
    mean: float
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, counts: Iterable[int]) -> Lengths:
        """Of at least one count; `p95` is the smallest value that 95 % of the rows do not exceed."""
        ordered = sorted(counts)
        n = len(ordered)
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return cls(ordered[0], median, sum(ordered) / n, ordered[-(-95 * n // 100) - 1], ordered[-1], sum(ordered))


@dataclass(frozen=True, slots=True)
class CharacterUse:
    """A character worth a look: what it is, how often it occurs, and the first places."""

    code_point: str
    name: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What the tokenizer does to a split (lengths with special tokens)."""

    lengths: Lengths
    per_word: float
    unknown_pieces: int
    pieces: int
    unknown_words: int
    words: int
    truncated: int | None
    lacking: tuple[CharacterUse, ...]

    @property
    def unknown_share(self) -> float:
        """Share of the words that have a piece unknown to the tokenizer."""
        return self.unknown_words / self.words if self.words else 0.0


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split.

    Attributes:
        name: train, dev or test.
        source: its files.
        digest: digest of its content.
        rows: rows read.
        skipped: malformed rows that were skipped on request.
        renormalised: rows that Unicode NFC changes or changed.
        empty: rows in which a text is empty or only white space.
        duplicates: rows whose texts occur in an earlier row, exactly.
        near_duplicates: the same after normalisation (NFKC, case folding, without white space and punctuation).
        contradictions: distinct texts that occur with more than one label.
        contradiction_places: the first of them.
        labels: rows (for tags: tokens) per label; None without a label column or for numbers.
        words: words per row.
        pieces: None without a tokenizer.
        scripts: letters per script.
        invisible: zero-width and direction characters.
        invisible_rows: rows that have any.
    """

    name: str
    source: str
    digest: str
    rows: int
    skipped: int
    renormalised: int
    empty: int
    duplicates: int
    near_duplicates: int
    contradictions: int
    contradiction_places: tuple[str, ...]
    labels: Mapping[str, int] | None
    words: Lengths
    pieces: PieceReport | None
    scripts: Mapping[str, int]
    invisible: tuple[CharacterUse, ...]
    invisible_rows: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows of `second` whose texts occur in `first`, exactly and after normalisation."""

    first: str
    second: str
    exact: int
    normalised: int
    rows: int
    places: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the rows of `second` that occur in `first` after normalisation."""
        return self.normalised / self.rows


@dataclass(frozen=True, slots=True)
class DataReport:
    """The answer of `check`.

    Attributes:
        splits: one report per split.
        overlaps: one per pair of splits.
        max_length: pieces a row may have, if given.
        warnings: what should be looked at.
        errors: what makes a result meaningless; `require` raises them.
    """

    splits: tuple[SplitReport, ...]
    overlaps: tuple[Overlap, ...]
    max_length: int | None
    warnings: tuple[str, ...]
    errors: tuple[str, ...]

    def require(self, *, force: bool = False) -> None:
        """Raise DataError with all errors, unless `force`."""
        if self.errors and not force:
            raise DataError("; ".join(self.errors) + " (see: intarsia data check; --force goes on all the same)")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON; shares are included."""
        found = asdict(self)
        for overlap, row in zip(self.overlaps, found["overlaps"]):
            row["share"] = overlap.share
        for split, row in zip(self.splits, found["splits"]):
            if split.pieces:
                row["pieces"]["unknown_share"] = split.pieces.unknown_share
        return found

    def to_markdown(self) -> str:
        """The report as a page."""
        parts = [_split_table(self), _overlap_table(self), _label_table(self), _pieces_table(self), _characters(self)]
        parts += [_list("Errors", self.errors), _list("Warnings", self.warnings)]
        return "\n\n".join(["# Data check", *filter(None, parts)]) + "\n"


def _split_table(report: DataReport) -> str:
    head = ["split", "file", "rows", "skipped", "empty", "duplicates", "near duplicates", "contradictions", "changed by NFC",
            "words per row: median / 95 % / most", "scripts"]  # fmt: skip
    rows = [
        [s.name, s.source, s.rows, s.skipped, s.empty, s.duplicates, s.near_duplicates, s.contradictions, s.renormalised,
         f"{s.words.median:g} / {s.words.p95} / {s.words.most}", _shares(s.scripts)]
        for s in report.splits
    ]  # fmt: skip
    return _table(head, rows)


def _overlap_table(report: DataReport) -> str:
    rows = [[f"{o.second} in {o.first}", o.exact, o.normalised, percent(o.share), ", ".join(o.places)] for o in report.overlaps]
    return "## Overlap\n\n" + _table(["rows of", "exact", "normalised", "share", "first places"], rows) if rows else ""


def _label_table(report: DataReport) -> str:
    names = list(dict.fromkeys(name for s in report.splits for name in s.labels or ()))
    rows = [[f"`{name}`", *((s.labels or {}).get(name, 0) for s in report.splits)] for name in names]
    return "## Labels\n\n" + _table(["label", *(s.name for s in report.splits)], rows) if rows else ""


def _pieces_table(report: DataReport) -> str:
    cut = f"cut at {report.max_length}"
    head = ["split", "pieces per word", "pieces per row: median / 95 % / most", cut, "words with unknown pieces", "unknown pieces"]
    rows = [
        [s.name, f"{p.per_word:.2f}", f"{p.lengths.median:g} / {p.lengths.p95} / {p.lengths.most}",
         "-" if p.truncated is None else p.truncated, f"{p.unknown_words} ({percent(p.unknown_share)})",
         f"{p.unknown_pieces} ({percent(p.unknown_pieces / max(p.pieces, 1))})"]
        for s in report.splits if (p := s.pieces)
    ]  # fmt: skip
    return "## Tokenizer\n\n" + _table(head, rows) if rows else ""


def _characters(report: DataReport) -> str:
    parts = []
    for s in report.splits:
        for title, uses in (("lacked by the tokenizer", s.pieces.lacking if s.pieces else ()), ("invisible", s.invisible)):
            if uses:
                rows = [[use.code_point, use.name, use.count, _lines(s, use.places)] for use in uses[:20]]
                more = f"\n\n... and {len(uses) - 20} more" if len(uses) > 20 else ""
                parts.append(f"## Characters {title}: {s.name}\n\n{_table(['code point', 'name', 'count', 'first lines'], rows)}{more}")
    return "\n\n".join(parts)


def _lines(split: SplitReport, places: Iterable[str]) -> str:
    """Places in the split's own file are given as line numbers."""
    return ", ".join(place.removeprefix(f"{split.source}:") for place in places)


def _list(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    shown = [f"{name} {percent(count / total)}" for name, count in list(counts.items())[:3]]
    return ", ".join(shown) + (f", {len(counts) - 3} more" if len(counts) > 3 else "")


def percent(share: float) -> str:
    """`0.0123` -> `1.2 %`; a positive share never shows as zero."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
