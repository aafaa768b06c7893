"""`intarsia train`: a module from files, by flags or by a configuration file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.card import statements
from intarsia.cli.console import Console, size_text
from intarsia.cli.options import (
    AllowNetwork,
    Columns,
    ConfigFile,
    Encoding,
    Format,
    Header,
    Normalise,
    Settings,
    SkipBad,
    TaskSettings,
    parse_pairs,
    parse_settings,
    parse_value,
    parse_values,
    read_table,
    reading,
)
from intarsia.cli.running import ForceBase, Modules, inserted, module_files
from intarsia.cli.sources import pinned, read_modules
from intarsia.cli.verb import verb
from intarsia.errors import StoreError, UsageError

if TYPE_CHECKING:
    from intarsia.data import Table
    from intarsia.methods import Row
    from intarsia.tasks import BaseTask
    from intarsia.train import Result
    from intarsia.train.config import TrainConfig

Base = Annotated[str | None, typer.Option("--base", help="A folder, a name of `intarsia bases`, or a hub id.")]
Train = Annotated[list[str] | None, typer.Option("--train", "--data", help="Training data; may be given several times.")]
Dev = Annotated[list[str] | None, typer.Option("--dev", help="Data that select the best checkpoint; may be given several times.")]
TaskName = Annotated[str | None, typer.Option("--task", help="classify, regress, tag, parse, mlm, clm or seq2seq; else what the columns suggest.")]
MethodName = Annotated[str | None, typer.Option("--method", help="A method of `intarsia methods`; lora if nothing is said.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the new module; the method's if nothing is said.")]
Out = Annotated[str | None, typer.Option("--out", "-o", help="Run directory; runs/NAME if nothing is said.")]
Resume = Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this directory, exactly.", metavar="RUN")]
Lang = Annotated[list[str] | None, typer.Option("--lang", help="Language of the data (BCP-47: swh, kab-Latn); may be given several times.")]
Role = Annotated[list[str] | None, typer.Option("--role", metavar="KEY=VALUE", help="What the module is about, e.g. domain=news.")]
CardField = Annotated[list[str] | None, typer.Option("--card", metavar="KEY=VALUE", help="A statement of the card, e.g. licence=CC-BY-4.0; see `intarsia card set`.")]
RecipeField = Annotated[
    list[str] | None, typer.Option("--recipe", metavar="KEY=VALUE", help="Any hyper-parameter, e.g. warmup=0.1; may be given several times.")
]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the training data (5).")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Optimiser steps; epochs then do not count.")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Rows of one optimiser step, over all pieces and processes (16).")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate of the method; the method's own if nothing is said.")]
HeadRate = Annotated[float | None, typer.Option("--head-lr", help="Learning rate of a new head.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Pieces per row; longer rows are cut or read in windows.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of initial values, order and dropout (0).")]
Patience = Annotated[int | None, typer.Option("--patience", help="Stop after so many evaluations without a better dev metric.")]
Expression = Annotated[str | None, typer.Option("--expr", help="What runs while training, e.g. 'swh >> ner'; else the new module alone.")]
Along = Annotated[
    list[str] | None, typer.Option("--along", metavar="NAME[=LR]", help="A module of the expression that is trained along; may be given several times.")
]
New = Annotated[
    list[str] | None,
    typer.Option("--new", metavar="NAME=METHOD[:KEY=VALUE...]", help="A new module that is trained along, e.g. s0=lora:rank=4; may be given several times."),
]
Force = Annotated[bool, typer.Option("--force", help="Train although the data check objects.")]


def register(app: typer.Typer) -> None:
    verb(app, "train")(train)


def train(
    console: Console,
    base: Base = None,
    train: Train = None,
    dev: Dev = None,
    task: TaskName = None,
    method: MethodName = None,
    set_: Settings = None,
    name: Name = None,
    out: Out = None,
    config: ConfigFile = None,
    resume: Resume = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: Batch = None,
    lr: Rate = None,
    head_lr: HeadRate = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    patience: Patience = None,
    recipe: RecipeField = None,
    module: Modules = None,
    expr: Expression = None,
    new: New = None,
    along: Along = None,
    lang: Lang = None,
    role: Role = None,
    card: CardField = None,
    task_set: TaskSettings = None,
    format: Format = None,
    columns: Columns = None,
    encoding: Encoding = None,
    normalise: Normalise = None,
    skip_bad: SkipBad = None,
    header: Header = None,
    force: Force = False,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Train a module on a frozen base and keep it as a file.

    intarsia train --base me5-small --train train.tsv --dev dev.tsv --method lora --set rank=8
    """
    from intarsia.train.config import TrainConfig, load_config, read_file

    flags = {
        "base": base, "train": _one_or_many(train), "dev": _one_or_many(dev), "task": task, "method": method, "name": name, "out": out,
        "format": format, "expression": expr, "modules": module_files(module) or None, "method_seed": seed,
        "recipe.epochs": epochs, "recipe.max_steps": max_steps, "recipe.batch_size": batch_size, "recipe.learning_rate": lr,
        "recipe.head_learning_rate": head_lr, "recipe.max_length": max_length, "recipe.seed": seed, "recipe.patience": patience,
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    values |= {f"recipe.{k}": parse_value(v) for k, v in parse_pairs(recipe, "--recipe").items()}
    values |= {f"read_settings.{k}": v for k, v in reading(columns, encoding, normalise, skip_bad, header).items()}
    values |= {f"roles.{k}": v for k, v in parse_pairs(role, "--role").items()}
    values |= {f"card.{k}": v for k, v in statements(card, "--card").items()}
    if new:
        values["new"] = {name: fresh(text) for name, text in parse_pairs(new, "--new").items()}
    if along:
        values["along"] = {name: None if rate == "" else float_of(rate) for name, rate in (each.partition("=")[::2] for each in along)}
    if lang:
        values |= {"card.languages": lang, "roles.language": "+".join(lang)}
    if resume is not None:
        if values or config is not None or set_ or task_set:
            raise UsageError("--resume goes on with a run as it was started: give no other options (see its run.json)")
        chosen = load_config(TrainConfig, None, {**stored_config(resume), "out": str(resume)})
    else:
        written = read_file(config) if config is not None else {}
        values |= _settings(values, written, set_, task_set)
        chosen = load_config(TrainConfig, config, values | guesses(values, written))
        if modules := pinned(chosen.modules, chosen.expression):
            chosen = chosen.model_copy(update={"modules": modules})
    result, forced = run(console, chosen, resume=resume is not None, force=force, force_base=force_base, allow_network=allow_network)
    if int(os.environ.get("RANK", "0")) == 0:
        told = payload(result, chosen) | ({"forced_base": forced} if forced else {})
        console.result(told, lambda: _report(console, result, chosen))


def _one_or_many(given: list[str] | None) -> str | list[str] | None:
    return given[0] if given and len(given) == 1 else given or None


def _settings(values: Mapping[str, Any], written: Mapping[str, Any], set_: list[str] | None, task_set: list[str] | None) -> dict[str, Any]:
    """`--set` and `--task-set` as values by dotted key."""
    found: dict[str, Any] = {}
    if set_:
        row = method_row(values.get("method", written.get("method", "lora")))
        found |= {f"method_settings.{k}": list(v) if isinstance(v, tuple) else v for k, v in parse_settings(set_, row).items()}
    if task_set:
        from intarsia.tasks import TASKS

        name = values.get("task", written.get("task"))
        found |= {f"task_settings.{k}": v for k, v in parse_values(task_set, "--task-set", TASKS[name].defaults if name else {}).items()}
    return found


def guesses(values: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What nobody said and need not be asked: the name, the run directory, the task."""
    found: dict[str, Any] = {}

    def said(key: str, default: Any) -> Any:
        return values.get(key, written.get(key, default))

    name = said("name", None)
    if name is None:
        name = found["name"] = said("method", "lora")
    if said("out", None) is None:
        found["out"] = str(Path("runs") / str(name))
    if said("task", None) is None and said("train", None) is not None:
        from intarsia.tasks import infer_task

        settings = {**written.get("read_settings", {}), **{k.partition(".")[2]: v for k, v in values.items() if k.startswith("read_settings.")}}
        found["task"] = infer_task(read_table(said("train", ""), said("format", None), settings))
    return found


def stored_config(folder: Path) -> dict[str, Any]:
    """The configuration a run was started with.

    Raises:
        StoreError: the directory holds no run.
        UsageError: the run was not started by this command.
    """
    import json

    try:
        facts = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder / 'run.json'}: there is no run to go on with: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise UsageError(f"{folder / 'run.json'}: this run was not started by `intarsia train`; go on with it from Python: train(..., resume=True)")
    return dict(facts["config"])


def run(
    console: Console, config: TrainConfig, *, resume: bool, force: bool, force_base: bool, allow_network: bool
) -> tuple[Result, dict[str, str]]:
    """Train as a configuration says.

    Returns:
        The outcome, and the modules of another base that it was trained on top of, see `running.inserted`; cards name them.
    """
    from intarsia import bases, tasks
    from intarsia.host import Host
    from intarsia.methods import ROUTERS
    from intarsia.modules import Card, DataSource, complete, save
    from intarsia.train import reporter
    from intarsia.train import train as train_module

    recipe = config.build_recipe()
    sources = (DataSource("train"), *([] if config.dev is None else [DataSource("dev")]))
    complete(Card(data=sources), config.card)  # refused before training, not after
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in config.method_settings.items()}
    method = None if config.method in ROUTERS else method_row(config.method).build(**chosen)
    table = read_table(config.train, config.format, config.read_settings)
    dev = None if config.dev is None else read_table(config.dev, config.format, config.read_settings)
    kind = tasks.TASKS[config.task]
    base = bases.load(config.base, head="none" if kind.headless else None, allow_network=allow_network)
    settings = {**tasks.base_settings(kind.name, base), **({} if method is None else tasks.method_settings(kind.name, method)), **config.task_settings}
    if recipe.max_length is not None:
        settings.setdefault("max_length", recipe.max_length)
    task = tasks.build(kind.name, base.tokenizer, table=table, settings=settings, model=base.model)
    check_data(console, task, table, dev, force=force)
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    forced = inserted(host, read_modules(config.modules), force_base=force_base, marked="the card of what is trained says so")
    expression = config.expression
    for number, (name, given) in enumerate(config.new.items()):
        host.add(name, method_row(given["method"]).build(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "method"}), seed=config.method_seed + number)
    if method is None:
        expression = expression or fused([*config.modules, *config.new], config.name, config.method)
        chosen = {**keys_of(config.method, task, table, chosen), **chosen}
        method = host.router_method(config.name, config.method, expression, **chosen)
    host.add(config.name, method if task.head is None else method.with_head(task.head), seed=config.method_seed, roles=config.roles)
    if forced:
        marks = tuple(f"trained on top of {name!r}, which belongs to another base ({difference})" for name, difference in forced.items())
        for name in (config.name, *config.new, *config.along):
            card = host.extract(name).card
            host.describe(name, card=replace(card, warnings=tuple(dict.fromkeys((*card.warnings, *marks)))))
    console.note(f"{config.name}: {config.method} on {base.name}, {host.count(host.method(config.name)):,} trainable parameters")
    result = train_module(
        host, config.name, task, table, dev, recipe=recipe, run_dir=config.out, expression=expression, resume=resume,
        along={**dict.fromkeys(config.new), **config.along}, progress=reporter(quiet=console.quiet), config=config.model_dump(mode="json"),
    )  # fmt: skip
    written = result.path
    if config.card and written is not None:
        result = replace(result, module=result.module.with_card(complete(result.module.card, config.card)))
        save(result.module, written)
    return result, forced


def method_row(name: str) -> Row:
    """A method or a router by its name."""
    from intarsia.methods import METHODS, ROUTERS

    return ROUTERS[name] if name in ROUTERS else METHODS[name]


def fresh(text: str) -> dict[str, Any]:
    """`lora:rank=4` as values of a configuration.

    Raises:
        UsageError: a setting is none, or of another type.
        SpecError: there is no such method, or it has no such setting.
    """
    name, *pairs = text.split(":")
    row = method_row(name)
    return {"method": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in parse_settings(pairs, row).items()}}


def float_of(text: str) -> float:
    """A learning rate."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--along: {text!r} is no learning rate; write --along NAME or --along NAME=0.001") from None


def keys_of(kind: str, task: BaseTask[Any], table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a router's table, from the column of the training data that the task's `context` names.

    Raises:
        UsageError: it needs keys, and neither they nor a column are given.
    """
    from intarsia.train.task import context_columns

    row = method_row(kind)
    key = "tasks" if "tasks" in row.defaults else "keys"
    if key not in row.defaults or given.get(key):
        return {}
    wanted = str(given.get("context", row.defaults["context"]))
    columns = context_columns(task.options.context)
    if wanted in columns and columns[wanted] in table.names:
        return {key: tuple(sorted(set(map(str, table[columns[wanted]]))))}
    if key == "tasks":
        raise UsageError(f"{kind} has a row of weights per {wanted}: say which column tells it, --task-set context={wanted}=COLUMN, or --set tasks='[\"a\",\"b\"]'")
    return {}


def fused(modules: Sequence[str], router: str, kind: str) -> str:
    """The mixture of all modules that are given, with a new router.

    Raises:
        UsageError: there are not two of them.
    """
    from intarsia.compose import Ref, fuse

    if len(modules) < 2:
        raise UsageError("a router weighs modules: give two or more with -m NAME=FILE, or say what runs: --expr 'fuse(a, b; router=NAME)'")
    return str(fuse(*map(Ref, modules), router=router, space="phi" if kind == "polytropon" else "out"))


def check_data(console: Console, task: BaseTask[Any], table: Table, dev: Table | None, *, force: bool) -> None:
    """Look at the data before training on them; findings that make a result meaningless stop it.

    Raises:
        DataError: what was found, unless `force`.
    """
    from intarsia.data import check
    from intarsia.train.script import all_settings, text_columns

    options = task.options
    texts = text_columns(table, all_settings(task))
    label = next((getattr(options, role) for role in ("tags", "label", "value") if getattr(options, role, None) in table.names), None)
    prefix = task.tokenizer(getattr(options, "prefix", ""), add_special_tokens=False)["input_ids"]  # stands before every text
    several = getattr(options, "problem", "") == "multi"
    report = check(
        table, dev, text=texts, label=None if several else label, numeric_label=task.name == "regress", tokenizer=task.tokenizer,
        max_length=task.max_length - len(prefix),
    )  # fmt: skip
    for line in report.warnings:
        console.warn(line)
    if force:
        for line in report.errors:
            console.warn(line)
    report.require(force=force)


def payload(result: Result, config: TrainConfig) -> dict[str, Any]:
    """A training's outcome as plain values."""
    cost = result.module.card.cost
    return {
        "name": config.name,
        "file": None if result.path is None else str(result.path),
        "digest": result.module.digest,
        "parameters": None if cost is None else cost.trainable,
        "size": None if result.path is None else result.path.stat().st_size,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 3),
        "dev": {name: dict(score) for name, score in result.metrics.items()},
        "warnings": list(result.warnings),
        "card_missing": result.module.card.missing(),
    }


def _report(console: Console, result: Result, config: TrainConfig) -> None:
    from intarsia.cli.evaluate import interval

    told = payload(result, config)
    console.line(f"{config.name}: {told['parameters']:,} trained parameters, {result.steps} steps in {result.seconds:.0f} s, from step {result.best_step}")
    if result.metrics:
        console.table(["dev", "n", *result.metrics], [["", next(iter(result.metrics.values()))["n"], *(interval(dict(m)) for m in result.metrics.values())]])
    console.line(f"wrote {result.path} ({size_text(told['size'])}), and beside it run.json, metrics.jsonl, curve.png")
    if told["card_missing"]:
        console.line(f"its card lacks: {', '.join(told['card_missing'])} (--card KEY=VALUE)")
    console.line(f"Next:  intarsia eval -m {result.path} test=TEST_FILE\n       intarsia predict -m {result.path} --line 'some text'")
