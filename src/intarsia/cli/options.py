"""Options that several verbs share, and the reading of their values."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.errors import UsageError

if TYPE_CHECKING:
    from intarsia.data import Table
    from intarsia.methods import Row

AllowNetwork = Annotated[bool, typer.Option("--allow-network", help="A base may be fetched from the Hugging Face Hub.")]
ModelConfig = Annotated[
    Path | None, typer.Option("--config", help="A model's config.json: shapes without weights, on the meta device.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML, TOML or JSON file with all of this; flags win over it.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; may be given several times.")
]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="The store's folder.", show_default="$INTARSIA_STORE or ~/.local/share/intarsia")]
TaskSettings = Annotated[
    list[str] | None, typer.Option("--task-set", metavar="KEY=VALUE", help="A setting of the task; may be given several times.")
]

# reading files; None leaves it to the file's name, the configuration file or the default
Format = Annotated[
    str | None, typer.Option("--format", help="csv, tsv, jsonl, conll, iob2, conllu, text or parallel; else by the file's name.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Columns to keep: 'text,label', 'text=sentence,label=3' (from 0).")
]
Encoding = Annotated[str | None, typer.Option("--encoding", help="Encoding of the files (utf-8); never guessed.")]
Normalise = Annotated[str | None, typer.Option("--normalise", help="Unicode normalisation (NFC): NFC, NFD, NFKC, NFKD or none.")]
SkipBad = Annotated[int | None, typer.Option("--skip-bad", help="Skip up to so many malformed rows per file.")]
Header = Annotated[bool | None, typer.Option("--header/--no-header", help="The first line names the columns.")]

_WORDS = {"none": None, "true": True, "false": False}


def reading(
    columns: str | None, encoding: str | None, normalise: str | None, skip_bad: int | None, header: bool | None
) -> dict[str, Any]:
    """The arguments of `intarsia.data.read` that were given."""
    given = {"columns": columns, "encoding": encoding, "normalise": normalise, "skip_bad": skip_bad, "header": header}
    return {key: value for key, value in given.items() if value is not None}


def read_table(file: str | Sequence[str], format: str | None, settings: Mapping[str, Any]) -> Table:
    """Rows of a file, of standard input (`-`), of two line-aligned files joined by a comma, or of several such.

    Raises:
        UsageError: the reader has no such setting.
        DataError: see `intarsia.data.read`.
    """
    import inspect

    from intarsia.data import concat, read
    from intarsia.errors import listing, nearest

    known = [name for name in inspect.signature(read).parameters if name not in ("path", "format", "limits")]
    for key in settings:
        if key not in known:
            raise UsageError(f"read_settings: the reader has no setting {key!r}{nearest(key, known)} known: {listing(known)}")
    if not isinstance(file, str):
        return concat([read_table(one, format, settings) for one in file])
    paths = [file] if Path(file).exists() else file.split(",")
    return read(paths[0] if len(paths) == 1 else paths, format=format, **settings)


def parse_pairs(pairs: Sequence[str] | None, option: str) -> dict[str, str]:
    """`["rank=8"]` -> `{"rank": "8"}`; a key may be given once.

    Raises:
        UsageError: a pair is none, or a key comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip() or key.strip() in found:
            reason = "given twice" if key.strip() in found else "not of the form KEY=VALUE"
            raise UsageError(f"{option} {pair!r} is {reason}")
        found[key.strip()] = value.strip()
    return found


def parse_value(text: str) -> Any:
    """`none`, `true`, `false`, a number, a list or object in JSON; anything else is text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def parse_values(pairs: Sequence[str] | None, option: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, each read as what its default is: text stays text where the default is text."""
    found = parse_pairs(pairs, option)
    return {key: text if isinstance(defaults.get(key), str) else parse_value(text) for key, text in found.items()}


def parse_settings(pairs: Sequence[str] | None, row: Row) -> dict[str, Any]:
    """Values for a method's arguments, each of the type its default has.

    Raises:
        UsageError: a value is of another type.
        SpecError: the method has no such setting (raised by `row.build`, which this calls).
    """
    settings = {k: _setting(k, v, row) for k, v in parse_values(pairs, "--set", row.defaults).items()}
    members = {"parts": ("member",)} if "parts" in row.defaults and "parts" not in settings else {}  # a router's come from the expression
    row.build(**members, **settings)
    return settings


def _setting(key: str, value: Any, row: Row) -> Any:
    default = row.defaults.get(key)
    if isinstance(value, list):
        value = tuple(value)
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    wrong = not isinstance(value, (int, float)) if number else isinstance(default, bool) and not isinstance(value, bool)
    if wrong or isinstance(value, dict) or (isinstance(default, int) and number and isinstance(value, float)):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a value")
        raise UsageError(f"--set {key}={value}: method {row.name!r} wants {kind} there (its default is {default!r})")
    return value
