"""`intarsia transfer`: a task in another language, by one or several expressions over stored modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.evaluate import data_files, interval
from intarsia.cli.options import AllowNetwork, Columns, Format, TaskSettings, parse_values, read_table, reading
from intarsia.cli.running import BaseName, ForceBase, HeadOf, Modules, base_of, inserted, module_files
from intarsia.cli.sources import read_modules
from intarsia.cli.verb import verb
from intarsia.errors import UsageError

Data = Annotated[list[str], typer.Argument(help="Files with answers; NAME=FILE calls one by a name.", metavar="[NAME=]FILE...")]
Expressions = Annotated[list[str] | None, typer.Option("--expr", help="What runs: 'task', 'lang >> task'; several are compared.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Rows of one forward pass.", min=1)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="A new file for the results (json).")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="A task in another language.", no_args_is_help=True)
    verb(room, "eval")(evaluate)
    app.add_typer(room, name="transfer")


def evaluate(
    console: Console,
    data: Data,
    module: Modules = None,
    expr: Expressions = None,
    base: BaseName = None,
    head: HeadOf = None,
    batch_size: Batch = 32,
    task_set: TaskSettings = None,
    format: Format = None,
    columns: Columns = None,
    out: Out = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Compare expressions on files in one or several languages: metrics with 95 % intervals beside the majority class.

    intarsia transfer eval -m lang=lang-kab.safetensors -m task=topic.safetensors --expr task --expr "lang >> task" kab=test.tsv
    """
    from intarsia import bases
    from intarsia.host import Host
    from intarsia.languages.transfer import compare, reminders
    from intarsia.tasks import CONTEXT, TASKS, head_for, owner_of

    files = module_files(module)
    if out is not None and out.exists():
        raise UsageError(f"--out {out} exists; give a new file name")
    modules = read_modules(files)
    name = base or base_of(files)
    expressions = expr or ([next(iter(modules))] if len(modules) == 1 else [])
    if not expressions:
        raise UsageError(f"there are {len(modules)} modules: say what runs, e.g. --expr {' --expr '.join(map(repr, [list(modules)[-1], ' >> '.join(modules)]))}")
    owner = owner_of(list(modules.values()), head)
    loaded = bases.load(name, head=head_for(owner), allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    forced = inserted(host, modules, force_base=force_base)
    settings = reading(columns, None, None, None, None)
    tables = {key: read_table(file, format, settings) for key, file in data_files(list(data)).items()}
    found = compare(
        host, modules, expressions, tables, head=head, batch_size=batch_size,
        settings=parse_values(task_set, "--task-set", TASKS[str(owner.context[CONTEXT]["name"])].defaults),
        progress=lambda text, table: console.note(f"{text} on {table} ..."),
    )  # fmt: skip
    rows = [
        {
            "expression": one.expression, "data": one.data, "tokenizer": one.tokenizer or "base", "majority": one.majority, "seconds": round(one.seconds, 3),
            "metrics": {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.size} for n, s in one.metrics.items()}, "counts": dict(one.counts),
        }
        for one in found
    ]  # fmt: skip
    told = reminders(modules, expressions)
    payload = {"base": loaded.name, "results": rows, "digests": {key: one.digest for key, one in modules.items()}, "warnings": told}
    if forced:
        payload["forced_base"] = forced
    if out is not None:
        from intarsia._codec import canonical_json
        from intarsia.modules import write_atomic

        text = canonical_json(payload) + b"\n"
        write_atomic(out, [text], len(text))
    console.result(payload, lambda: _table(console, rows, told))


def _table(console: Console, rows: list[dict[str, Any]], warnings: list[str]) -> None:
    names = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    lines = []
    for row in rows:
        size = next((m["n"] for m in row["metrics"].values()), None)
        majority = None if row["majority"] is None else f"{row['majority']:.4f}"
        lines.append([row["expression"], row["data"], size, *(interval(row["metrics"].get(metric)) for metric in names), majority, row["tokenizer"]])
    console.table(["expression", "data", "n", *names, "majority class", "tokenizer"], lines)
    for warning in warnings:
        console.line(f"warning: {warning}")
