"""`bench learn`: train a method on a real task and measure score, size, time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from intarsia import bases, tasks
from intarsia.bench.jobs import Job, Results, shots, source, tables
from intarsia.errors import IntarsiaError, SiteError, SpecError
from intarsia.host import Host
from intarsia.methods import METHODS
from intarsia.modules import save
from intarsia.train import Interrupted, Recipe, train
from intarsia.train.record import machine, now, versions

LENGTH = 64


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


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters of the model left out by the caller's choice."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def run_job(job: Job, data: Path, *, dev_only: bool = False) -> dict[str, Any]:
    """Train, test, measure.

    Args:
        dev_only: score on the dev table, for the choice of learning rates.

    Returns:
        `refused` with the reason where the method does not exist on this base; else score, interval, sizes and times.
    """
    base = _base(job.base)
    train_table, dev, test = _tables(job.task, data)
    table = shots(train_table, min(job.examples, len(train_table)), job.seed)
    settings = {**tasks.base_settings("classify", base), "max_length": LENGTH, **tasks.method_settings("classify", METHODS[job.method].build())}
    facts = {"at": now(), "on": where(base.model.device)}
    start = time.perf_counter()
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    try:
        task = tasks.build("classify", base.tokenizer, table=table, settings=settings, model=base.model)
        assert task.head is not None
        try:
            host.add("m", METHODS[job.method].build().with_head(task.head), seed=job.seed)
        except (SiteError, SpecError) as error:
            return {"refused": str(error)}
        clock = _Clock()
        recipe = Recipe(max_steps=job.steps, batch_size=16, learning_rate=job.rate, seed=job.seed, max_length=LENGTH, base_dropout=False)
        with _peak() as largest:
            result = train(host, "m", task, table, recipe=recipe, callbacks=[clock])
            peak = largest()
        trainable = sum(p.numel() for p in {id(p): p for p in host.parameters("m").values()}.values())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.safetensors"
            save(result.module, path)
            stored = path.stat().st_size
        asked = {key: value for key in ("task", "language") for value in (job.task,)} if job.method.startswith("hyper") else {}
        found = tasks.evaluate(host, "m", task, dev[:500] if dev_only else test, batch_size=64, context=asked)
        score = found.metrics[task.metric]
    finally:
        host.close()
    return {
        "metric": task.metric, "score": score.value, "low": score.low, "high": score.high, "rows": score.size,
        "trainable": trainable, "stored": stored, "step_ms": round(1000 * statistics.median(clock.steps), 2), "peak_mib": None if peak is None else peak >> 20,
        "seconds": round(time.perf_counter() - start, 1), **facts,
    }  # fmt: skip


def run(jobs: Iterator[Job], data: Path, results: Results, say: Callable[[str], None]) -> int:
    """Run the jobs that are not in the results yet; gives their number."""
    done = results.done()
    count = 0
    for job in jobs:
        if job.key in done:
            continue
        try:
            values = run_job(job, data)
        except Interrupted:
            raise  # a signal ends the run, not one job
        except (IntarsiaError, RuntimeError, TypeError, ValueError) as error:  # one method's fault must not cost the others
            values = {"failed": f"{type(error).__name__}: {error}"}
        results.add(job, values)
        count += 1
        told = values.get("refused") or values.get("failed") or f"{values['score']:.3f} in {values['seconds']} s"
        say(f"{os.getpid()} {job.task} {job.method} seed {job.seed} n {job.examples}: {told}")
    return count
