"""The steps of the demo, one function each: read, check, train one module, run one expression on all languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia import bases, tasks
from intarsia.data import Table, check, concat, read
from intarsia.demo.files import data_path
from intarsia.demo.outcome import Accuracy, Outcome, Trained, Transfer
from intarsia.demo.plan import LANGUAGES, SOURCE, Plan
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Card, save
from intarsia.tasks import BaseTask
from intarsia.train import Progress, train

METRIC = "accuracy"
LICENCE = "CC-BY-SA-4.0"

Tables = Mapping[str, Table]


class Steps:
    """A progress that shows loops and leaves sentences out.  With `what` loops get that name."""

    def __init__(self, inner: Progress, what: str = "") -> None:
        self.inner = inner
        self.what = what

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.inner.start(self.what or what, total, done)

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        self.inner.update(done, values)

    def note(self, text: str) -> None:
        pass

    def stop(self) -> None:
        self.inner.stop()


def load_tables(plan: Plan) -> dict[str, Table]:
    """`train` and `dev` in English, and the test file of each language under its folder's name."""

    def one(name: str) -> Table:
        table = read(data_path(name), columns="text,label=category")
        return table if plan.rows is None else table[: plan.rows]

    english = {name: one(f"{SOURCE}/{name}.tsv") for name in ("train", "dev")}
    return {**english, **{code: one(f"{code}/test.tsv") for code in LANGUAGES}}


def check_data(outcome: Outcome, base: bases.Base, tables: Tables) -> None:
    """Check English with its three files, and each other language's test file against the English training file."""
    prefix = base.tokenizer(base.text_prefix, add_special_tokens=False)["input_ids"]  # stands before every text
    room = outcome.plan.max_length - len(prefix)
    for code in LANGUAGES:
        dev = tables["dev"] if code == SOURCE else None
        outcome.checks[code] = check(
            tables["train"], dev, tables[code], text="text", label="label", tokenizer=base.tokenizer, max_length=room
        )


def make_task(plan: Plan, base: bases.Base, table: Table, model: Any) -> BaseTask[Any]:
    """Topic classification on this base."""
    settings = {**tasks.base_settings("classify", base), "max_length": plan.max_length}
    return tasks.build("classify", base.tokenizer, table=table, settings=settings, model=model)


def train_one(host: Host, name: str, outcome: Outcome, task: BaseTask[Any], tables: Tables, folder: Path, progress: Progress) -> Trained:
    """Train a module of a method on English, measure it, and keep it as a file."""
    plan = outcome.plan
    assert task.head is not None
    host.add(name, build(name, **plan.methods[name]).with_head(task.head), roles={"task": "topic", "language": "eng"})
    result = train(host, name, task, tables["train"], tables["dev"], recipe=plan.recipe, progress=Steps(progress, name))
    kept = result.metrics[METRIC]
    dev = Accuracy(kept["value"], kept["low"], kept["high"], kept["n"])
    test = accuracy(tasks.evaluate(host, name, task, tables[SOURCE], batch_size=plan.recipe.eval_batch_size).metrics[METRIC])
    file = folder / f"{name}.safetensors"
    save(result.module.with_card(card_of(result.module.card, name)), file)
    trainable = sum(p.numel() for p in host.parameters(name).values())
    share = trainable / outcome.parameters
    return Trained(name, trainable, share, dev, test, result.seconds, file, file.stat().st_size)


def accuracy(score: tasks.Score) -> Accuracy:
    """A score with its interval."""
    assert score.low is not None and score.high is not None
    return Accuracy(score.value, score.low, score.high, score.size)


def card_of(card: Card, name: str) -> Card:
    """What the demo knows beyond what training wrote."""
    return replace(
        card,
        title=f"Topic of an English sentence ({name}, intarsia demo)",
        languages=("eng-Latn",),
        task="topic classification",
        data=tuple(replace(source, name=f"SIB-200 eng_Latn {source.name}", licence=LICENCE) for source in card.data),
        intended_use="Trying out intarsia.",
        out_of_scope="Anything else: a few hundred sentences of news and travel guides, one seed.",
        licence=LICENCE,
    )


def transfer(
    host: Host,
    name: str,
    expression: str,
    head: str | None,
    outcome: Outcome,
    task: BaseTask[Any],
    tables: Tables,
    progress: Progress,
    against: Transfer | None = None,
) -> Transfer:
    """Run an expression on the test files of all languages.

    Args:
        head: the module whose head answers.
        against: what to compare with, row by row.
    """
    table = concat([tables[code] for code in LANGUAGES])
    references = table.texts("label")
    bar = Steps(progress, name)
    bar.start(name, len(table))
    found = tasks.predict(
        host, expression, task, table, head=head, batch_size=outcome.plan.recipe.eval_batch_size, progress=lambda done, total: bar.update(done)
    )
    bar.stop()
    answers = tuple(str(p.value) for p in found)
    scores, at = {}, 0
    for code in LANGUAGES:
        end = at + len(tables[code])
        scores[code] = accuracy(tasks.score(METRIC, answers[at:end], references[at:end]))
        at = end
    gain = None if against is None else tasks.compare(METRIC, answers, against.answers, references)
    return Transfer(name, expression, scores, answers, gain)
