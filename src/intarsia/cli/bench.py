"""`intarsia bench`: measurements that anyone can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.console import Console
from intarsia.cli.speed import speed
from intarsia.cli.verb import verb
from intarsia.errors import UsageError

Data = Annotated[Path, typer.Option("--data", help="Folder with sst2/ and sib200/ (see docs/measured.md).")]
Out = Annotated[Path, typer.Option("--results", help="File with one line per job; what is in it is not run again.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Comma-separated: sst2, sib200, e2e.")]
Base = Annotated[str | None, typer.Option("--base", help="The base model; the task's own if left out.")]
Only = Annotated[str | None, typer.Option("--only", help="Comma-separated methods; all if left out.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Comma-separated seeds.")]
Examples = Annotated[str | None, typer.Option("--examples", help="Comma-separated numbers of training examples; the task's own if left out.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps of a job; the task's own if left out.")]
Table = Annotated[Path | None, typer.Option("--table", help="Run nothing; write the page of these results here, with its pictures.")]
Tune = Annotated[Path | None, typer.Option("--tune", help="Score on dev data at multiples of the methods' own learning rates, and write the best here (rates.csv).")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Measure the library on this machine.", no_args_is_help=True)
    verb(room, "learn")(learn)
    verb(room, "speed")(speed)
    app.add_typer(room, name="bench")


def learn(
    console: Console,
    data: Data = Path("data"),
    results: Out = Path("learn.jsonl"),
    tasks: Tasks = "sst2,sib200",
    base: Base = None,
    only: Only = None,
    seeds: Seeds = "0,1,2",
    examples: Examples = None,
    steps: Steps = None,
    table: Table = None,
    tune: Tune = None,
) -> None:
    """Does it learn?  Train every method on real tasks, and write score, size, time and memory, one line per job.

    intarsia bench learn --data data --results learn.jsonl
    """
    from intarsia.bench.jobs import Results, plan, source
    from intarsia.methods import METHODS

    if table is not None:
        from intarsia.bench.page import write

        lines = [line for name in str(results).split(",") for line in Results(Path(name)).read()]
        write(lines, table)
        console.result({"page": str(table), "results": len(lines)}, lambda: console.line(f"wrote {table} from {len(lines)} results"))
        return
    from intarsia.bench.learn import run

    wanted = list(METHODS) if only is None else [METHODS[name].name for name in only.split(",")]
    names = [source(name).name for name in tasks.split(",")]
    counts = None if examples is None else _numbers(examples, "--examples")
    if tune is not None:
        from intarsia.bench.tune import trials
        from intarsia.bench.tune import write as write_rates

        if len(names) != 1 or (counts and len(counts) != 1):
            raise UsageError(f"--tune: rates are chosen on one task and one number of examples, found --tasks {tasks} --examples {examples}")
        jobs = trials(wanted, Results(results), names[0], base, counts[0] if counts else None, steps)
        count = run(jobs, data, Results(results), console.note, dev_only=True)
        found = write_rates(Results(results).read(), tune)
        console.result({"rates": str(tune), "run": count, "methods": len(found)}, lambda: console.line(f"{count} jobs run; {tune} has rates for {len(found)} methods"))
        return
    jobs = plan(names, base, wanted, _numbers(seeds, "--seeds"), counts, steps)
    count = run(jobs, data, Results(results), console.note)
    console.result({"results": str(results), "run": count}, lambda: console.line(f"{count} jobs run; {results} holds all of them"))


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected whole numbers with commas between them, found {text!r}") from None
