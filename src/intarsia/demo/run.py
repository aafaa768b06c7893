"""`run`: the demo.  Real data, a real pretrained base, offline: check, train, transfer, compose, report.

    [1] base and data   [2] one module per method on English   [3] the same modules on five other languages
    [4] two modules laid together   [5] report.md, csv files, two pictures, module files

What is not here: what each step does (`steps.py`), the pages it writes (`report.py`, `plots.py`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from intarsia import bases
from intarsia.demo.outcome import Outcome, check_table, gain_line, language_table, method_table
from intarsia.demo.plan import PLAN, SOURCE, Plan
from intarsia.demo.report import write_report
from intarsia.demo.steps import check_data, load_tables, make_task, train_one, transfer
from intarsia.errors import StoreError
from intarsia.host import Host
from intarsia.train import Progress


class Screen(Protocol):
    """Where the demo shows its results."""

    def line(self, text: str = "") -> None:
        """A line of the result."""

    def note(self, text: str) -> None:
        """A line about the way to the result."""

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table."""


def run(out: Path, screen: Screen, progress: Progress, *, plan: Plan = PLAN, allow_network: bool = False) -> Outcome:
    """Run the demo and write its report into a folder.

    Args:
        out: the folder; made if it is not there, the files of an earlier demo in it are replaced.
        allow_network: the base may be fetched from the hub.

    Raises:
        BaseError: the base's package is not installed; the message says what to type.
        StoreError: the folder cannot be written.
    """
    began = time.perf_counter()
    folder = make_folder(out)
    tables = load_tables(plan)
    base = load_base(plan, screen, allow_network)
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    outcome = Outcome(
        plan, base.name, sum(p.numel() for p in base.model.parameters()), host.fingerprint.weights, base.source, base.licence, machine()
    )

    screen.line(f"[1/5] base {base.name}: {outcome.parameters:,} parameters, {outcome.machine}{'' if allow_network else ', offline'}")
    check_data(outcome, base, tables)
    screen.table(*check_table(outcome))
    screen.line("* not among the languages the base's vocabulary was made for")

    screen.line(f"\n[2/5] train on {len(tables['train'])} English sentences, a module per method, on the frozen base")
    task = make_task(plan, base, tables["train"], base.model)
    for name in plan.methods:
        outcome.trained.append(train_one(host, name, outcome, task, tables, folder, progress))
        last = outcome.trained[-1]
        screen.note(f"      {name}: {last.seconds:.0f} s, dev accuracy {100 * last.dev.value:.1f}")
    screen.table(*method_table(outcome))

    screen.line(f"\n[3/5] the same modules on languages they were not trained on ({len(tables[SOURCE])} sentences each)")
    dev = {t.method: t.dev.value for t in outcome.trained}
    outcome.best = max(plan.pair, key=lambda name: dev[name])
    single = [name for name in ("head", outcome.best) if name in plan.methods]
    for name in single:
        outcome.transfers.append(transfer(host, name, name, None, outcome, task, tables, progress))
    screen.table(*language_table(outcome.transfers))

    screen.line(f"\n[4/5] two modules laid together: {plan.pair[0]} and {plan.pair[1]}, each trained alone")
    alone = outcome.transfers[-1]
    composed = [
        transfer(host, name, expression, head, outcome, task, tables, progress, against=alone)
        for name, (expression, head) in plan.compositions.items()
    ]
    outcome.transfers += composed
    screen.table(*language_table([alone, *composed]))
    for entry in composed:
        screen.line(gain_line(entry, outcome.best))
    host.close()

    outcome.seconds = time.perf_counter() - began
    write_report(out, outcome)
    screen.line(f"\n[5/5] wrote {', '.join(path.name for path in outcome.files)} and {len(outcome.trained)} modules into {out}")
    screen.line(f"      {outcome.seconds:.0f} s in all")
    screen.line(what_next(outcome))
    return outcome


def make_folder(out: Path) -> Path:
    """The folder for modules, below `out`.

    Raises:
        StoreError: it cannot be made or written.
    """
    folder = out / "modules"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: cannot be written: {error.strerror or error}; choose another folder with --out") from error
    if not os.access(folder, os.W_OK):
        raise StoreError(f"{folder}: cannot be written; choose another folder with --out")
    return folder


def load_base(plan: Plan, screen: Screen, allow_network: bool) -> bases.Base:
    """The base; the first use of an embedded one converts it, which takes a moment."""
    screen.note(f"intarsia {version('intarsia')}: loading {plan.base}")
    fresh = any(info.name == plan.base and info.installed and info.cached is None for info in bases.list_bases())
    if fresh:
        screen.note(f"first use of {plan.base}: converting it into the cache, half a minute")
    return bases.load(plan.base, head="none", allow_network=allow_network)


def machine() -> str:
    """Where this runs: `Linux x86_64, 2 threads`."""
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"


def what_next(outcome: Outcome) -> str:
    """What to type next, for the modules that were made and for one's own data."""
    files = {t.method: t.file for t in outcome.trained}
    a, b = (files[name] for name in outcome.plan.pair)
    lines = [
        f"intarsia predict -m {files[outcome.best]} --line 'The match ended in a draw.'",
        f"intarsia predict -m {a} -m {b} --expr '{outcome.plan.compositions['average'][0]}' FILE.txt",
        f"intarsia module show {files[outcome.best]}",
    ]
    own = [
        f"intarsia data check train.csv dev.csv --base {outcome.plan.base}",
        f"intarsia train --base {outcome.plan.base} --train train.csv --dev dev.csv --method lora",
        "intarsia methods",
    ]
    return "\nNext:  " + "\n       ".join(lines) + "\nYour own data (csv, tsv or jsonl with the columns text and label):\n       " + "\n       ".join(own)
