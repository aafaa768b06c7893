"""What the demo writes: `report.md`, the numbers as csv, the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from intarsia.data import Table, write
from intarsia.demo import plots
from intarsia.demo.outcome import Accuracy, Outcome, check_table, gain_line, language_table, method_table
from intarsia.demo.pages import page_table
from intarsia.demo.plan import LANGUAGES
from intarsia.methods import METHODS
from intarsia.modules import write_atomic


def write_report(out: Path, outcome: Outcome) -> None:
    """Write everything into a folder and note the files in `outcome.files`."""
    texts = {"report.md": markdown(outcome).encode("utf-8"), "cost-quality.png": plots.cost_quality(outcome), "languages.png": plots.languages(outcome)}
    for name, data in texts.items():
        write_atomic(out / name, [data], len(data))
    write(methods_csv(outcome), out / "methods.csv")
    write(languages_csv(outcome), out / "languages.csv")
    outcome.files[:] = [out / name for name in (*texts, "methods.csv", "languages.csv")]


def methods_csv(outcome: Outcome) -> Table:
    """The method table: one row per module, all digits."""
    rows = [
        {"method": t.method, "trainable": t.trainable, "share": t.share, **cells("dev", t.dev), **cells("test", t.test),
         "seconds": round(t.seconds, 2), "bytes": t.bytes}
        for t in outcome.trained
    ]  # fmt: skip
    return as_table(rows)


def languages_csv(outcome: Outcome) -> Table:
    """One row per expression and language."""
    rows = [
        {"name": t.name, "expression": t.expression, "language": code, **cells("accuracy", score)}
        for t in outcome.transfers
        for code, score in t.scores.items()
    ]
    return as_table(rows)


def cells(name: str, score: Accuracy) -> dict[str, float | int]:
    """An accuracy in four columns."""
    return {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high, f"{name}_n": score.n}


def as_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Rows of values as a table of strings."""
    return Table.of({key: [str(row[key]) for row in rows] for key in rows[0]})


def markdown(outcome: Outcome) -> str:
    """The report as a page."""
    plan, recipe = outcome.plan, outcome.plan.recipe
    singles = [t for t in outcome.transfers if t.gain is None]
    composed = [t for t in outcome.transfers if t.gain is not None]
    rows = next(t.test.n for t in outcome.trained)
    return f"""# intarsia demo

Small modules were trained on the frozen base `{outcome.base}` ({outcome.parameters:,} parameters) to tell the topic of an English
sentence, tried on {len(LANGUAGES) - 1} other languages, and laid together. {outcome.seconds:.0f} seconds on {outcome.machine};
intarsia {version("intarsia")}, torch {version("torch")}, transformers {version("transformers")}.

**How to read the numbers.** Accuracies are per cent of right answers with 95 % bootstrap intervals. One seed, {rows} test sentences
per language and {recipe.epochs:g} passes over the training data: intervals that overlap are not a ranking.

## Data

SIB-200 (topics) on FLORES-200 (sentences), CC BY-SA 4.0; source and licence are in `demo/data/LICENSE-DATA.md` of the package.

{page_table(*check_table(outcome))}

`*` not among the languages the base's vocabulary was made for.

## One module per method

Batches of {recipe.batch_size}, at most {plan.max_length} pieces per sentence. "Trainable" counts the module and its head.

{page_table(*method_table(outcome))}

![Trained parameters against test accuracy, with intervals](cost-quality.png)

{chr(10).join(f"- `{name}`: {METHODS[name].summary} `{METHODS[name].equation}` ({METHODS[name].source})" for name in plan.methods)}

## Other languages, without training on them

{page_table(*language_table(singles))}

## Laid together

`{plan.pair[0]}` and `{plan.pair[1]}` were trained alone and never saw each other. In `a >> b` the second works on what the first left
behind and its head answers; in `0.5*a + 0.5*b` both see the same input, and their changes and their logits are averaged.

{page_table(*language_table([t for t in singles if t.name == outcome.best] + composed))}

{chr(10).join(f"- {gain_line(t, outcome.best)}" for t in composed)}

![Accuracy of single modules and compositions in {len(LANGUAGES)} languages](languages.png)

## What this does not show

It is one task with a few hundred sentences of news and travel guides. The base was trained on web text and carries its
prejudices; no bias evaluation was made. Base: {outcome.source}, licence {outcome.licence}, weights `{outcome.weights}`.
"""
