"""`intarsia data check`: look at the data before training on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import (
    AllowNetwork,
    Columns,
    Encoding,
    Format,
    Header,
    Normalise,
    SkipBad,
    read_table,
    reading,
)
from intarsia.cli.verb import verb
from intarsia.errors import DataError, UsageError

if TYPE_CHECKING:
    from intarsia.data import DataReport, Table
    from intarsia.data.report import SplitReport

Files = Annotated[
    list[str], typer.Argument(help="Train, dev and test files, in this order; '-' is standard input; 'a.de,a.en' two aligned files.")
]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column of the texts (or tokens); several with commas.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the labels (or tags); 'none' for none.")]
Numeric = Annotated[bool, typer.Option("--regression", help="Labels are numbers, not classes.")]
TokenizerOf = Annotated[str | None, typer.Option("--base", help="Check what this base's tokenizer does to the words.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Pieces a text may have before it is cut (needs --base).")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the whole report as markdown.")]

#: names of columns that are taken without being told, in this order
TEXTS = ("text", "sentence", "tokens", "words", "source")
LABELS = ("label", "labels", "category", "class", "tags", "ner_tags", "upos")
SPLITS = ("train", "dev", "test")


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
    verb(room, "check")(check)
    app.add_typer(room, name="data")


def check(
    console: Console,
    files: Files,
    text: TextColumn = None,
    label: LabelColumn = None,
    regression: Numeric = False,
    base: TokenizerOf = None,
    max_length: MaxLength = None,
    format: Format = None,
    columns: Columns = None,
    encoding: Encoding = None,
    normalise: Normalise = None,
    skip_bad: SkipBad = None,
    header: Header = None,
    markdown: Markdown = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Report rows, labels, duplicates, overlap between files, lengths, and what the tokenizer does to the words.

    Exit code 3 if a finding makes a result meaningless.
    """
    from intarsia import data

    if len(files) > len(SPLITS):
        raise UsageError(f"up to three files (train, dev, test), found {len(files)}; a shell pattern matched more than was meant?")
    settings = reading(columns, encoding, normalise, skip_bad, header)
    tables = [read_table(file, format, settings) for file in files]
    tokenizer = None
    if base is not None:
        from intarsia.bases import load

        tokenizer = load(base, allow_network=allow_network).tokenizer
    report = data.check(
        *tables,
        text=(text or guessed(tables[0], TEXTS, "--text")).split(","),
        label=chosen_label(tables[0], label),
        numeric_label=regression,
        tokenizer=tokenizer,
        max_length=max_length,
    )

    def human() -> None:
        if markdown:
            console.line(report.to_markdown().rstrip())
        else:
            summary(console, report)

    console.result(report.to_dict(), human)
    if report.errors:
        raise DataError(f"{len(report.errors)} finding(s) make a result meaningless: {'; '.join(report.errors)}")


def guessed(table: Table, names: tuple[str, ...], option: str) -> str:
    """The first of the usual names among a table's columns; both columns of parallel text."""
    if {"source", "target"} <= set(table.names):
        return "source,target"
    for name in names:
        if name in table.names:
            return name
    raise UsageError(f"{table.source} has the columns {', '.join(table.names)}; say which one with {option}")


def chosen_label(table: Table, label: str | None) -> str | None:
    """The label column: as told, or the first usual name, or none."""
    if label == "none":
        return None
    return label or next((name for name in LABELS if name in table.names), None)


def summary(console: Console, report: DataReport) -> None:
    """The report in a screen: a line per split, then what should be looked at."""
    head = ["split", "rows", "labels", "words/row", "duplicates", "NFC fixed", "scripts"]
    pieces = any(split.pieces for split in report.splits)
    extra = ["pieces/word", "longest", "cut", "words with unknown pieces"] if pieces else []
    console.table([*head, *extra], [_row(split) + (_pieces(split) if pieces else []) for split in report.splits])
    for overlap in report.overlaps:
        console.line(f"overlap {overlap.first}/{overlap.second}: {overlap.normalised:,} of {overlap.rows:,} rows ({overlap.exact:,} exactly)")
    for line in report.warnings:
        console.line(f"warning: {line}")
    for line in report.errors:
        console.line(f"finding: {line}")
    if not report.warnings and not report.errors:
        console.line("nothing to object to")


def _row(split: SplitReport) -> list[object]:
    from intarsia.data.report import percent

    total = sum(split.scripts.values())
    scripts = ", ".join(f"{name} {percent(count / total)}" for name, count in list(split.scripts.items())[:2])
    labels = len(split.labels) if split.labels is not None else None
    return [split.name, split.rows, labels, f"{split.words.median:g}", split.near_duplicates, split.renormalised, scripts]


def _pieces(split: SplitReport) -> list[object]:
    from intarsia.data.report import percent

    if split.pieces is None:
        return [None] * 4
    p = split.pieces
    return [f"{p.per_word:.2f}", p.lengths.most, p.truncated, percent(p.unknown_share)]
