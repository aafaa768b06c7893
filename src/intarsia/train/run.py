"""`Run`: what happens between the steps of one training: log, evaluation, best tensors, early stopping, the clock.

Its state goes into every checkpoint, so that a resumed run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from intarsia.compose import Expr
from intarsia.data import Table
from intarsia.errors import TrainingError, listing
from intarsia.host import Host
from intarsia.modules import Module, save
from intarsia.train import rng
from intarsia.train.checkpoint import BEST, MODULE, Checkpoint, along_file, save_json
from intarsia.train.collapse import only_answer
from intarsia.train.evaluation import evaluate
from intarsia.train.progress import Progress
from intarsia.train.rates import rates
from intarsia.train.recipe import Recipe
from intarsia.train.record import Record
from intarsia.train.task import Features, Task


class Run:
    """The watch of a `ModuleTrainer`.

    Args:
        dev_features: of the dev table, None without one.
        per_epoch: steps of an epoch.
        total: steps of the run.
        found: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        task: Task,
        recipe: Recipe,
        expression: Expr,
        dev_table: Table | None,
        dev_features: Sequence[Features] | None,
        record: Record,
        per_epoch: int,
        total: int,
        progress: Progress,
        found: Checkpoint | None,
    ) -> None:
        self.host = host
        self.name = name
        self.task = task
        self.recipe = recipe
        self.expression = expression
        self.head = name if host.labels(name) is not None else None
        self.dev_table = dev_table
        self.dev_features = dev_features
        self.record = record
        self.progress = progress
        self.total = total
        self.per_epoch = per_epoch
        self.eval_every = recipe.eval_every or per_epoch
        self.save_every = recipe.save_every or (self.eval_every if dev_table is not None else per_epoch)
        self.done = 0
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.without_gain = 0
        self.best_module: Module | None = None
        self.also: tuple[str, ...] = ()
        self.best_along: dict[str, Module] = {}
        self.train_features: Sequence[Features] = ()
        self._seconds = 0.0
        self._began: float | None = None
        if found is not None:
            self._restore(found)

    def _restore(self, found: Checkpoint) -> None:
        state = found.run_state()
        self.done = found.step
        self.best, self.last, self.without_gain = state["best"], state["last"], state["without_gain"]
        self._seconds = state["seconds"]
        self.best_module = found.best() if self.best is not None and self.recipe.select_best else None
        if self.best_module is not None:
            self.best_along = {other: found.best_along(other) for other in found.plan.get("along", {})}
        self.record.rewind(state["history"])

    def begin(self) -> None:
        """The clock starts."""
        self._began = time.monotonic()
        self.progress.start("train", self.total, self.done)

    @property
    def trainable(self) -> int:
        """Parameters that are trained: those of the chosen entries, once they are chosen."""
        return self.host.size(self.name)

    @property
    def seconds(self) -> float:
        """Wall time of training so far, over all parts."""
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def stopped_early(self) -> bool:
        """Whether so many evaluations brought no gain that training ends."""
        return self.recipe.patience is not None and self.without_gain >= self.recipe.patience

    # -- the trainer's events ------------------------------------------------------------------------------------------

    def after_step(self, trainer: Any, control: Any) -> None:
        """Decide what follows a step."""
        self.done = step = trainer.state.global_step
        last = step >= self.total
        control.should_log = last or step == 1 or step % self.recipe.log_every == 0
        control.should_evaluate = self.dev_table is not None and (last or step % self.eval_every == 0)
        control.should_save = not last and step % self.save_every == 0
        if trainer.stopping and not last:
            control.should_save = control.should_training_stop = control.should_log = True
        self.progress.update(step)

    def logged(self, trainer: Any, values: Mapping[str, float]) -> None:
        """A line of the log."""
        entry = {"step": trainer.state.global_step, "epoch": round(trainer.state.global_step / self.per_epoch, 4), **values, **trainer.used_rates}
        self.record.line({**{k: finite(v) for k, v in entry.items()}, "seconds": round(self.seconds, 3)})
        self.progress.update(self.done, {k: v for k, v in values.items() if k == "loss"} | trainer.used_rates)

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """Evaluate on the dev set; keep the tensors if they are the best so far."""
        assert self.dev_table is not None
        step, metric = trainer.state.global_step, self.task.metric
        self.settle()
        with rng.kept():
            found = evaluate(
                self.host, self.expression, self.task, self.dev_table, self.dev_features or (), head=self.head,
                batch_size=self.recipe.eval_batch_size,
            )  # fmt: skip
        metrics = {key: plain_score(score) for key, score in found.scores.items()}
        if metric not in metrics:
            raise TrainingError(f"task {self.task.name!r} selects by {metric!r}, which is not among its metrics: {listing(metrics)}")
        value = metrics[metric]["value"]
        only = only_answer(found.predictions) if len(self.host.labels(self.name) or ()) > 1 else None
        self.last = {"step": step, "value": value, "metrics": metrics, "only": only}
        if step >= trainer.rules.settled and self._better(value):
            self.best, self.without_gain = self.last, 0
            if self.recipe.select_best:
                self.best_module = self.host.extract(self.name)
                self.best_along = {other: self.host.extract(other) for other in self.also}
        elif step >= trainer.rules.settled:
            self.without_gain += 1
        loss = None if found.loss is None else finite(found.loss)
        self.record.line(
            {"step": step, "epoch": round(step / self.per_epoch, 4), "dev_loss": loss, "dev_metric": value, "dev": metrics,
             "best": self.best is self.last, "seconds": round(self.seconds, 3)}
        )  # fmt: skip
        mark = " (best so far)" if self.best is self.last else ""
        shown = "undefined" if value is None else f"{value:.4f}"
        self.progress.note(f"step {step}: dev {metric} {shown}{mark}" + (f"  loss {loss:.4f}" if loss is not None else ""))
        if only is not None:
            self.progress.note(f"step {step}: all {len(found.predictions)} dev predictions are {only!r}")
        if self.stopped_early:
            self.progress.note(f"step {step}: {self.without_gain} evaluations without a better dev {metric}; stopping early")
            trainer.control.should_training_stop = True
        return {f"eval_{metric}": math.nan if value is None else value, "eval_loss": math.nan if loss is None else loss}

    def settle(self) -> None:
        """Let the task set what no gradient finds, from the training examples (its hook `settle`)."""
        hook = getattr(self.task, "settle", None)
        if hook is not None:
            with rng.kept():
                hook(self.host, self.name, self.expression, self.train_features, self.recipe.eval_batch_size)

    def _better(self, value: float | None) -> bool:
        if value is None:
            return False
        if self.best is None:
            return True
        best: float = self.best["value"]
        return value > best if self.task.higher_is_better else value < best

    def saved(self, trainer: Any, path: Path) -> None:
        """The module, the best one and the run's state, into a checkpoint's folder."""
        save(self.host.extract(self.name), path / MODULE)
        for other in self.also:
            save(self.host.extract(other), path / along_file(self.also, other))
        if self.best_module is not None and self.best is not None and self.best["step"] != trainer.state.global_step:
            save(self.best_module, path / BEST)
            for other, module in self.best_along.items():
                save(module, path / along_file(self.also, other, best=True))
        save_json(
            path / "run_state.json",
            {"best": self.best, "last": self.last, "without_gain": self.without_gain, "seconds": self.seconds, "history": self.record.history},
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> dict[str, Any] | None:
        """The evaluation of the tensors that are given back."""
        return self.best if self.recipe.select_best and self.best is not None else self.last

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Dev metrics of the tensors that are given back."""
        return {} if self.kept is None else dict(self.kept["metrics"])

    @property
    def best_step(self) -> int | None:
        """The step that the tensors given back are from, None without evaluation."""
        return None if self.kept is None else int(self.kept["step"])

    @property
    def warnings(self) -> list[str]:
        """What the user should know at the end."""
        found = []
        if self.kept is not None and self.kept["only"] is not None:
            head = rates(self.host.method(self.name), self.recipe)["head"].learning_rate
            found.append(
                f"all dev predictions of {self.name!r} are {self.kept['only']!r}: the module has collapsed to one class. Raise "
                f"head_learning_rate (it is {head:g}), train longer, or look at the labels (intarsia data check)"
            )
        return found

    def restore_best(self) -> None:
        """Put the best tensors back into the host."""
        if self.recipe.select_best and self.best_module is not None:
            put_tensors(self.host, self.name, self.best_module)
            for other, module in self.best_along.items():
                put_tensors(self.host, other, module)


def put_tensors(host: Host, name: str, module: Module) -> None:
    """Copy a module's tensors into those of the same module on a host.

    Raises:
        TrainingError: they are not the same tensors.
    """
    host.make_room(name, module.tensors)
    live = host.tensors(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in live.items()}
    stored = {key: tuple(tensor.shape) for key, tensor in module.tensors.items()}
    if shapes != stored:
        different = [key for key in {**shapes, **stored} if shapes.get(key) != stored.get(key)]
        raise TrainingError(f"the stored tensors are not those of module {name!r} on this host: {listing(different, 5)}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(module.tensors[key])


def plain_score(score: Any) -> dict[str, Any]:
    """`{value, low, high, n}` of a score of any kind; what is undefined is None."""
    if isinstance(score, int | float):
        return {"value": finite(score), "low": None, "high": None, "n": None}
    size = getattr(score, "size", getattr(score, "n", None))
    return {"value": finite(score.value), "low": finite(score.low), "high": finite(score.high), "n": size}


def finite(value: Any) -> Any:
    """The number, or None where it is NaN or infinite: JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
