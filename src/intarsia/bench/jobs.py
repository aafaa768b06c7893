"""What `bench learn` measures: tasks from files, and one job per (task, base, method, seed, number of examples)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from intarsia.data import Table, read
from intarsia.errors import DataError, UsageError, listing, nearest


@dataclass(frozen=True, slots=True)
class Source:
    """A task as files, and how it is trained here.

    Attributes:
        train, dev, test: below the data folder; no dev file, no choice of learning rates.
        columns: names of its columns in them.
        kind: of the task (`intarsia.tasks.TASKS`).
        settings: of the task.
        reference: what the others must beat: head-only, or the base as it is.
        methods: that are run; all if None.
        base, examples, steps, batch, length: examples of a step, tokens of an example.
        rows: of the test file that count, drawn at random; all if None.
        set: settings of methods that are not their own, for this task.
    """

    name: str
    train: str
    dev: str | None
    test: str
    columns: str
    kind: str = "classify"
    settings: Mapping[str, object] = field(default_factory=dict)
    reference: str = "head"
    methods: tuple[str, ...] | None = None
    base: str = "minilm-l6"
    examples: int = 700
    steps: int = 100
    batch: int = 16
    length: int = 64
    rows: int | None = None
    set: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


BASE = "base"
"""In the place of a method: the base as it is, without a module."""

SOURCES = {
    s.name: s
    for s in (
        Source("sst2", "sst2/data/SST-2/train.tsv", "sst2/data/SST-2/dev.tsv", "sst2/data/SST-2/test.tsv", "text=sentence,label"),
        Source("sib200", "sib200/eng_Latn/train.tsv", "sib200/eng_Latn/dev.tsv", "sib200/eng_Latn/test.tsv", "text,label=category"),
        Source(
            "e2e", "e2e/devset.csv", None, "e2e/testset_w_refs.csv", "prompt=mr,completion=ref", kind="clm",
            settings={"prompt": "prompt", "completion": "completion"}, reference=BASE, base="smollm2-135m",
            methods=(BASE, "lora", "prefix", "pfeiffer", "bitfit", "ia3"), examples=120, steps=30, batch=4, length=96, rows=100,
            set={"bitfit": {"create": True}},  # the base has no biases
        ),
    )
}  # fmt: skip


def source(name: str) -> Source:
    """A task by name."""
    if name not in SOURCES:
        raise UsageError(f"no task {name!r} here{nearest(name, SOURCES)} known: {listing(SOURCES)}")
    return SOURCES[name]


def tables(task: Source, data: Path) -> tuple[Table, Table | None, Table]:
    """Training, dev and test tables.

    Raises:
        DataError: a file is missing.
    """
    for part in (task.train, task.dev, task.test):
        if part is not None and not (data / part).is_file():
            raise DataError(f"{data / part}: no such file; --data names the folder that holds {part}")
    train, test = (read(data / part, columns=task.columns) for part in (task.train, task.test))
    dev = None if task.dev is None else read(data / task.dev, columns=task.columns)
    if task.rows is not None and task.rows < len(test):
        test = test.select(sorted(Random(0).sample(range(len(test)), task.rows)))
    return train, dev, test


def shots(table: Table, count: int, seed: int, label: str | None = "label") -> Table:
    """`count` rows drawn by a seed, every label (if there are any) as often as its share, none left out where that is possible.

    The first `n` rows of the draw for `m > n` rows are the draw for `n`, so that a curve over `n` adds data to what it had.
    """
    if count > len(table):
        raise DataError(f"{count} examples wanted, the table has {len(table)}")
    order = list(range(len(table)))
    Random(seed).shuffle(order)
    if label is None:
        return table.select(order[:count])
    queues: dict[str, list[int]] = {}
    names = table.texts(label)
    for row in order:
        queues.setdefault(names[row], []).append(row)
    total = {name: len(rows) for name, rows in queues.items()}
    taken = dict.fromkeys(total, 0)
    chosen: list[int] = []
    for _ in range(count):
        # the label that is furthest behind its share; at first each once
        name = max((n for n in sorted(total) if taken[n] < total[n]), key=lambda n: (taken[n] == 0, total[n] * (len(chosen) + 1) / len(table) - taken[n]))
        chosen.append(queues[name][taken[name]])
        taken[name] += 1
    return table.select(chosen)


@dataclass(frozen=True, slots=True)
class Job:
    """One training and its test."""

    task: str
    base: str
    method: str
    seed: int
    examples: int
    steps: int
    rate: float | None = None

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Job:
        """The job of a result."""
        values: dict[str, Any] = {name: line.get(name) for name in cls.__dataclass_fields__}
        return cls(**values)


@cache
def rates() -> dict[str, float]:
    """Learning rates that were chosen on dev data where the method's own does not suit short trainings, see `rates.csv`."""
    text = files("intarsia.bench").joinpath("rates.csv").read_text("utf-8")
    return {row["method"]: float(row["rate"]) for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))}


