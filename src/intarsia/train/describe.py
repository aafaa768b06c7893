"""The trained module as a value: method in its plain form, task settings in its context, and a card of what is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from intarsia.compose import Expr, names
from intarsia.data import Table
from intarsia.errors import SpecError
from intarsia.host import Host
from intarsia.modules import Card, Cost, DataSource, Metric, Module
from intarsia.train.rates import rates
from intarsia.train.recipe import Recipe
from intarsia.train.record import device_name
from intarsia.train.run import Run
from intarsia.train.script import all_settings, script_of
from intarsia.train.task import Task

CONTEXT = "task"
"""Key of a module's context that holds `Task.settings()`."""


def described(
    host: Host,
    name: str,
    task: Task,
    train_table: Table,
    dev_table: Table | None,
    recipe: Recipe,
    expression: Expr,
    run: Run,
    device: torch.device,
) -> Module:
    """The module as it is on the host, with everything that training knows of it.

    The card keeps what it already says; training fills in data, base, method, recipe, metrics and cost.
    """
    policy = host.method(name).policy
    module = host.extract(name, flatten=policy.flatten)
    others = [other for other in names(expression) if other != name]
    module = replace(
        module,
        requires=tuple(sorted({*module.requires, *(host.extract(other).digest for other in others)})),
        context={**module.context, CONTEXT: task.settings()},
    )
    return module.with_card(card_of(module, task, train_table, dev_table, recipe, expression, run, device))


def card_of(
    module: Module,
    task: Task,
    train_table: Table,
    dev_table: Table | None,
    recipe: Recipe,
    expression: Expr,
    run: Run,
    device: torch.device,
) -> Card:
    """A module's card with what a training knows."""
    tables = [train_table] if dev_table is None else [train_table, dev_table]
    used: dict[str, object] = recipe.values()
    resolved = rates(run.host.method(run.name), recipe)
    used.update(learning_rate=resolved[""].learning_rate, head_learning_rate=resolved["head"].learning_rate, weight_decay=resolved[""].decay,
                steps=run.done, best_step=run.best_step, expression=str(expression))  # fmt: skip
    languages = module.card.languages or _languages(module.roles.get("language", ""))
    spoken = languages[0] if len(languages) == 1 else ""
    metrics = tuple(
        Metric(metric, "dev", spoken, found["value"], found["low"], found["high"], found["n"], (recipe.seed,))
        for metric, found in run.metrics.items()
        if found["value"] is not None
    )
    old = module.card
    return replace(
        old,
        title=old.title or f"{module.name} ({task.name})" + f" for {run.host.base_name}" * bool(run.host.base_name),
        languages=languages,
        script=old.script or script_of(train_table, all_settings(task)),
        task=old.task or task.name,
        data=(*old.data, *(_source(table) for table in tables)),
        base=old.base or run.host.base_name,
        method=module.method.name,
        recipe=used,
        metrics=(*old.metrics, *metrics),
        cost=Cost(round(run.seconds, 3), device_name(device), run.host.size(module.name), module.nbytes),
        warnings=tuple(dict.fromkeys((*old.warnings, *run.warnings))),
    )


def _languages(role: str) -> tuple[str, ...]:
    """The language of a module's role, several joined by `+`, as far as they are tags."""
    tags = tuple(tag for tag in role.split("+") if tag)
    try:
        return Card(languages=tags).languages
    except SpecError:  # a role is free text
        return ()


def _source(table: Table) -> DataSource:
    files = dict.fromkeys("/".join(Path(file).parts[-2:]) for file in table.files)  # a folder often names the language
    return DataSource("+".join(files) or "memory", sha256=table.digest, rows=len(table))
