"""What `eval` and `predict` share: a base with modules on it, the expression that runs, the task that reads its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import parse_values
from intarsia.cli.sources import header_of, pinned, read_modules
from intarsia.errors import CompositionError, UsageError, listing, nearest

if TYPE_CHECKING:
    from intarsia.compose import Expr
    from intarsia.host import Host
    from intarsia.modules import Module
    from intarsia.tasks import BaseTask
    from intarsia.train.config import EvalConfig, PredictConfig

BaseName = Annotated[str | None, typer.Option("--base", help="A folder, a name of `intarsia bases`, or a hub id; else what the module names.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--module", "-m", metavar="[NAME=]FILE", help="A module file, or store:NAME@VERSION; may be given several times."),
]
Expression = Annotated[
    str | None, typer.Option("--expr", help="What runs: 'swh >> ner', '0.5*de + 0.5*nl', 'average(a, b)'; else the only module.")
]
HeadOf = Annotated[str | None, typer.Option("--head", help="The module whose head answers, where several have one.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows of one forward pass.", min=1)]
ForceBase = Annotated[bool, typer.Option("--force-base", help="Use a module on a base with other weights than it was trained on.")]


@dataclass(frozen=True)
class Running:
    """A host with modules, ready to answer.

    Attributes:
        expression: what runs, as text.
        head: the module whose head answers, None where the expression has one at most.
        task: reads rows and outputs.
        forced: modules that were trained on another base, with the field that differs; what they answer is marked.
    """

    host: Host
    expression: str
    head: str | None
    task: BaseTask[Any]
    forced: Mapping[str, str] = field(default_factory=dict)


def module_files(given: Sequence[str] | None, expression: str | Expr | None = None) -> dict[str, str]:
    """`["a=x.safetensors", "y.safetensors"]` -> file by name; without a name it is the one in the file.

    Modules of the store (`store:NAME@VERSION`) are pinned to the hash of their file, see `sources.pinned`.

    Args:
        expression: names in it that begin with `store:` are modules too.

    Raises:
        UsageError: a name is given twice.
        StoreError: the store has no such module.
    """
    found: dict[str, str] = {}
    for item in given or ():
        name, equals, path = item.partition("=")
        if not equals or os.path.exists(item):
            name, path = header_of(item).name, item
        if name in found:
            raise UsageError(f"two modules are called {name!r}: {found[name]} and {path}; call one of them differently: --module NAME={path}")
        found[name] = path
    return pinned(found, expression)


def base_of(files: Mapping[str, str]) -> str:
    """The base that the first of some module files names on its card.

    Raises:
        UsageError: there is no module, or it names no base.
    """
    for path in files.values():
        if named := header_of(path).card.base:
            return named
        raise UsageError(f"{path} does not name its base; say it with --base")
    raise UsageError("say which module runs, e.g. --module NAME=FILE")


def defaults(values: dict[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Values for `load_config`: those of the flags, and the base that the modules name where nothing says it.

    Args:
        values: what the flags say.
        written: what the configuration file says.
    """
    files = pinned({**written.get("modules", {}), **values.get("modules", {})}, values.get("expression", written.get("expression")))
    if files:
        values["modules"] = files
    if "base" not in values and "base" not in written:
        values["base"] = base_of(files)
    return values


def start(config: EvalConfig | PredictConfig, task_settings: Sequence[str] | None, *, allow_network: bool, force_base: bool, checked: bool = True) -> Running:
    """Load base and modules and find out which task they are for.

    Args:
        checked: refuse an expression that may not run.

    Raises:
        CompositionError: no expression is given and there are several modules, or the expression is not legal.
        ModuleError: a module does not fit, or none of those that run says which task it is for.
    """
    from intarsia import bases
    from intarsia.compose import expr
    from intarsia.host import Host
    from intarsia.tasks import head_for, owner_of

    modules = read_modules(config.modules)
    expression = config.expression
    if expression is None:
        if len(modules) != 1:
            raise CompositionError(f"there are {len(modules)} modules: say what runs, e.g. --expr '{' >> '.join(modules) or 'NAME'}'")
        expression = next(iter(modules))
    parsed = expr(expression)
    order = list(dict.fromkeys(ref.name for ref in parsed.refs()))
    check_given(order, modules)
    owner = owner_of([modules[name] for name in order], config.head)
    loaded = bases.load(config.base, head=head_for(owner), allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    forced = inserted(host, modules, force_base=force_base)
    if checked:
        host.call(parsed, head=config.head)  # refused before anything is read
    return Running(host, str(parsed), config.head, build_task(owner, host, config.task_settings, task_settings), forced)


def check_given(named: Iterable[str], given: Mapping[str, object]) -> None:
    """Refuse an expression that names a module which is not given.

    Raises:
        CompositionError: says which, and what is given.
    """
    for name in named:
        if name not in given:
            raise CompositionError(f"the expression names {name!r}, which is no module given with --module{nearest(name, given)} given: {listing(given) or 'none'}")


def inserted(host: Host, modules: Mapping[str, Module], *, force_base: bool, marked: str = "what it answers says so") -> dict[str, str]:
    """Put modules on a host, and warn of those of another base that `force_base` lets through.

    Args:
        marked: where it stays written.

    Returns:
        The field that differs by the names of those modules.

    Raises:
        ModuleError: a module does not fit.
    """
    for name, module in modules.items():
        host.insert(module, name=name, force_base=force_base)
    forced = {name: difference for name, module in modules.items() if (difference := module.base.difference(host.fingerprint))}
    for name, difference in forced.items():
        Console().warn(f"module {name!r} belongs to another base ({difference}) and runs because of --force-base; {marked}")
    return forced


def build_task(owner: Module, host: Host, settings: Mapping[str, Any], pairs: Sequence[str] | None) -> BaseTask[Any]:
    """The task of a stored module, with some settings changed."""
    from intarsia.tasks import CONTEXT, TASKS, from_module

    changed = {**settings, **parse_values(pairs, "--task-set", TASKS[owner.context[CONTEXT]["name"]].defaults)}
    return from_module(owner, host.tokenizer, model=host.model, settings=changed)


class Passed:
    """A task's progress in batches, shown by a reporter.

    Args:
        what: the word in front of the bar.
    """

    def __init__(self, what: str, *, quiet: bool) -> None:
        from intarsia.train import reporter

        self.what = what
        self.inner = reporter(quiet=quiet)
        self.started = False

    def __call__(self, done: int, total: int) -> None:
        if not self.started:
            self.inner.start(self.what, total)
            self.started = True
        self.inner.update(done)
        if done >= total:
            self.inner.stop()
