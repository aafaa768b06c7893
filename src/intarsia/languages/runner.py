"""`run`: the stages of a recipe, one after the other, on corpora and labelled tables.

Every stage loads the base anew (with its LM head where MLM needs it, without one elsewhere), lays in the modules that it names, trains
one and keeps it as a value.  After each training the trainer has verified base and other modules bit by bit, and the digests of the
modules that a stage calls frozen are compared once more.  Modules are written into a folder as they come; a stage whose module is there
is not run again, so that an interrupted recipe goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from intarsia.bases import load as load_base
from intarsia.compose import expr
from intarsia.compose import names as names_of
from intarsia.data import Table, concat
from intarsia.errors import IntarsiaError, TrainingError, UsageError, listing
from intarsia.host import Host
from intarsia.languages.corpus.build import Corpus
from intarsia.languages.recipes import LanguageRecipe, Stage
from intarsia.languages.train import base_head, method_of, train_language, warm_head
from intarsia.languages.transfer import Compared, compare
from intarsia.languages.vocabulary.build import extend
from intarsia.modules import Module, load, save, write_atomic
from intarsia.tasks import TASKS, base_settings, build, head_for, method_settings, owner_of
from intarsia.train import Recipe, train


@dataclass(frozen=True, slots=True)
class Given:
    """What a recipe is run on.

    Attributes:
        base: name of the base.
        corpora: by language.
        train, dev, test: labelled tables by language; dev selects the task's checkpoint (the source's, never the target's).
        task: name of the task: classify, tag, parse ...
        task_settings: of the task.
        language_recipe, task_recipe: hyper-parameters.
        vocabulary_size: pieces of a vocabulary of its own; `vocabulary_rank`: of the codes of a factorised one.
        max_length: pieces per line of text.
        seed: of everything that is drawn.
    """

    base: str | Path
    corpora: Mapping[str, Corpus] = field(default_factory=dict)
    train: Mapping[str, Table] = field(default_factory=dict)
    dev: Mapping[str, Table] = field(default_factory=dict)
    test: Mapping[str, Table] = field(default_factory=dict)
    task: str = "classify"
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    language_recipe: Recipe = field(default_factory=Recipe)
    task_recipe: Recipe = field(default_factory=Recipe)
    vocabulary_size: int = 5_000
    vocabulary_rank: int = 100
    max_length: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ran:
    """What a recipe gave.

    Attributes:
        modules: by name.
        results: of the evaluation stages, in order.
        seconds: of training, by module; what was already there is absent.
    """

    modules: Mapping[str, Module]
    results: tuple[Compared, ...]
    seconds: Mapping[str, float]


class Turns(TrainerCallback):
    """Expressions that take turns, one per optimiser step: a function of the step alone, so that a resumed run repeats them."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self.expressions = [expr(text) for text in expressions]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        while not hasattr(model, "expression"):  # behind a wrapper for several processes
            model = model.module
        model.expression = self.expressions[state.global_step % len(self.expressions)]


def check(recipe: LanguageRecipe, given: Given, names: Mapping[str, str], kept: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages with their names, refused before anything is trained.

    Args:
        kept: names of modules that are there already.

    Raises:
        UsageError: the recipe waits for something, or text, labels or modules are lacking.
    """
    if recipe.ready_for:
        raise UsageError(f"the recipe {recipe.name!r} waits for {recipe.ready_for}; it is here as data only")
    stages = recipe.filled(**names)
    made = set(kept)
    for stage in stages:
        where = f"recipe {recipe.name!r}, stage {stage.kind} {stage.module or stage.expression!r}"
        lacks = [f"the corpus of {one}" for one in stage.text if one not in given.corpora]
        tables = given.test if stage.kind == "evaluate" else given.train
        lacks += [f"the {'test' if stage.kind == 'evaluate' else 'training'} labels of {one}" for one in stage.labels if one not in tables]
        wanted = {*_modules(stage), *stage.frozen, *stage.requires, stage.vocabulary, stage.head} - {"", stage.module}
        lacks += [f"the module {one}" for one in sorted(wanted) if one not in made]
        if lacks:
            raise UsageError(f"{where} lacks {listing(lacks)}")
        made.add(stage.module)
    return stages


def _modules(stage: Stage) -> list[str]:
    return [name for text in (stage.expression, *stage.cycle) if text for name in names_of(expr(text))]


def run(
    recipe: LanguageRecipe,
    given: Given,
    *,
    folder: str | os.PathLike[str],
    modules: Mapping[str, Module] | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Any = None,
    **names: str,
) -> Ran:
    """Carry a recipe out.

    Args:
        folder: where modules and run directories go; what is there already is taken over.
        modules: that are there before, by name (`lang-sme` of the store ...); a stage that would make one of them is passed over.
        note: told what happens.
        names: what the templates stand for: `source="eng", target="kab"`.

    Raises:
        UsageError: see `check`.
        TrainingError: something frozen changed.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Module] = dict(modules or {})
    stages = check(recipe, given, names, list(kept))
    results: list[Compared] = []
    seconds: dict[str, float] = {}
    for stage in stages:
        path = place / f"{stage.module}.safetensors"
        if stage.kind == "evaluate":
            note(f"evaluate {stage.expression} on {', '.join(stage.labels)}")
            results += _evaluate(stage, given, kept)
            continue
        if stage.module in (modules or {}):
            note(f"{stage.module}: as given")
            continue
        if path.exists():
            note(f"{stage.module}: taken from {path}")
            kept[stage.module] = load(path, name=stage.module)
            continue
        note(f"{stage.kind} {stage.module}" + (f": {stage.method}" if stage.method else ""))
        before = {name: kept[name].digest for name in stage.frozen}
        made, took = _DO[stage.kind](stage, given, kept, place / "runs" / stage.module, progress)
        changed = [name for name in stage.frozen if kept[name].digest != before[name]]
        if changed:
            raise TrainingError(f"stage {stage.kind} {stage.module}: {listing(changed)} changed, and should be frozen")
        save(made, path)
        kept[stage.module] = made
        seconds[stage.module] = took
    _write(place / "results.json", recipe, names, results, seconds)
    return Ran(kept, tuple(results), seconds)


