"""`ModuleTrainer`: the Hugging Face Trainer, with the parts replaced that decide what a step is.

    loss of a step = sum over all its terms / number of its terms        (all micro-batches, all processes)

The Trainer alone is wrong here for most model families when gradients are accumulated or processes share a step
(huggingface/transformers issue 47688).  Here the number of terms is counted before the forward, summed over processes, and
every micro-batch's sum is divided by it; DistributedDataParallel averages gradients, so the loss is multiplied by the number
of processes.  Kept from the Trainer: its loop, callbacks, clipping, scheduler and accelerate underneath.

What is not here: what a checkpoint consists of (`checkpoint.py`), when to evaluate, and what happens around the loop (`loop.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from intarsia.errors import TrainingError, listing
from intarsia.host import Host
from intarsia.train import checkpoint as checkpoints
from intarsia.train import rng
from intarsia.train.batches import Loader, Micro, moved
from intarsia.train.checkpoint import Checkpoint
from intarsia.train.rates import optimiser_groups, staged
from intarsia.train.recipe import Recipe
from intarsia.train.rules import Rules
from intarsia.train.signals import Stop
from intarsia.train.targets import targets_only
from intarsia.train.task import Batch, Task, context_of
from intarsia.train.trunk import Trunk


class Step(nn.Module):
    """What is differentiated: the model under an expression, and the task's loss.

    It holds the model as a submodule, so that DistributedDataParallel sees it; the Trainer sees no `PreTrainedModel` and so
    neither writes to its configuration nor chooses a loss by its class.
    """

    def __init__(self, host: Host, expression: Any, head: str | None, task: Task, precision: str, penalty: Callable[[], Tensor | None] | None = None, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.model = host.model
        self.__dict__["host"] = host
        self.expression = expression
        self.head = head
        self.task = task
        self.precision = precision
        self.__dict__["penalty"] = penalty or (lambda: None)
        self.more: Mapping[str, Any] = {}
        """What the present step adds to the call's context."""
        self.trunk = trunk
        self.examples: tuple[int, ...] = ()
        """The present batch's numbers among the features, for the trunk."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Sum of the losses of a batch, [], and the method's penalty where it is due, [].

        Both come from here: DistributedDataParallel takes a parameter that no output depends on for unused.
        """
        autocast: Any = contextlib.nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.model.device.type, torch.bfloat16)
        with self.__dict__["host"].using(self.expression, head=self.head, **context_of(self.task, batch), **self.more) as model, autocast, targets_only(self.model, self.task, batch):
            shorter = None if self.trunk is None else self.trunk.model(batch, self.examples)
            outputs = (shorter or model)(**{key: batch[key] for key in self.task.keys if key in batch})
        if isinstance(outputs.get("logits"), Tensor):
            outputs["logits"] = outputs["logits"].float()  # losses are summed in float32
        total, _ = self.task.loss(outputs, batch)
        return total, self.__dict__["penalty"]()


class Watch(Protocol):
    """What the run (`loop.py`) wants to know and to decide."""

    def after_step(self, trainer: ModuleTrainer, control: Any) -> None:
        """After an optimiser step: set `should_log`, `should_evaluate`, `should_save`, `should_training_stop`."""

    def logged(self, trainer: ModuleTrainer, values: Mapping[str, float]) -> None:
        """Loss, gradient norm and learning rates of the steps since the last log."""

    def evaluated(self, trainer: ModuleTrainer) -> Mapping[str, float]:
        """Evaluate now."""

    def saved(self, trainer: ModuleTrainer, path: Path) -> None:
        """Put the run's own files into the folder of a new checkpoint (process 0 only)."""


