"""`intarsia predict`: one line of JSON per row, with probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import (
    AllowNetwork,
    Columns,
    ConfigFile,
    Encoding,
    Format,
    Header,
    Normalise,
    SkipBad,
    TaskSettings,
    read_table,
    reading,
)
from intarsia.cli.running import (
    BaseName,
    BatchSize,
    Expression,
    ForceBase,
    HeadOf,
    Modules,
    Passed,
    defaults,
    module_files,
    start,
)
from intarsia.cli.verb import verb
from intarsia.errors import UsageError

if TYPE_CHECKING:
    from intarsia.cli.running import Running
    from intarsia.data import Table
    from intarsia.train import Prediction

Input = Annotated[str | None, typer.Argument(help="A file; '-' or nothing for lines of standard input.", metavar="[FILE]")]
Line = Annotated[list[str] | None, typer.Option("--line", "-l", help="A text itself, instead of a file; may be given several times.")]
Out = Annotated[str | None, typer.Option("--out", "-o", help="A file to write instead of standard output.")]


def register(app: typer.Typer) -> None:
    verb(app, "predict")(predict)


def predict(
    console: Console,
    input: Input = None,
    line: Line = None,
    config: ConfigFile = None,
    base: BaseName = None,
    module: Modules = None,
    expr: Expression = None,
    head: HeadOf = None,
    out: Out = None,
    batch_size: BatchSize = None,
    task_set: TaskSettings = None,
    format: Format = None,
    columns: Columns = None,
    encoding: Encoding = None,
    normalise: Normalise = None,
    skip_bad: SkipBad = None,
    header: Header = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Predict the rows of a file, of standard input or of --line; one line of JSON per row.

    intarsia predict -m runs/topic/module.safetensors --line "A text."
    """
    from intarsia import tasks
    from intarsia.train.config import PredictConfig, load_config, read_file

    given = {
        "base": base, "modules": module_files(module) or None, "expression": expr, "head": head, "input": input, "out": out,
        "batch_size": batch_size, "format": format,
    }  # fmt: skip
    values = {key: value for key, value in given.items() if value is not None}
    written = read_file(config) if config is not None else {}
    settings = {f"read_settings.{k}": v for k, v in reading(columns, encoding, normalise, skip_bad, header).items()}
    chosen = load_config(PredictConfig, config, defaults(values | settings, written))
    if line and (input is not None or "input" in written):
        raise UsageError("give --line or a file, not both")
    running = start(chosen, task_set, allow_network=allow_network, force_base=force_base)
    table = lines_table(line, running) if line else input_table(chosen, running)
    found = tasks.predict(
        running.host, running.expression, running.task, table, head=running.head, batch_size=chosen.batch_size,
        progress=Passed("predict", quiet=console.quiet or len(table) <= chosen.batch_size),
    )  # fmt: skip
    rows = [answer(prediction, table) | ({"forced_base": sorted(running.forced)} if running.forced else {}) for prediction in found]
    if chosen.out != "-":
        from intarsia.data import write_jsonl

        write_jsonl(rows, chosen.out)
        console.result({"out": chosen.out, "rows": len(rows)}, lambda: console.line(f"wrote {len(rows):,} rows to {chosen.out}"))
    elif console.json:
        console.document(rows)
    else:
        console.records(rows)


def input_table(config: Any, running: Running) -> Table:
    """The rows to predict; lines of standard input are texts, whatever the task calls them."""
    piped = config.input == "-" and config.format in (None, "text")
    settings = dict(config.read_settings)
    if piped or config.format == "text" or config.input.lower().endswith(".txt"):
        settings.setdefault("columns", text_column(running))
    return read_table(config.input, "text" if piped else config.format, settings)


def lines_table(lines: list[str], running: Running) -> Table:
    """Texts from the command line as a table."""
    from intarsia.data import Table, normalise

    return Table.of({text_column(running): [normalise(text, running.task.options.normalise) for text in lines]}, source="--line")


def text_column(running: Running) -> str:
    """The column in which the task looks for plain text.

    Raises:
        UsageError: it reads something else (tokens).
    """
    options = running.task.options
    for role in ("text", "source", "prompt"):
        name = getattr(options, role, None)
        if isinstance(name, str):
            return name
    raise UsageError(f"task {running.task.name!r} reads words, not lines of text; give a file, e.g. --format conll")


def answer(prediction: Prediction, table: Table) -> dict[str, Any]:
    """A prediction as a JSON object: the row, what it said, the answer, probabilities from the largest."""
    found: dict[str, Any] = {"row": prediction.row, "input": dict(table[prediction.row]), "prediction": prediction.value}
    if prediction.probabilities is not None:
        ordered = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        found["probabilities"] = {name: round(value, 6) for name, value in ordered}
    return found