def rate_of(task: str, method: str) -> float | None:
    """The learning rate of a method in a task's jobs; None for its own.  The rates are those of classification."""
    return rates().get(method) if task not in SOURCES or SOURCES[task].kind == "classify" else None


VALUES = "attn.{q,v}.weight"
SET: dict[str, dict[str, object]] = {
    "c3a": {"block": 128},
    "fish": {"rows": 128},
    "intrinsic": {"at": VALUES},
    "said": {"at": VALUES},
}
"""Settings of a method that differ from its own in all jobs.

C3A: blocks of 256 do not tile a base that is 384 wide.  FISH: each example costs a backward pass over the whole base, and its
paper finds masks from 32 examples as good as from 1024.  Fastfood over all weights of a base takes ten seconds a step.
"""


def settings_of(task: str, method: str) -> Mapping[str, object] | None:
    """Settings of a method in a task's jobs that are not its own; None if there are none."""
    return (SOURCES[task].set.get(method) if task in SOURCES else None) or SET.get(method)


def plan(
    tasks: Sequence[str], base: str | None, methods: Sequence[str], seeds: Sequence[int], examples: Sequence[int] | None = None, steps: int | None = None
) -> Iterator[Job]:
    """All jobs, seed by seed, so that a run that is cut short has every method once; what is None is the task's own."""
    for seed in seeds:
        for task in map(source, tasks):
            known = [name for name in task.methods or methods if name in methods or name == task.reference]
            for count in examples or (task.examples,):
                for method in known:
                    if method != BASE or seed == seeds[0]:  # nothing about the base depends on a seed
                        yield Job(task.name, base or task.base, method, seed, count, steps or task.steps, rate_of(task.name, method))


def current(line: Mapping[str, Any]) -> bool:
    """Whether a result has the settings that its method has here now."""
    return line.get("set") == settings_of(str(line["task"]), str(line["method"]))


class Lines:
    """One line of JSON per measurement in one file; a torn last line (a killed run) is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, object]]:
        """All lines.

        Raises:
            DataError: a line that is not the last is no JSON object.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text("utf-8").split("\n")
        found: list[dict[str, object]] = []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                if number < len(lines):
                    raise DataError(f"{self.path}, line {number}: not a result") from None
        return found

    def append(self, values: Mapping[str, object]) -> None:
        """Append a line and see it on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(values, sort_keys=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Results(Lines):
    """The lines of `bench learn`, one per job."""

    def done(self) -> set[Job]:
        """The jobs that are in the file; one that failed, or was run with other settings (`SET`), is not done."""
        return {Job.of(line) for line in self.read() if "failed" not in line and current(line)}

    def tidy(self) -> int:
        """Drop the lines of failed jobs that were run again with success; gives their number."""
        lines, done = self.read(), self.done()
        kept = [line for line in lines if "failed" not in line or Job.of(line) not in done]
        if len(kept) < len(lines):
            new = self.path.with_suffix(".new")
            new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            new.replace(self.path)
        return len(lines) - len(kept)

    def add(self, job: Job, values: dict[str, object]) -> None:
        """Append a job's line."""
        self.append({**asdict(job), **values})
