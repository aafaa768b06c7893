"""Options that several verbs share, and the reading of their values."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.errors import UsageError

if TYPE_CHECKING:
    from intarsia.data import Table
    from intarsia.methods import Row

AllowNetwork = Annotated[bool, typer.Option("--allow-network", help="A base may be fetched from the Hugging Face Hub.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="A model's config.json: shapes without weights, on the meta device.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; may be given several times.")
]
Format = Annotated[
    str | None, typer.Option("--format", help="csv, tsv, jsonl, conll, iob2, conllu, text or parallel; else by the file's name.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Columns to keep: 'text,label', 'text=sentence,label=3' (from 0).")
]
Encoding = Annotated[str, typer.Option("--encoding", help="Encoding of the files; never guessed.")]
Normalise = Annotated[str, typer.Option("--normalise", help="Unicode normalisation: NFC, NFD, NFKC, NFKD or none.")]
SkipBad = Annotated[int, typer.Option("--skip-bad", help="Skip up to so many malformed rows per file.")]
Header = Annotated[bool | None, typer.Option("--header/--no-header", help="The first line names the columns.")]


def read_table(
    file: str, *, format: str | None, columns: str | None, encoding: str, normalise: str, skip_bad: int, header: bool | None
) -> Table:
    """A file, standard input (`-`), or two line-aligned files joined by a comma, as a table."""
    from intarsia.data import read

    paths = [file] if Path(file).exists() else file.split(",")
    return read(
        paths[0] if len(paths) == 1 else paths,
        format=format,
        columns=columns,
        encoding=encoding,
        normalise=normalise,
        skip_bad=skip_bad,
        header=header,
    )


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    """`["rank=8"]` -> `{"rank": "8"}`; a key may be given once."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip() or key.strip() in found:
            reason = "given twice" if key.strip() in found else "not of the form KEY=VALUE"
            raise UsageError(f"{option} {pair!r} is {reason}")
        found[key.strip()] = value.strip()
    return found


def parse_settings(pairs: list[str] | None, row: Row) -> dict[str, Any]:
    """Values for a method's arguments, each of the type its default has.

    Raises:
        UsageError: a value is of another type.
        SpecError: the method has no such setting (raised by `row.build`, which this calls).
    """
    settings = {key: _value(key, text, row) for key, text in parse_pairs(pairs, "--set").items()}
    row.build(**settings)
    return settings


_WORDS = {"none": None, "true": True, "false": False}


def _value(key: str, text: str, row: Row) -> Any:
    """A number, a truth value, `none`, or a word: what JSON says of it, else text."""
    default = row.defaults.get(key)
    if isinstance(default, str):
        return text
    value: Any = text
    if text.lower() in _WORDS:
        value = _WORDS[text.lower()]
    else:
        with contextlib.suppress(ValueError):
            value = json.loads(text)
    if isinstance(value, list):
        value = tuple(value)
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    wrong = isinstance(value, str) if number else isinstance(default, bool) and not isinstance(value, bool)
    if wrong or isinstance(value, dict) or (isinstance(default, int) and number and isinstance(value, float)):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a value")
        raise UsageError(f"--set {key}={text}: method {row.name!r} wants {kind} there (its default is {default!r})")
    return value
