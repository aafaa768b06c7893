"""`intarsia bench speed`: this library against others on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.console import Console
from intarsia.errors import UsageError, listing, nearest

Out = Annotated[Path, typer.Option("--results", help="File with one line per case; cases that are in it are not measured again.")]
Only = Annotated[str | None, typer.Option("--only", help="Comma-separated cases; all if left out.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds of a case; each case's own number if left out.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of torch.")]
Table = Annotated[Path | None, typer.Option("--table", help="Then write the page of all results here, with csv and picture beside it.")]


def speed(console: Console, results: Out = Path("speed.jsonl"), only: Only = None, rounds: Rounds = None, threads: Threads = 1, table: Table = None) -> None:
    """Time this library against others, in turns in one process, after both were found to give the same answer.

    intarsia bench speed --results speed.jsonl --table speed.md
    """
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise UsageError('bench speed compares with peft, which is not installed: pip install "intarsia[peft]"')
    import torch

    from intarsia.bench.jobs import Lines
    from intarsia.bench.learn import where
    from intarsia.bench.speed import CASES, measure
    from intarsia.bench.speed.page import write
    from intarsia.errors import IntarsiaError
    from intarsia.train.record import now

    names = list(CASES) if only is None else only.split(",")
    for name in names:
        if name not in CASES:
            raise UsageError(f"no case {name!r}{nearest(name, CASES)} known: {listing(CASES, 40)}")
    torch.set_num_threads(threads)
    kept = Lines(results)
    done = {line.get("case") for line in kept.read() if "failed" not in line}
    for name in names:
        if name in done:
            continue
        try:
            line = measure(CASES[name], rounds)
            console.note(f"{name}: {line['ratio']:.3g} [{line['low']:.3g}-{line['high']:.3g}], target {line['target']:g}")
        except (IntarsiaError, RuntimeError, ValueError, TypeError) as error:  # one case's fault must not cost the others
            line = {"case": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
            console.warn(f"{name}: {line['failed']}")
        kept.append({**line, "at": now(), "on": where(torch.device("cpu"))})
    lines = kept.read()
    if table is not None:
        write(lines, table)
    console.result({"results": str(results), "cases": len(lines)}, lambda: console.line(f"{results} holds {len(lines)} results"))
