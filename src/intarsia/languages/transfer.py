"""`compare`: a task in a language by several expressions over stored modules, with the tokenizer that each expression wants.

A language module with a vocabulary reads text by its own tokenizer; the task's module, trained on the base's, answers on top of it.
The target's test data select nothing here: what runs is what the user says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.compose import expr, names
from intarsia.data import Table
from intarsia.errors import CompositionError, listing, nearest
from intarsia.host import Host
from intarsia.languages.vocabulary.tokenizer import tokenizer_of, vocabulary_of
from intarsia.modules import Module
from intarsia.tasks import BaseTask, evaluate, from_module, owner_of
from intarsia.tasks.metrics import Score


@dataclass(frozen=True, slots=True)
class Compared:
    """One expression on one table.

    Attributes:
        expression: what ran.
        data: name of the table.
        metrics: with intervals.
        counts: rows, truncated rows, unknown pieces ...
        tokenizer: name of the module whose tokenizer read the text, "" for the base's.
        majority: accuracy of always answering the most frequent label of the table, None where there are no labels.
        seconds: wall time.
    """

    expression: str
    data: str
    metrics: Mapping[str, Score]
    counts: Mapping[str, int]
    tokenizer: str
    majority: float | None
    seconds: float


def reader_of(modules: Sequence[Module], tokenizer: Any) -> tuple[str, Any]:
    """Name and tokenizer of the one module that brings a vocabulary; ("", the base's) if none does.

    Raises:
        CompositionError: two of them do.
    """
    with_words = [module for module in modules if vocabulary_of(module) is not None]
    if len(with_words) > 1:
        raise CompositionError(f"{listing(m.name for m in with_words)} each bring a vocabulary; text can be read by one tokenizer only")
    return (with_words[0].name, tokenizer_of(with_words[0], tokenizer)) if with_words else ("", tokenizer)


def compare(
    host: Host, modules: Mapping[str, Module], expressions: Sequence[str], tables: Mapping[str, Table], *, head: str | None = None, batch_size: int = 32,
    settings: Mapping[str, Any] | None = None, progress: Any = None,
) -> list[Compared]:  # fmt: skip
    """Evaluate expressions on tables.

    Args:
        host: carries the modules (`host.insert`), under the same names.
        head: the module whose head answers, where an expression has several.
        settings: of the task, in the place of those that the module was trained with.
        progress: called with (expression, table) before each evaluation.

    Raises:
        CompositionError: an expression names an unknown module, or two vocabularies.
    """
    found = []
    for text in expressions:
        parsed = expr(text)
        order = list(dict.fromkeys(ref.name for ref in parsed.refs()))
        unknown = [name for name in order if name not in modules]
        if unknown:
            raise CompositionError(f"the expression {text!r} names {unknown[0]!r}, which is no module given{nearest(unknown[0], modules)}; given: {listing(modules)}")
        own = [modules[name] for name in order]
        reader, tokenizer = reader_of(own, host.tokenizer)
        task = from_module(owner_of(own, head), tokenizer, model=host.model, settings=settings)
        for name, table in tables.items():
            if progress is not None:
                progress(text, name)
            done = evaluate(host, parsed, task, table, head=head, batch_size=batch_size)
            found.append(Compared(text, name, done.metrics, done.counts, reader, majority(task, table), done.seconds))
    return found


def majority(task: BaseTask[Any], table: Table) -> float | None:
    """Share of the most frequent label of a table."""
    if task.labels is None:
        return None
    counts = Counter(label for cell in task.label_cells(table) for label in cell)
    total = sum(counts.values())
    return max(counts.values()) / total if total else None


def reminders(modules: Mapping[str, Module], expressions: Sequence[str]) -> list[str]:
    """Warnings of the cards of everything that runs, once each; every output of this path carries them."""
    used = {name for text in expressions for name in names(expr(text))}
    return list(dict.fromkeys(f"{name}: {warning}" for name in sorted(used) if name in modules for warning in modules[name].card.warnings))
