"""`train`: from a host, a module's name, a task and tables to a trained module with its card and its record.

    features -> heads measured -> steps, evaluations, checkpoints -> best tensors -> the module as a value

The base and all other modules are verified bit by bit at the end.  The caller's random state, modes and gradient flags are
as before; the host carries the trained tensors, and `Result.module` is the value to keep.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from intarsia._codec import encode
from intarsia.compose import Expr, Ref, expr, names
from intarsia.data import Table
from intarsia.errors import DataError, TrainingError, UsageError, listing, nearest
from intarsia.host import Host
from intarsia.methods.program import Explore, WarmUp
from intarsia.modules import Module, load, save
from intarsia.train import checkpoint as checkpoints
from intarsia.train import record as records
from intarsia.train import rng
from intarsia.train.allocator import pages_kept
from intarsia.train.calibrate import calibrate
from intarsia.train.checkpoint import Checkpoint
from intarsia.train.describe import card_of, described
from intarsia.train.evaluation import distributed
from intarsia.train.frozen import Frozen, restored
from intarsia.train.lock import locked
from intarsia.train.program import choose
from intarsia.train.progress import Progress, Quiet
from intarsia.train.rates import rates
from intarsia.train.recipe import Recipe
from intarsia.train.run import Run, put_tensors
from intarsia.train.signals import Interrupted, Stop, stopping
from intarsia.train.task import Features, Task, with_context
from intarsia.train.trunk import Trunk, Without, trunk

MODULE = "module.safetensors"
EXPLORE = "explore"
ALONG = "along"


@dataclass(frozen=True)
class Result:
    """What a training gave.

    Attributes:
        module: the trained module, with card, best tensors, plain form where its method says so.
        history: lines of `metrics.jsonl`.
        metrics: of the dev set at the step the module is from: name -> {value, low, high, n}; empty without dev data.
        seconds: wall time of training, over all parts of a resumed run.
        steps: optimiser steps taken.
        best_step: the step the module is from.
        warnings: what the user should know.
        path: the module's file; None without a run directory.
        others: modules that were trained along, by name.
    """

    module: Module
    history: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Mapping[str, Any]]
    seconds: float
    steps: int
    best_step: int
    warnings: tuple[str, ...] = ()
    path: Path | None = None
    others: Mapping[str, Module] = field(default_factory=dict)


def train(
    host: Host,
    name: str,
    task: Task,
    train_table: Table,
    dev_table: Table | None = None,
    *,
    recipe: Recipe | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    expression: Expr | str | None = None,
    along: Mapping[str, float | None] | Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Any] = (),
    config: Mapping[str, Any] | None = None,
) -> Result:
    """Train one module of a host on a table, or several of an expression.

    Args:
        host: carries the module (`Host.add`), and whatever else the expression names.
        name: of the module; all others stay as they are.
        task: made for the table; its head, if it has one, must be the module's.
        train_table: examples.
        dev_table: examples that select the best checkpoint and stop early.
        recipe: hyper-parameters; None for the defaults.
        run_dir: where checkpoints, log, curve and module go; None writes nothing and cannot be resumed.
        expression: what runs while training, e.g. `"swh >> ner"`; None for the module alone.
        along: other modules of the expression that are trained too, with a learning rate each (None for their method's):
            the skills under a router, a language module under a task. Their penalties count; phases and step rules of their
            methods are for modules that are trained alone.
        resume: go on from the newest complete checkpoint of the run directory.  A finished run gives its result again.
        progress: see `intarsia.train.progress`; None says nothing.
        callbacks: `transformers.TrainerCallback` objects.
        config: the resolved configuration, for `run.json`.

    Raises:
        TrainingError: the run directory is in use or used up, the checkpoint does not belong to this training, a file of it
            is missing or changed, the loss is not finite, or something frozen changed.
        Interrupted: a signal came; everything is saved.
        DataError: the task makes no examples of the table.
        UsageError: the expression does not name the module, or the module lacks the task's head.
    """
    recipe = recipe or Recipe()
    progress = progress or Quiet()
    chosen: Expr = Ref(name) if expression is None else expr(expression)
    also = dict(along) if isinstance(along, Mapping) else dict.fromkeys(along)
    _check(host, name, task, chosen, recipe, also)
    folder = None if run_dir is None else Path(run_dir)
    if folder is None and resume:
        raise UsageError("resume=True needs the run directory of the run to go on with (run_dir)")
    with contextlib.ExitStack() as stack:
        if folder is not None and _rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        if folder is not None:
            finished = _look(folder, resume)
            if finished is not None:
                progress.note(f"{folder}: this run is finished; nothing to do")
                return finished
            if distributed():
                torch.distributed.barrier()  # nobody writes before all have looked
        stack.enter_context(rng.kept())
        stack.enter_context(restored(host))
        stack.enter_context(pages_kept(host.model.device.type == "cpu"))
        stop = stack.enter_context(stopping())
        return _train(host, name, task, train_table, dev_table, recipe, folder, chosen, also, resume, progress, callbacks, config, stop)


def _check(host: Host, name: str, task: Task, expression: Expr, recipe: Recipe, also: Mapping[str, float | None]) -> None:
    """Refuse what cannot be trained, before anything is read or written."""
    for other in also:
        policy = host.method(other).policy
        if other == name or other not in names(expression):
            raise UsageError(f"along={other!r}: what is trained along is another module of the expression {expression}{nearest(other, names(expression))}")
        if policy.program or policy.steps or policy.gradients or policy.drop_layers:
            raise UsageError(f"along={other!r}: its method {host.method(other).name!r} has phases or step rules of its own; train it alone")
    if also and host.method(name).policy.program:
        raise UsageError(f"{name!r} ({host.method(name).name}) is trained in phases, alone; without along=")
    method = host.method(name)
    if name not in names(expression):
        raise UsageError(f"the expression {expression} does not name the module {name!r} that is to be trained{nearest(name, names(expression))}")
    host.call(expression)  # refuses unknown names and illegal compositions
    if task.head is not None and method.head is None:
        raise UsageError(
            f"task {task.name!r} needs a head and module {name!r} has none; add it with "
            f"host.add({name!r}, method.with_head(task.head))"
        )
    if task.head is None and method.head is not None:
        raise UsageError(f"task {task.name!r} is answered by the base's own head, but module {name!r} brings another: {method.head}")
    wanted, found = getattr(task.head, "labels", None), getattr(method.head, "labels", None)
    if wanted != found:
        raise UsageError(f"the labels of the task ({listing(wanted or ())}) are not those of module {name!r} ({listing(found or ())}), in this order")
    devices = {tensor.device for tensor in (*host.model.parameters(), *host.model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise TrainingError(f"the model is spread over {listing(sorted(map(str, devices)))}; training needs it on one device")
    settings = task.settings()
    if recipe.max_length is not None and settings.get("max_length", recipe.max_length) != recipe.max_length:
        raise UsageError(f"recipe: max_length={recipe.max_length}, but the task cuts at {settings['max_length']}; set one of them only")


def _look(folder: Path, resume: bool) -> Result | None:
    """What the run directory holds: refuse a used one without `resume`, return the result of a finished run with it."""
    facts = records.read_run(folder)
    used = facts is not None or (folder / checkpoints.FOLDER).is_dir()
    if used and not resume:
        raise TrainingError(
            f"the run directory {folder} holds a run already; go on with it (intarsia train --resume {folder}, resume=True) "
            "or choose another directory"
        )
    if not used and resume:
        raise TrainingError(f"the run directory {folder} holds no run to resume; start it without resume")
    if facts is None or facts.get("status") != "finished":
        return None
    kept = facts["result"]
    path = folder / MODULE
    module = load(path)
    if module.digest != kept["digest"]:
        raise TrainingError(f"{path} is not the module that this run gave: digest {module.digest[:12]}, {kept['digest'][:12]} was written")
    history = tuple(records.read_history(folder))
    others = {name: load(along_path(folder, name)) for name in facts.get("along", {})}
    return Result(module, history, kept["metrics"], kept["seconds"], kept["steps"], kept["best_step"], tuple(kept["warnings"]), path, others)


def _train(
    host: Host,
    name: str,
    task: Task,
    train_table: Table,
    dev_table: Table | None,
    recipe: Recipe,
    folder: Path | None,
    expression: Expr,
    also: Mapping[str, float | None],
    resume: bool,
    progress: Progress,
    callbacks: Sequence[Any],
    config: Mapping[str, Any] | None,
    stop: Stop,
) -> Result:
    """`train`, after everything has been checked and locked."""
    from intarsia.train.batches import Loader, lengths
    from intarsia.train.order import Pieces
    from intarsia.train.trainer import ModuleTrainer, arguments

    bind = getattr(task, "bind", None)
    if bind is not None:
        bind(host.model)  # what a task must know of the model that runs it (a decoder's own shift)
    features = _features(task, train_table, "training")
    notes = [f"training data: {_sentence(task.counts)}"]
    dev_features = None
    if dev_table is not None:
        dev_features = _features(task, dev_table, "dev")
        notes.append(f"dev data: {_sentence(task.counts)}")
    per_epoch = -(-len(features) // recipe.batch_size)
    total = recipe.max_steps or max(1, math.ceil(recipe.epochs * per_epoch - 1e-9))
    program = host.method(name).policy.program
    explored = {phase: phase.steps_of(total) for phase in program if isinstance(phase, Explore | WarmUp)}
    total = max(1, total - sum(explored.values()))
    device = host.model.device
    with tempfile.TemporaryDirectory(prefix="intarsia-") as spare:  # the Trainer wants a folder and writes nothing there
        args = arguments(recipe, device, total, spare)
        main = args.process_index == 0
        plan = _plan(host, name, task, train_table, dev_table, recipe, expression, total, args.world_size, also)
        begun = folder is not None and (not program or (folder / checkpoints.FOLDER).is_dir())
        found = _resumed(folder, plan, progress) if resume and folder is not None and begun else None
        if found is not None:
            put_tensors(host, name, found.module())
            for other in also:
                put_tensors(host, other, found.along(other))
        record = records.Record(folder if main else None, _facts(host, name, plan, recipe, device, args.world_size, config, resume, folder))
        run = Run(
            host, name, task, recipe, expression, dev_table, dev_features, record, per_epoch, total, progress if main else Quiet(), found
        )
        run.train_features = features
        for note in notes:
            run.progress.note(note)
        if found is None:
            if program:
                record.write(status="running")
                explore = partial(_explore, host, task, train_table, recipe, folder, explored, run.progress)
                for phase, count in choose(host, name, task, features, expression, recipe.seed, explore).items():
                    run.progress.note(f"{phase}: {count:,} entries of the base chosen")
            rng.seed_all("calibrate", recipe.seed)
            calibrate(host, name, task, features, expression=expression, rows=recipe.calibration_rows, seed=recipe.seed,
                      batch_size=recipe.eval_batch_size)  # fmt: skip
        host.trainable(name, *also)
        run.also = tuple(also)
        sizes = lengths(features, task.keys)
        order = Pieces(sizes, recipe.batch_size, recipe.accumulation, recipe.seed, recipe.group_by_length, args.process_index, args.world_size)
        frozen = Frozen(host, name, *also)
        begins = Without("several modules are trained") if also else trunk(host, name, task, features, expression, recipe, total, head=run.head, folder=folder)
        kept = begins if isinstance(begins, Trunk) else None
        if kept is not None:
            run.progress.note(f"trunk: {kept}")
        trainer = ModuleTrainer(
            host, name, task, Loader(task, features, order), recipe, args, expression=expression, head=run.head, watch=run,
            stop=stop, plan=plan, folder=folder, callbacks=callbacks, trunk=kept, also=also,
        )  # fmt: skip
        rng.seed_all("train", recipe.seed, args.process_index)  # the Trainer has seeded all processes alike
        record.write(status="running", trainable=run.trainable, total_steps=total,
                     trunk=begins.facts())  # fmt: skip
        try:
            with _checkpointing(host.model, recipe.gradient_checkpointing):
                run.begin()
                if found is None:
                    trainer.train()
                elif not run.stopped_early:
                    trainer.resume(found)
            frozen.verify()
        except BaseException as error:
            record.write(status="failed", error=f"{type(error).__name__}: {error}", seconds=run.seconds)
            raise
        finally:
            run.progress.stop()
            if kept is not None:
                kept.close(keep=trainer.stopping)
                if kept.whole:
                    run.progress.note(f"trunk: {kept.whole} batches ran through all blocks, since their tokens were not those that were kept")
                    record.write(trunk=kept.facts())
        steps = run.done
    if trainer.stopping and steps < total and not run.stopped_early:
        record.write(status="interrupted", seconds=run.seconds)
        how = f"intarsia train --resume {folder}" if folder is not None else "nothing was saved, there is no run directory"
        raise Interrupted(f"stopped by a signal after step {steps} of {total}; to go on: {how}", stop.received)
    return _finish(host, name, task, train_table, dev_table, recipe, folder if main else None, expression, run, steps, device)


def _explore(
    host: Host,
    task: Task,
    table: Table,
    recipe: Recipe,
    folder: Path | None,
    count: Mapping[Explore | WarmUp, int],
    progress: Progress,
    twin: str,
    expression: Expr,
    phase: Explore | WarmUp,
) -> None:
    """Train the twin of a module as a run of its own, in a folder below the module's, which can be resumed by itself."""
    below = None if folder is None else folder / EXPLORE
    facts = None if below is None else records.read_run(below)
    if below is not None and facts is not None and facts.get("status") != "finished" and not (below / checkpoints.FOLDER).is_dir():
        shutil.rmtree(below)  # killed before its first checkpoint: nothing to go on from
        facts = None
    rate = recipe.learning_rate if phase.learning_rate is None else phase.learning_rate
    recipe = replace(recipe, max_steps=count[phase], learning_rate=rate, select_best=False)
    try:
        result = train(host, twin, task, table, recipe=recipe, run_dir=below, expression=expression, progress=progress,
                       resume=facts is not None)  # fmt: skip
    except Interrupted as stop:
        how = f"intarsia train --resume {folder}" if folder is not None else "nothing was saved, there is no run directory"
        raise Interrupted(f"stopped by a signal while exploring; to go on: {how}", stop.exit_code - 128) from None
    put_tensors(host, twin, result.module)  # a finished run gives its result from its file


def _features(task: Task, table: Table, what: str) -> Sequence[Features]:
    features = with_context(task, task.features(table), table)
    if not features:
        raise DataError(f"no {what} examples: the table has {len(table)} rows, the task made none of them ({dict(task.counts)})")
    return features


def _sentence(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items() if value) or "nothing was counted"


def _plan(
    host: Host,
    name: str,
    task: Task,
    train_table: Table,
    dev_table: Table | None,
    recipe: Recipe,
    expression: Expr,
    total: int,
    world: int,
    also: Mapping[str, float | None],
) -> dict[str, Any]:
    """What defines the run: if any of it differs, going on from a checkpoint would be another training."""
    others = {other: host.extract(other).digest for other in sorted(names(expression)) if other != name and other not in also}
    along = {other: {"method": encode(host.method(other)), "learning_rate": rate} for other, rate in also.items()}
    return {
        **({"along": along} if along else {}),
        "name": name,
        "method": encode(host.method(name)),
        "task": {"settings": task.settings(), "labels": list(host.labels(name) or ())},
        "expression": str(expression),
        "modules": others,
        "recipe": recipe.values(),
        "train": train_table.digest,
        "dev": None if dev_table is None else dev_table.digest,
        "base": host.fingerprint.to_dict(),
        "steps": total,
        "world": world,
    }


def _resumed(folder: Path, plan: Mapping[str, Any], progress: Progress) -> Checkpoint:
    found, passed = checkpoints.latest(folder)
    for path in passed:
        progress.note(f"{path} is incomplete (killed while writing?); going on from {found.path.name} instead")
    differences = checkpoints.difference(found.plan, plan)
    if differences:
        raise TrainingError(
            f"the run in {folder} cannot go on as asked: {listing(differences, 6)}. Give the same data, task, module and recipe, "
            "or start anew in another directory"
        )
    return found


def _facts(
    host: Host,
    name: str,
    plan: Mapping[str, Any],
    recipe: Recipe,
    device: torch.device,
    world: int,
    config: Mapping[str, Any] | None,
    resume: bool,
    folder: Path | None,
) -> dict[str, Any]:
    """First contents of `run.json`."""
    before = records.read_run(folder) if resume and folder is not None else None
    resolved = {tag or "main": {"learning_rate": r.learning_rate, "decay": r.decay} for tag, r in rates(host.method(name), recipe).items()}
    return {
        **plan,
        "rates": resolved,
        "base_name": host.base_name,
        "config": None if config is None else dict(config),
        "versions": records.versions(),
        "machine": records.machine(device),
        "world": world,
        "began": before["began"] if before else records.now(),
        "resumed": [*(before or {}).get("resumed", ()), records.now()] if resume else [],
    }


@contextlib.contextmanager
def _checkpointing(model: Any, wanted: bool) -> Any:
    """Gradient checkpointing in this block; a model that has it on already keeps it."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in transformers 5
    if not wanted or getattr(model, f"is_{word}_checkpointing"):
        yield
        return
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()


def _finish(
    host: Host,
    name: str,
    task: Task,
    train_table: Table,
    dev_table: Table | None,
    recipe: Recipe,
    folder: Path | None,
    expression: Expr,
    run: Run,
    steps: int,
    device: torch.device,
) -> Result:
    """Best tensors into place, the module as a value, and the record completed."""
    if dev_table is None:
        run.settle()
    run.restore_best()
    for other in run.also:
        policy = host.method(other).policy
        card = card_of(host.extract(other, flatten=policy.flatten), task, train_table, dev_table, recipe, expression, run, device)
        host.describe(other, card=card)
    module = described(host, name, task, train_table, dev_table, recipe, expression, run, device)
    host.describe(name, context=module.context, requires=module.requires, card=module.card)
    path = None
    if folder is not None:
        path = folder / MODULE
        save(module, path)
        for other in run.also:
            (folder / ALONG).mkdir(exist_ok=True)
            save(host.extract(other), along_path(folder, other))
        _draw(folder, run, name, task)
        checkpoints.remove(folder)
        shutil.rmtree(folder / EXPLORE, ignore_errors=True)
    result = Result(
        module, tuple(run.record.history), run.metrics, run.seconds, steps, run.best_step or steps, tuple(run.warnings), path,
        {other: host.extract(other) for other in run.also},
    )
    kept = {"digest": module.digest, "metrics": run.metrics, "seconds": run.seconds, "steps": steps, "best_step": result.best_step,
            "warnings": list(run.warnings)}  # fmt: skip
    run.record.write(status="finished", ended=records.now(), seconds=run.seconds, result=kept)
    for text in run.warnings:
        warnings.warn(text, UserWarning, stacklevel=4)
    return result


def along_path(folder: Path, name: str) -> Path:
    """Where a finished run has a module that was trained along; two names never share a file."""
    word = "".join(f"%{ord(c):02X}" if c in "%/:" else c for c in name)
    return folder / ALONG / f"{word}.safetensors"


def _draw(folder: Path, run: Run, name: str, task: Task) -> None:
    from intarsia.train.curve import write_curve

    write_curve(folder, run.record.history, task.metric, f"{name}: {task.name}")


def _rank() -> int:
    """Number of this process, before any process group exists."""
    return int(os.environ.get("RANK", "0"))