class _Hooks(TrainerCallback):
    """Forwards the Trainer's events to the watch."""

    def __init__(self) -> None:
        self.trainer: ModuleTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.trainer is not None
        self.trainer.check_finite()
        self.trainer.rules.before_step(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.trainer is not None
        self.trainer.rules.after_step(state.global_step + 1, self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.trainer is not None
        self.trainer.watch.after_step(self.trainer, control)


def arguments(recipe: Recipe, device: torch.device, total_steps: int, folder: str) -> TrainingArguments:
    """The Trainer's arguments; what it decides from them alone is switched off and decided here.

    Raises:
        TrainingError: the model is on a GPU that this process does not train on.
    """
    found = TrainingArguments(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        max_steps=total_steps,
        gradient_accumulation_steps=recipe.accumulation,
        max_grad_norm=recipe.clip or 0.0,
        seed=recipe.seed % 2**32,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=not recipe.gradient_checkpointing,
        ddp_broadcast_buffers=False,
    )
    if (found.device.type, found.device.index or 0) != (device.type, device.index or 0):
        raise TrainingError(
            f"the model is on {device}, this process trains on {found.device}; move it there with model.to(...), or choose "
            "the GPU with CUDA_VISIBLE_DEVICES"
        )
    if found.world_size == 1:
        found._n_gpu = min(found.n_gpu, 1)  # several GPUs in one process would mean DataParallel, which copies modules
    return found


class ModuleTrainer(Trainer):
    """Trains the parameters of one module of a host.

    Args:
        host: carries the module.
        name: of the module.
        task: loss and batches.
        loader: this process's micro-batches.
        recipe: hyper-parameters.
        args: see `arguments`.
        expression: what runs.
        head: the module whose head answers.
        watch: decides when to log, evaluate, save and stop.
        stop: whether a signal came.
        plan: what is written into every checkpoint's manifest.
        folder: run directory; None writes no checkpoints.
        callbacks: of the user.
        trunk: the states below the first trained block, where they are kept.
        also: other modules that are trained, with a learning rate each (None for their method's).
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        host: Host,
        name: str,
        task: Task,
        loader: Loader,
        recipe: Recipe,
        args: TrainingArguments,
        *,
        expression: Any,
        head: str | None,
        watch: Watch,
        stop: Stop,
        plan: Mapping[str, Any],
        folder: Path | None,
        callbacks: Sequence[TrainerCallback] = (),
        trunk: Trunk | None = None,
        also: Mapping[str, float | None] | None = None,
    ) -> None:
        self.also = dict(also or {})
        self.host = host
        self.name = name
        self.task = task
        self.loader = loader
        self.recipe = recipe
        self.expression = expression
        self.watch = watch
        self.stop = stop
        self.plan = plan
        self.folder = folder
        self._stopping = False
        self.used_rates: dict[str, float] = {}
        self.resumed: Checkpoint | None = None
        self._bad: tuple[float, tuple[int, ...]] | None = None
        self._rows: tuple[int, ...] = ()
        self.rules = Rules(host, name, recipe.seed, args.max_steps)
        self.step_module = Step(host, expression, head, task, recipe.precision, self._penalty, trunk)
        hooks = _Hooks()
        super().__init__(
            model=self.step_module,
            args=args,
            train_dataset=loader.dataset,
            callbacks=[hooks, *callbacks],
        )
        hooks.trainer = self
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's terms here, never by the Trainer

    def create_accelerator_and_postprocess(self) -> None:
        """An accelerator that leaves the model where it is: `.to("cpu:0")` would copy a model on `cpu`."""
        super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = False
        self.accelerator.gradient_accumulation_steps = 1  # `backward` divides by it; earlier Trainers let it

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """It stays where the host has it."""

    # -- a step --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """This process's micro-batches; the Trainer would shard and reorder them."""
        return self.loader

    def get_batch_samples(self, epoch_iterator: Iterator[Micro], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step, and the number of loss terms in the step on all processes."""
        micros = list(itertools.islice(epoch_iterator, num_batches))
        self._rows = tuple(row for micro in micros if micro.counts for row in micro.rows)
        terms = sum(micro.terms for micro in micros)
        self.rules.begin_step(self.state.global_step + 1)
        self.step_module.more = self.rules.context(self.state.global_step + 1)
        received = self.stop.received
        if self.args.world_size > 1:
            shared = torch.tensor([terms, received], dtype=torch.int64, device=self.args.device)
            dist.all_reduce(shared[:1])
            dist.all_reduce(shared[1:], op=dist.ReduceOp.MAX)
            terms, received = (int(value) for value in shared)
        if received:
            self.stop.received = received
            self._stopping = True  # decided before the step, so that all processes stop after the same one
        return [{"micro": micro} for micro in micros], max(terms, 1)

    @property
    def stopping(self) -> bool:
        """Whether this step is the last one because a signal came."""
        return bool(self.stop.received) if self.args.world_size == 1 else self._stopping

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss, times the number of processes."""
        micro: Micro = inputs["micro"]
        self._modes()
        batch = moved(micro.batch, self.args.device)
        self.step_module.examples = micro.examples
        total, penalty = model(batch)
        scale = self.args.world_size / float(num_items_in_batch)
        loss = total * scale if micro.counts else total * 0.0
        if not bool(torch.isfinite(total)):
            self._bad = self._bad or (float(total.detach()), micro.rows)
            loss = loss * math.nan  # so that every process sees it in the averaged gradient and stops
        if penalty is not None:
            loss = loss + penalty
        self.accelerator.backward(loss)
        return loss.detach()

    def _penalty(self) -> Tensor | None:
        """What the methods of all trained modules add to the loss, once per step."""
        due = self.rules.due
        found = [self.rules.penalty(), *(self.host.penalty(other) for other in self.also if due)]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    def _modes(self) -> None:
        """Training mode: trained modules always, the base if the recipe says so, other modules never."""
        self.host.model.train(self.recipe.base_dropout)
        for name in self.host.names:
            for _, deltas in self.host.deltas(name):
                for delta in deltas:
                    delta.train(name == self.name or name in self.also)

    def check_finite(self) -> None:
        """Before the optimiser's step: stop on a loss or gradient that is not finite, on every process."""
        self.used_rates = self.learning_rates()
        gradients = [p.grad for name in (self.name, *self.also) for p in self.host.parameters(name).values() if p.grad is not None]
        finite = not gradients or bool(torch.stack([torch.isfinite(g).all() for g in gradients]).all())
        if finite and self._bad is None:
            return
        loss, rows = self._bad or (math.nan, self._rows)
        what = f"the loss is {loss}" if self._bad else "the gradient is not finite"
        raise TrainingError(
            f"{what} at step {self.state.global_step + 1} (learning rate {max(self.used_rates.values()):.3g}); rows of the training table, counted "
            f"from 0: {listing(map(str, sorted(set(rows))), 32)}. No step was taken. Lower the learning rate, or look at these "
            "rows; `clip` bounds the gradient"
        )

    # -- optimiser -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW or SGD over the trained modules' parameters and nothing else."""
        if self.optimizer is None:
            groups = optimiser_groups(self.host, self.name, self.recipe)
            for name, rate in self.also.items():
                groups += optimiser_groups(self.host, name, replace(self.recipe, learning_rate=rate))
            if self.recipe.optimiser == "sgd":
                self.optimizer = torch.optim.SGD(groups)
            else:
                self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, see `staged`."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            shape = partial(staged, stages=self.rules.stages, warmup=self.recipe.warmup, total=num_training_steps, schedule=self.recipe.schedule)
            shapes: list[Callable[[int], float]] = [partial(shape, scaled=group.get("tag") != "head") for group in optimizer.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shapes)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of the main group and of the head, where they exist."""
        found: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            found.setdefault("head_learning_rate" if group["tag"] == "head" else "learning_rate", float(group["lr"]))
        return found

    # -- events --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the loss to the watch; the Trainer's closing summary is not a line of the log."""
        if "loss" in logs:
            names = {"loss": "loss", "grad_norm": "gradient_norm"}
            self.watch.logged(self, {names[k]: float(v) for k, v in logs.items() if k in names})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The watch's evaluation."""
        found = dict(self.watch.evaluated(self))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        if self.folder is None:
            return
        step, main = self.state.global_step, self.is_world_process_zero()
        path = checkpoints.folder(self.folder, step)
        if main:
            checkpoints.begin(self.folder, step)
        self.accelerator.wait_for_everyone()
        checkpoints.save_tensors(path / f"rng-{self.args.process_index}.pt", rng.state())
        self.accelerator.wait_for_everyone()
        if main:
            checkpoints.save_tensors(path / "optimizer.pt", self.optimizer.state_dict())
            checkpoints.save_tensors(path / "scheduler.pt", self.lr_scheduler.state_dict())
            checkpoints.save_tensors(path / "rules.pt", self.rules.state())
            self.state.save_to_json(str(path / "trainer_state.json"))
            self.watch.saved(self, path)
            checkpoints.complete(path, step, self.plan)
            checkpoints.rotate(self.folder, self.recipe.keep)
        self.accelerator.wait_for_everyone()

    def resume(self, found: Checkpoint) -> Any:
        """Go on from a checkpoint whose module is already in place."""
        self.resumed = found
        self.loader.set_epoch(found.step // self.loader.plan.steps_per_epoch)  # earlier Trainers lose it on skipping batches
        return self.train(resume_from_checkpoint=str(found.path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The module is in place before the trainer is made."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            self.optimizer.load_state_dict(self.resumed.tensors("optimizer.pt"))
            self.lr_scheduler.load_state_dict(self.resumed.tensors("scheduler.pt"))
            self.rules.restore(self.resumed.tensors("rules.pt"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """No scaler: bf16 needs none."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            rng.restore(self.resumed.tensors(f"rng-{self.args.process_index}.pt"))
