"""`intarsia eval`: metrics with intervals of a module or an expression, on one or several files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

Data = Annotated[list[str] | None, typer.Argument(help="Files with answers; NAME=FILE calls one by a name.", metavar="[NAME=]FILE...")]
Predictions = Annotated[str | None, typer.Option("--predictions", help="A folder for the predictions of every row (jsonl).")]
Out = Annotated[str | None, typer.Option("--out", "-o", help="A file for the metrics (json).")]


def register(app: typer.Typer) -> None:
    verb(app, "eval")(evaluate)


def evaluate(
    console: Console,
    data: Data = None,
    config: ConfigFile = None,
    base: BaseName = None,
    module: Modules = None,
    expr: Expression = None,
    head: HeadOf = None,
    predictions: Predictions = None,
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
    """Compare predictions with the answers in files: metrics with 95 % bootstrap intervals.

    intarsia eval -m runs/topic/module.safetensors test=test.tsv
    """
    from intarsia import tasks
    from intarsia.compose import expr as parse
    from intarsia.compose import names
    from intarsia.train.config import EvalConfig, load_config, read_file

    given = {
        "base": base, "modules": module_files(module) or None, "expression": expr, "head": head, "data": data_files(data) or None,
        "predictions": predictions, "out": out, "batch_size": batch_size, "format": format,
    }  # fmt: skip
    values = {key: value for key, value in given.items() if value is not None}
    written = read_file(config) if config is not None else {}
    settings = {f"read_settings.{k}": v for k, v in reading(columns, encoding, normalise, skip_bad, header).items()}
    if "data" not in values and "data" not in written:
        raise UsageError("say which file to evaluate on, e.g. intarsia eval -m MODULE test=test.tsv")
    chosen = load_config(EvalConfig, config, defaults(values | settings, written))
    tables = {name: read_table(file, chosen.format, chosen.read_settings) for name, file in chosen.data.items()}
    running = start(chosen, task_set, allow_network=allow_network, force_base=force_base)
    found = {
        name: tasks.evaluate(
            running.host, running.expression, running.task, table, head=running.head, batch_size=chosen.batch_size,
            progress=Passed(name, quiet=console.quiet),
        )
        for name, table in tables.items()
    }  # fmt: skip
    results = {name: described(evaluation) for name, evaluation in found.items()}
    digests = {name: running.host.extract(name).digest for name in sorted(names(parse(running.expression)))}
    payload = {"expression": running.expression, "task": running.task.name, "digests": digests, "data": results}
    if running.forced:
        payload["forced_base"] = dict(running.forced)
    if chosen.predictions is not None:
        write_predictions(Path(chosen.predictions), found, tables)
    if chosen.out is not None:
        from intarsia._codec import canonical_json
        from intarsia.modules import write_atomic

        text = canonical_json(payload) + b"\n"
        write_atomic(chosen.out, [text], len(text))
    console.result(payload, lambda: _table(console, running.expression, results))


def data_files(given: list[str] | None) -> dict[str, str]:
    """`["test=a.tsv", "b.tsv"]` -> file by name; without a name it is the file's own, up to the first dot."""
    found: dict[str, str] = {}
    for item in given or ():
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            name, path = Path(item).name.partition(".")[0] or item, item
        if name in found:
            raise UsageError(f"two files are called {name!r}: {found[name]} and {path}; call them differently: NAME={path}")
        found[name] = path
    return found


def described(evaluation: Any) -> dict[str, Any]:
    """An evaluation as plain values."""
    scores = {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.size} for n, s in evaluation.metrics.items()}
    return {"metrics": scores, "loss": evaluation.loss, "seconds": round(evaluation.seconds, 3), "counts": dict(evaluation.counts)}


def write_predictions(folder: Path, found: dict[str, Any], tables: dict[str, Any]) -> None:
    """One jsonl file per data file."""
    from intarsia.cli.predict import answer
    from intarsia.data import write_jsonl

    folder.mkdir(parents=True, exist_ok=True)
    for name, evaluation in found.items():
        write_jsonl((answer(p, tables[name]) for p in evaluation.predictions), folder / f"{name}.jsonl")


def _table(console: Console, expression: str, data: dict[str, Any]) -> None:
    console.line(f"{expression}: value [95 % interval]")
    names = list(dict.fromkeys(metric for entry in data.values() for metric in entry["metrics"]))
    rows = []
    for name, entry in data.items():
        size = next((m["n"] for m in entry["metrics"].values()), None)
        loss = None if entry["loss"] is None else f"{entry['loss']:.4f}"
        rows.append([name, size, *(interval(entry["metrics"].get(metric)) for metric in names), loss])
    console.table(["data", "n", *names, "loss"], rows)
    for name, entry in data.items():
        for what, count in entry["counts"].items():
            if what.startswith("truncated") and count:
                console.warn(f"{name}: {count:,} {what.replace('_', ' ')}: longer than the model reads")


def interval(metric: dict[str, Any] | None) -> str | None:
    """`0.8431 [0.79, 0.89]`."""
    if metric is None:
        return None
    around = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    return f"{metric['value']:.4f}{around}"
