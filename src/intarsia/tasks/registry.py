"""`TASKS`: name -> how to build a task; building one from settings, from a table, or from a stored module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from intarsia._codec import decode, name_of
from intarsia._registry import Registry
from intarsia.errors import DataError, ModuleError, UsageError, listing, nearest
from intarsia.tasks import columns
from intarsia.tasks.common import BaseTask, Options
from intarsia.tasks.text import limit
from intarsia.train.task import Rows

if TYPE_CHECKING:
    from intarsia.modules import Module

CONTEXT = "task"
"""Key of a module's context under which training stores `Task.settings()`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task: its factory and what is known before one is built.

    Attributes:
        name: public name.
        summary: one line for the documentation.
        options: its settings, a registered dataclass.
        roles: settings that name columns, in the order in which columns are looked for.
        required: roles without which a table cannot be for this task.
        make: `(tokenizer, options, labels) -> Task`.
        labels: the label inventory of a table, for tasks that need one.
        suit: settings that follow from a model, where the user says nothing.
        headless: answers come from a head of the module, so the base is loaded without one.
    """

    name: str
    summary: str
    options: type[Options]
    roles: tuple[str, ...]
    required: tuple[str, ...]
    make: Callable[[Any, Any, Sequence[str] | None], BaseTask[Any]]
    labels: Callable[[Any, Rows], Sequence[str]] | None = None
    suit: Callable[[Any], dict[str, Any]] = lambda model: {}
    headless: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Names and default values of the settings."""
        return {field.name: field.default for field in fields(self.options)}


TASKS: Registry[Kind] = Registry("task")


def build(
    name: str,
    tokenizer: Any,
    *,
    labels: Sequence[str] | None = None,
    table: Rows | None = None,
    columns: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Any = None,
) -> BaseTask[Any]:
    """A task bound to its tokenizer, columns and labels.

    Args:
        name: `classify`, `regress`, `tag`, `parse`, `mlm`, `clm`, `seq2seq`, or one that a package adds.
        labels: label names in the order of the outputs; None to take those of `table`, sorted.
        table: the training data: gives labels, and columns where `columns` is None.
        columns: role -> column, e.g. `{"text": "sentence", "label": "topic"}`.
        settings: other settings of the task, see `TASKS[name].defaults`.
        model: limits the length, and settles what depends on it (an LM head of its own, the decoder's shift).

    Raises:
        UsageError: unknown settings or roles, or labels are needed and neither given nor to be had.
        DataError: the table lacks a column or has no usable labels.
    """
    kind = TASKS[name]
    given = {**(kind.suit(model) if model is not None else {}), **(settings or {})}
    if columns is not None:
        given.update(_checked(kind, columns))
    elif table is not None:
        given = {**infer_columns(table, name), **given}
    options = _options(kind, given)
    if options.max_length is None:
        options = _options(kind, {**given, "max_length": limit(tokenizer, model)})
    if kind.labels is not None and labels is None:
        if table is None:
            raise UsageError(f"task {name!r} needs its labels: give labels=[...] or the table to take them from")
        labels = kind.labels(options, table)
    task = kind.make(tokenizer, options, labels if kind.labels is not None else None)
    if model is not None:
        bind(task, model)
    return task


def bind(task: Any, model: Any) -> None:
    """Give a task what it needs of the model that will run it (seq2seq: the decoder's own shift); most need nothing."""
    hook = getattr(task, "bind", None)
    if hook is not None:
        hook(model)


def from_module(module: Any, tokenizer: Any, *, model: Any = None, settings: Mapping[str, Any] | None = None) -> BaseTask[Any]:
    """The task a stored module was trained on.

    Args:
        settings: in the place of those that it was trained with.

    Raises:
        ModuleError: the module does not say, or says something that cannot be read.
    """
    stored = module.context.get(CONTEXT)
    if not isinstance(stored, Mapping) or not isinstance(stored.get("name"), str):
        raise ModuleError(
            f"module {module.name!r} does not say which task it was trained on (no {CONTEXT!r} in its context); "
            "build the task yourself with intarsia.tasks.build(...)"
        )
    kept = {key: value for key, value in stored.items() if key != "name"}
    return build(stored["name"], tokenizer, labels=module.labels, settings={**kept, **(settings or {})}, columns={}, model=model)


