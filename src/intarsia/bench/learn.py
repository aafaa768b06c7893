"""`bench learn`: train a method on a real task and measure score, size, time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from intarsia import bases, tasks
from intarsia.bench.jobs import BASE, Job, Results, settings_of, shots, source, tables
from intarsia.errors import IntarsiaError, SiteError, SpecError, UsageError
from intarsia.host import Host
from intarsia.methods import METHODS, Method
from intarsia.modules import save
from intarsia.train import Interrupted, Recipe, train
from intarsia.train.allocator import pages_kept
from intarsia.train.record import machine, now, versions


@lru_cache(maxsize=1)
def _base(name: str) -> bases.Base:
    return bases.load(name)


@lru_cache(maxsize=2)
def _tables(task: str, data: Path) -> Any:
    return tables(source(task), data)


class _Clock(TrainerCallback):
    """Processor time of every step: other work on the machine does not enter."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._from = 0.0

    def on_step_begin(self, *args: Any, **rest: Any) -> None:
        self._from = time.process_time()

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        self.steps.append(time.process_time() - self._from)


@contextlib.contextmanager
def _peak() -> Iterator[Callable[[], int | None]]:
    """Gives a function: the largest resident size of this process since the block began, in bytes; None where unknown."""
    known = True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        known = False

    def largest() -> int | None:
        if not known:
            return None
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    yield largest


def where(device: torch.device) -> str:
    """Machine and versions in a line."""
    found, number = machine(device), versions()
    return f"{found.get('processor', 'unknown')}, {torch.get_num_threads()} thread(s); " + ", ".join(f"{k} {number[k]}" for k in ("intarsia", "torch", "transformers") if k in number)


def run_job(job: Job, data: Path, *, dev_only: bool = False) -> dict[str, Any]:
    """Train, test, measure.

    Args:
        dev_only: score on (500 rows of) the dev table, for the choice of learning rates.

    Returns:
        `refused` with the reason where the method does not exist on this base; else score, interval, sizes and times.
    """
    base, about = _base(job.base), source(job.task)
    train_table, dev, test = _tables(job.task, data)
    if dev_only and dev is None:
        raise UsageError(f"{job.task} has no dev data to choose a learning rate on")
    table = shots(train_table, min(job.examples, len(train_table)), job.seed, "label" if about.kind == "classify" else None)
    given = settings_of(job.task, job.method)
    method = Method(BASE) if job.method == BASE else METHODS[job.method].build(**dict(given or {}))
    settings = {**tasks.base_settings(about.kind, base), "max_length": about.length, **about.settings, **tasks.method_settings(about.kind, method)}
    facts: dict[str, Any] = {"at": now(), "on": where(base.model.device)}
    if dev_only:
        facts["split"] = "dev"
    if given is not None:
        facts["set"] = dict(given)
    start = time.perf_counter()
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    try:
        task = tasks.build(about.kind, base.tokenizer, table=table, settings=settings, model=base.model)
        if job.method != BASE:
            try:
                host.add("m", method if task.head is None else method.with_head(task.head), seed=job.seed)
            except (SiteError, SpecError) as error:
                return {"refused": str(error)}
            facts = {**_trained(host, task, table, job), **facts}
        asked = dict.fromkeys(("task", "language"), job.task) if job.method.startswith("hyper") else {}
        rows = test if dev is None or not dev_only else dev[:500]
        with pages_kept():
            found = tasks.evaluate(host, None if job.method == BASE else "m", task, rows, batch_size=about.batch * 4, context=asked)
        score = found.metrics[task.metric]
    finally:
        host.close()
    return {
        "metric": task.metric, "score": score.value, "low": score.low, "high": score.high, "rows": score.size,
        "seconds": round(time.perf_counter() - start, 1), **facts,
    }  # fmt: skip


def _trained(host: Host, task: Any, table: Any, job: Job) -> dict[str, Any]:
    """Train the module `m` of a host; gives size, time and memory."""
    about, clock = source(job.task), _Clock()
    main, head = (None, job.rate) if job.method == "head" else (job.rate, None)
    recipe = Recipe(
        max_steps=job.steps, batch_size=about.batch, seed=job.seed, max_length=about.length, base_dropout=False,
        learning_rate=main, head_learning_rate=head,
    )  # fmt: skip
    with _peak() as largest:
        result = train(host, "m", task, table, recipe=recipe, callbacks=[clock])
        peak = largest()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save(result.module, path)
        stored = path.stat().st_size
    return {
        "trainable": host.size("m"),
        "stored": stored, "step_ms": round(1000 * statistics.median(clock.steps), 2), "peak_mib": None if peak is None else peak >> 20,
    }  # fmt: skip


def run(jobs: Iterable[Job], data: Path, results: Results, say: Callable[[str], None], *, dev_only: bool = False) -> int:
    """Run the jobs that are not in the results yet; gives their number."""
    results.tidy()
    done = results.done()
    count = 0
    for job in jobs:
        if job in done:
            continue
        try:
            values = run_job(job, data, dev_only=dev_only)
        except Interrupted:
            raise  # a signal ends the run, not one job
        except (IntarsiaError, RuntimeError, TypeError, ValueError) as error:  # one method's fault must not cost the others
            values = {"failed": f"{type(error).__name__}: {error}"}
        results.add(job, values)
        count += 1
        told = values.get("refused") or values.get("failed") or f"{values['score']:.3f} in {values['seconds']} s"
        rate = "" if job.rate is None else f" rate {job.rate:g}"
        say(f"{now()} {job.task} {job.method} seed {job.seed} n {job.examples}{rate}: {told}")
    return count
