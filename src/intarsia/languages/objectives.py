"""What a language module learns from a corpus: tables and tasks of `mlm`, `tlm`, both, and `align`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from intarsia.data import Table, concat
from intarsia.errors import DataError, UsageError
from intarsia.languages.corpus.build import Corpus
from intarsia.tasks import Align, BaseTask, base_settings, build

Objective = Literal["mlm", "tlm", "mlm+tlm", "align"]
OBJECTIVES: tuple[Objective, ...] = ("mlm", "tlm", "mlm+tlm", "align")
LENGTH = 128
"""Pieces per window where nobody asks for another length."""


@dataclass(frozen=True, slots=True)
class Learning:
    """Tables and task of one objective.

    Attributes:
        task: made for the tables.
        train, dev: tables; dev is None where the corpus has none.
    """

    task: BaseTask[Any]
    train: Table
    dev: Table | None


def learning(
    corpora: Sequence[Corpus], objective: Objective, tokenizer: Any, base: Any, *, lm_head: str = "new", settings: Mapping[str, Any] | None = None, max_length: int | None = None
) -> Learning:
    """The tables and the task of an objective.

    Args:
        corpora: one, or several whose lines are to be seen equally often (a bilingual module).
        tokenizer: the one that the module wants.
        base: as `intarsia.bases.load` gives it.
        lm_head: `new` for one of the module's own, `base` for the base's or that of another module.
        settings: of the task.

    Raises:
        DataError: the objective needs parallel verses and a corpus has none.
        UsageError: unknown objective or setting.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"an objective is one of {', '.join(OBJECTIVES)}; found {objective!r}")
    parts = [_tables(corpus, objective, tokenizer) for corpus in corpora]
    train = balanced([part[0] for part in parts])
    held = [part[1] for part in parts if part[1] is not None]
    dev = concat(held) if held else None
    chosen: dict[str, Any] = {"max_length": max_length or LENGTH, **(settings or {})}
    if objective == "align":
        task = build("align", tokenizer, settings={**base_settings("align", base), **chosen}, columns={}, model=base.model)
        assert isinstance(task, Align)
        task.teacher_tokenizer = base.tokenizer
        return Learning(task, train, dev)
    return Learning(build("mlm", tokenizer, settings={**chosen, "lm_head": lm_head}, columns={}), train, dev)


def _tables(corpus: Corpus, objective: Objective, tokenizer: Any) -> tuple[Table, Table | None]:
    if objective == "mlm":
        return corpus.train.only("text"), None if corpus.dev is None else corpus.dev.only("text")
    if corpus.parallel_train is None:
        raise DataError(f"{objective} learns from parallel verses, and the corpus for {corpus.language} has none; build it with --parallel OTHER_BIBLE")
    if objective == "align":
        both = (corpus.parallel_train.only("source", "target"), None if corpus.parallel_dev is None else corpus.parallel_dev.only("source", "target"))
        return both
    train = joined(corpus.parallel_train, tokenizer)
    dev = None if corpus.parallel_dev is None else joined(corpus.parallel_dev, tokenizer)
    if objective == "tlm":
        return train, dev
    mono = corpus.dev.only("text") if corpus.dev is not None else None
    return concat([corpus.train.only("text"), train]), mono


def joined(pairs: Table, tokenizer: Any) -> Table:
    """Parallel lines as one text, with what the tokenizer puts between two texts in between (TLM; Conneau & Lample 2019, arXiv 1901.07291).

    Positions go on through both, as in XLM-R's continued training, not anew for the second as in the paper.

    Raises:
        UsageError: the tokenizer puts nothing between texts.
    """
    between = separator(tokenizer)
    rows = zip(pairs.texts("source"), pairs.texts("target"))
    return Table.of({"text": [f"{a} {between} {b}" for a, b in rows]})


def separator(tokenizer: Any) -> str:
    """The special tokens between two texts, as text."""
    a, b = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", "e"))
    full = list(tokenizer("a", "e")["input_ids"])
    start = next((i + len(a) for i in range(len(full)) if full[i : i + len(a)] == a), len(full))
    end = next((i for i in range(start, len(full)) if full[i : i + len(b)] == b), start)
    tokens = tokenizer.convert_ids_to_tokens(full[start:end])
    if not tokens:
        raise UsageError(f"the tokenizer {type(tokenizer).__name__} puts nothing between two texts, so tlm cannot tell them apart")
    return " ".join(tokens)


def balanced(tables: Sequence[Table]) -> Table:
    """Rows of several tables, the smaller ones repeated so that each is seen equally often (to within one row)."""
    most = max(map(len, tables))
    return concat([table.select(i % len(table) for i in range(most)) for table in tables]) if len(tables) > 1 else tables[0]