def _resumable(folder: Path) -> bool:
    return (folder / "run.json").exists()


def _language(stage: Stage, given: Given, kept: Mapping[str, Module], folder: Path, progress: Any) -> tuple[Module, float]:
    base = base_head(given.base, stage.objective)  # type: ignore[arg-type]
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    made = train_language(
        host, base, [given.corpora[one] for one in stage.text], name=stage.module, method=method_of(stage.method, stage.settings),
        objective=stage.objective, recipe=given.language_recipe, vocabulary=kept.get(stage.vocabulary), head=kept.get(stage.head),  # type: ignore[arg-type]
        max_length=given.max_length, seed=given.seed, run_dir=folder, progress=progress, measure=False, resume=_resumable(folder),
    )  # fmt: skip
    return made.module, made.result.seconds


def _head(stage: Stage, given: Given, kept: Mapping[str, Module], folder: Path, progress: Any) -> tuple[Module, float]:
    base = load_base(given.base, head="none")
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    texts = [text for one in stage.text for text in given.corpora[one].texts()]
    held = [text for one in stage.text if (dev := given.corpora[one].dev) is not None for text in dev.texts("text")]
    result = warm_head(host, base, texts, held, name=stage.module, recipe=given.language_recipe, max_length=given.max_length, seed=given.seed, run_dir=folder, progress=progress)
    return result.module, result.seconds


def _vocabulary(stage: Stage, given: Given, kept: Mapping[str, Module], folder: Path, progress: Any) -> tuple[Module, float]:
    base = base_head(given.base, "mlm")
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    (language,) = stage.text
    texts = given.corpora[language].texts()
    made = extend(texts, base, host.fingerprint, name=stage.module, language=language, size=given.vocabulary_size, rank=given.vocabulary_rank, seed=given.seed, **stage.settings)
    return made.module, 0.0


def _task(stage: Stage, given: Given, kept: Mapping[str, Module], folder: Path, progress: Any) -> tuple[Module, float]:
    kind = TASKS[given.task]
    base = load_base(given.base, head="none" if kind.headless else None)
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    tables = [given.train[one] for one in stage.labels]
    table = concat(tables) if len(tables) > 1 else tables[0]
    held = [given.dev[one] for one in stage.labels if one in given.dev]
    method = method_of(stage.method, stage.settings)
    settings = {**base_settings(kind.name, base), **method_settings(kind.name, method), **given.task_settings}
    task = build(kind.name, base.tokenizer, table=table, settings=settings, model=base.model)
    for name in dict.fromkeys([*_modules(stage), *stage.frozen]):
        if name != stage.module:
            host.insert(kept[name], name=name)
    host.add(stage.module, method if task.head is None else method.with_head(task.head), seed=given.seed, roles={"task": kind.name})
    if stage.requires:
        host.describe(stage.module, requires=tuple(kept[name].digest for name in stage.requires))
    recipe = replace(given.task_recipe, trunk="off") if stage.cycle else given.task_recipe
    first = stage.cycle[0] if stage.cycle else stage.expression or stage.module
    result = train(
        host, stage.module, task, table, concat(held) if held else None, recipe=recipe, run_dir=folder, expression=first, progress=progress,
        callbacks=[Turns(stage.cycle)] if stage.cycle else [], resume=_resumable(folder),
    )  # fmt: skip
    return result.module, result.seconds


def _evaluate(stage: Stage, given: Given, kept: Mapping[str, Module]) -> list[Compared]:
    used = {name: kept[name] for name in _modules(stage)}
    owner = owner_of(list(used.values()))
    base = load_base(given.base, head=head_for(owner))
    host = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    for name, module in used.items():
        host.insert(module, name=name)
    return compare(host, used, [stage.expression], {one: given.test[one] for one in stage.labels}, batch_size=given.task_recipe.eval_batch_size)


_DO: Mapping[str, Callable[[Stage, Given, Mapping[str, Module], Path, Any], tuple[Module, float]]] = {
    "language": _language, "head": _head, "vocabulary": _vocabulary, "task": _task,
}  # fmt: skip


def _write(path: Path, recipe: LanguageRecipe, names: Mapping[str, str], results: Sequence[Compared], seconds: Mapping[str, float]) -> None:
    rows = [
        {
            "expression": one.expression, "data": one.data, "tokenizer": one.tokenizer, "majority": one.majority,
            "metrics": {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.size} for n, s in one.metrics.items()},
        }
        for one in results
    ]  # fmt: skip
    payload = {"recipe": recipe.name, "names": dict(names), "results": rows, "seconds": {k: round(v, 3) for k, v in seconds.items()}}
    try:
        text = json.dumps(payload, indent=1, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        raise IntarsiaError(f"{path}: a result is no number: {error}") from None
    write_atomic(path, [text], len(text))