def owner_of(modules: Sequence[Module], head: str | None = None) -> Module:
    """The module whose task is run: the last one with labels (or the head that is named), else the last with a task.

    Raises:
        ModuleError: none says which task it is for.
    """
    told = [module for module in modules if CONTEXT in module.context and head in (None, module.name)]
    with_labels = [module for module in told if module.labels is not None]
    for found in (*reversed(with_labels), *reversed(told)):
        return found
    raise ModuleError(f"none of the modules {listing(m.name for m in modules) or '(none)'} says which task it was trained on; give the task's module")


def head_for(owner: Module) -> Literal["none"] | None:
    """The head to load a base with for a module's task (`intarsia.bases.load`): none where a module answers, else the base's own."""
    return "none" if owner.method.head is not None or TASKS[owner.context[CONTEXT]["name"]].headless else None


def base_settings(name: str, base: Any) -> dict[str, Any]:
    """Settings that follow from how a base was pretrained (`intarsia.bases.Base`): its text prefix and pooling."""
    known = TASKS[name].defaults
    pooling = {"cls": "first", "mean": "mean", "last": "last", "first": "first"}.get(
        getattr(base, "pooling", None) or ""
    )
    found = {"prefix": getattr(base, "text_prefix", ""), "pooling": pooling}
    return {key: value for key, value in found.items() if key in known and value}


def method_settings(name: str, method: Any) -> dict[str, Any]:
    """Settings of a task that a method (`intarsia.methods.Method`) prescribes: PERFECT its mask tokens."""
    known = TASKS[name].defaults
    return {key: method.settings[key] for key in _PRESCRIBED.get(method.name, ()) if key in known and key in method.settings}


def infer_columns(table: Rows, name: str | None = None) -> dict[str, str]:
    """Role -> column name, from the column names of a table.

    Args:
        name: the task; None for the one that the columns suggest (`infer_task`).

    Raises:
        DataError: a column that the task needs was not found.
    """
    kind = TASKS[name or infer_task(table)]
    found = columns.infer_columns(table, kind.roles)
    if not set(_TOGETHER) <= set(found):
        found = {role: name for role, name in found.items() if role not in _TOGETHER}
    missing = [role for role in kind.required if role not in found]
    if missing:
        raise DataError(
            f"task {kind.name!r}: which column is the {listing(missing)}? The table has "
            f"{listing(map(repr, columns.names(table)))}; say it, e.g. --columns {missing[0]}={(columns.names(table) or ('NAME',))[0]}"
        )
    return found


def infer_task(table: Rows) -> str:
    """The task that a table's columns suggest: the first that finds all it needs for training.

    Raises:
        DataError: none does.
    """
    for name, roles in _SUGGEST.items():
        if set(roles) <= set(columns.infer_columns(table, roles)):
            return name
    raise DataError(
        f"the columns {listing(map(repr, columns.names(table)))} suggest no task; name one of {listing(TASKS)} and its columns"
    )


#: method -> which of its settings are the task's
_PRESCRIBED = {"perfect": ("masks",)}

#: roles of which one without the other means nothing
_TOGETHER = ("prompt", "completion")

_SUGGEST = {
    "tag": ("tokens", "tags"),
    "parse": ("tokens", "heads", "relations"),
    "seq2seq": ("source", "target"),
    "clm": ("prompt", "completion"),
    "classify": ("text", "label"),
    "mlm": ("text",),
}


def _checked(kind: Kind, given: Mapping[str, str]) -> Mapping[str, str]:
    for role in given:
        if role not in kind.roles:
            raise UsageError(
                f"task {kind.name!r} has no column {role!r}{nearest(role, kind.roles)} known: {listing(kind.roles)}"
            )
    return given


def _options(kind: Kind, given: Mapping[str, Any]) -> Options:
    for key in given:
        if key not in kind.defaults:
            raise UsageError(
                f"task {kind.name!r} has no setting {key!r}{nearest(key, kind.defaults)} known: {listing(kind.defaults, 40)}"
            )
    options: Options = decode({"type": name_of(kind.options), **given}, kind.options, f"task {kind.name}")
    return options
