"""`intarsia lang`: a text in a language, looked at and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.options import (
    AllowNetwork,
    Settings,
    StoreFolder,
    TaskSettings,
    parse_pairs,
    parse_settings,
    parse_value,
    parse_values,
)
from intarsia.cli.verb import verb
from intarsia.errors import UsageError, nearest

if TYPE_CHECKING:
    from intarsia.languages.probe import Near, Probe
    from intarsia.languages.train import Trained
    from intarsia.languages.typology import Typology
    from intarsia.train import Recipe

Texts = Annotated[list[Path], typer.Argument(help="Text in the language: .txt, a Bible (.tsv, .xml), UDHR (.html), a treebank (.conllu), or a corpus folder.")]
Language = Annotated[str, typer.Option("--language", "--iso", "-l", help="Its BCP-47 tag or ISO 639 code: kab, kab-Latn.")]
BaseOf = Annotated[str, typer.Option("--base", help="A folder, a name of `intarsia bases`, or a hub id.")]
TypologyOf = Annotated[
    str | None, typer.Option("--typology", help="'uriel' (extra: typology), a CSV file with a column 'iso', or 'none'.", show_default="uriel if it is installed")
]
Tree = Annotated[Path | None, typer.Option("--glottolog", help="Folder of Glottolog's CLDF data (languages.csv).")]
TaskText = Annotated[list[Path] | None, typer.Option("--task-text", help="Texts of the task: are both in the same variety? (.txt, .conllu, .tsv with a column 'text')")]
BitsLines = Annotated[int, typer.Option("--bits-lines", help="Lines on which the base's LM head is measured; 0 for none.", min=0)]
Near_ = Annotated[int, typer.Option("--near", help="Neighbours of each kind.", min=1)]

CorpusFolders = Annotated[list[Path], typer.Argument(help="A corpus folder; several for one module of several languages, seen equally often.")]
MethodName = Annotated[str, typer.Option("--method", help="mad-x, lt-sft, lora, bitfit, full, or another of `intarsia methods`.")]
ObjectiveName = Annotated[str, typer.Option("--objective", help="mlm, tlm, mlm+tlm or align.")]
ModuleOut = Annotated[Path, typer.Option("--out", "-o", help="File of the new module.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder for checkpoints, log and curve.", show_default="runs/NAME")]
Vocabulary = Annotated[Path | None, typer.Option("--vocab", help="A vocabulary module that is trained along, see `intarsia vocab extend`.")]
LmHead = Annotated[Path | None, typer.Option("--lm-head", help="An LM head for a base without one, see `intarsia lang head`.")]
ModuleName = Annotated[str | None, typer.Option("--name", help="Name of the module.", show_default="lang-LANGUAGE")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the text (5).")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Optimiser steps; epochs then do not count.")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Lines of one step (16).")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate; the method's own if nothing is said.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Pieces per line; longer ones are read in windows (mlm) or cut (align).")]
Seed = Annotated[int, typer.Option("--seed", help="Of initial values, order and dropout.", min=0)]
RecipeField = Annotated[list[str] | None, typer.Option("--recipe", metavar="KEY=VALUE", help="Any hyper-parameter of training; several times.")]
KeepHead = Annotated[Path | None, typer.Option("--with-head", help="Also keep the module with its LM head, in this file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir, exactly.")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="A new language: from a text to a module.", no_args_is_help=True)
    for name, function in (("probe", probe), ("train", train), ("head", head)):
        verb(room, name)(function)
    app.add_typer(room, name="lang")


def probe(
    console: Console,
    texts: Texts,
    language: Language,
    base: BaseOf = "me5-small",
    store: StoreFolder = None,
    typology: TypologyOf = None,
    glottolog: Tree = None,
    task_text: TaskText = None,
    bits_lines: BitsLines = 32,
    near: Near_ = 5,
    allow_network: AllowNetwork = False,
) -> None:
    """Look at a text under a base: size, scripts, pieces, unknown words, neighbours with modules, and what to try.

    intarsia lang probe kab.txt --language kab --base me5-small
    """
    from intarsia.bases import load
    from intarsia.languages.probe import coverage_of
    from intarsia.languages.probe import probe as look
    from intarsia.languages.typology import Glottolog
    from intarsia.sites.fingerprint import fingerprint
    from intarsia.store.store import Store

    lines = [text for path in texts for text in lines_of(path)]
    vectors = typology_of(console, typology)
    tree = None if glottolog is None else Glottolog.read(glottolog)
    loaded = load(base, allow_network=allow_network)
    place = Store(store)
    coverage = coverage_of(place, fingerprint(loaded.model, loaded.tokenizer)) if place.names() else {}
    found = look(
        lines, language, loaded, typology=vectors, tree=tree, coverage=coverage, bits_lines=bits_lines, k=near,
        task_texts=[text for path in task_text or () for _, text in texts_of(path, "--task-text")],
    )  # fmt: skip
    console.result(found.to_dict(), lambda: _show(console, found))


def lines_of(path: Path) -> list[str]:
    """The lines of a text in a language, of whatever kind; the training lines of a corpus folder."""
    from intarsia.languages.corpus.build import read_corpus
    from intarsia.languages.corpus.sources import Source, kind_of, load

    return read_corpus(path).texts() if path.is_dir() else [line.text for line in load(Source(str(path), kind_of(path))).lines]


def texts_of(path: Path, option: str) -> list[tuple[str, str]]:
    """(place, text) of a task's file: a column `text` or `sentence`, tokens, both sides of pairs, or plain lines."""
    from intarsia.cli.data import TEXTS, guessed
    from intarsia.data import read

    table = read(path)
    return [
        (f"{path.name}:{line}", cell if isinstance(cell, str) else " ".join(cell))
        for name in guessed(table, TEXTS, f"a column called {' or '.join(TEXTS)} ({option})").split(",")
        for line, cell in zip(table.lines, table.column(name))
    ]


def typology_of(console: Console, given: str | None) -> Typology | None:
    """The feature vectors that a user asks for; without a word URIEL's, where they are installed."""
    from intarsia.languages.typology import read_csv, uriel

    if given == "none":
        return None
    if given is None:
        try:
            return uriel()
        except UsageError as error:
            console.note(str(error))
            return None
    return uriel() if given == "uriel" else read_csv(given)


def _show(console: Console, found: Probe) -> None:
    from intarsia.languages.evidence import CONFLICT

    m = found.measures
    total = sum(m.scripts.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in list(m.scripts.items())[:4])
    bits = found.bits_note if found.bits is None else f"{found.bits:.2f} ({found.bits_note})"
    rows: list[tuple[str, Any]] = [
        ("language", f"{found.language} ({found.iso})"),
        ("lines, words, characters", f"{m.lines:,}, {m.words:,}, {m.characters:,}"),
        ("scripts", shares or "no letters"),
        (f"pieces of the vocabulary in {m.script or 'this script'}", f"{m.pieces_in_script:,}"),
        ("words with unknown pieces", f"{m.unknown_word_share:.1%} ({m.unknown_piece_share:.1%} of the pieces)"),
        ("pieces per word", f"{m.pieces_per_word:.2f}"),
        ("bits per character", bits),
    ]
    if found.fit is not None:
        f = found.fit
        rows.append(("of the task's words / without marks / characters / 4-grams", f"{f.words:.1%} / {f.stripped:.1%} / {f.characters:.1%} / {f.grams:.1%} occur in the text"))
    console.table([found.base, ""], rows)
    if found.own_modules:
        console.line(f"modules of this language in the store: {', '.join(found.own_modules)}")
    near = found.neighbours
    if near is not None:
        console.heading(f"neighbours ({near.source}); path: {' > '.join(near.path)}")
        console.table(["language", "by", "distance or shared groups", "features of both", "modules in the store"], [_near(n) for n in near.near])
        seen = ", ".join(f"{block} {have} of {all_}" for block, (have, all_) in near.observed.items())
        if seen:
            console.line(f"observed features: {seen}")
    console.heading("what to try, and who found that")
    for row in found.advice:
        console.line(f"* {row.situation}: {row.first}")
        console.line(f"  compare with: {'; '.join(row.others)}")
        for finding in row.findings:
            console.line(f"  - {finding} [{row.grade}]")
    console.line(CONFLICT)
    for warning in found.warnings:
        console.line(f"warning: {warning}")


def _near(n: Near) -> list[object]:
    measure = f"{n.measure:g} groups" if n.by == "family" else f"{n.measure:.3f}"
    return [n.language, n.by, measure, n.shared or None, ", ".join(n.modules) or "none"]


def train(
    console: Console,
    corpus: CorpusFolders,
    out: ModuleOut,
    base: BaseOf = "me5-small",
    method: MethodName = "mad-x",
    objective: ObjectiveName = "mlm",
    set_: Settings = None,
    vocab: Vocabulary = None,
    lm_head: LmHead = None,
    name: ModuleName = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: Batch = None,
    lr: Rate = None,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    recipe: RecipeField = None,
    task_set: TaskSettings = None,
    run_dir: RunDir = None,
    with_head: KeepHead = None,
    resume: Resume = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Train a language module on a corpus.

    intarsia lang train corpora/kab --base me5-small --method lora --objective align --out lang-kab.safetensors
    """
    from intarsia.host import Host
    from intarsia.languages import objectives
    from intarsia.languages import train as languages
    from intarsia.languages.corpus.build import read_corpus
    from intarsia.methods import METHODS
    from intarsia.modules import load, save
    from intarsia.tasks import TASKS
    from intarsia.train import reporter

    for path in (out, with_head):
        if path is not None and path.exists():
            raise UsageError(f"{path} exists; give a new file name")
    if objective not in objectives.OBJECTIVES:
        raise UsageError(f"--objective {objective} is not one of {', '.join(objectives.OBJECTIVES)}")
    held = [read_corpus(folder) for folder in corpus]
    own = languages.NAMES.get(method, method)
    chosen = languages.method_of(method, parse_settings(set_, METHODS[own]) if set_ else None)
    loaded = languages.base_head(base, objective, allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    title = name or "lang-" + "-".join(one.language for one in held)
    settings = parse_values(task_set, "--task-set", TASKS["align" if objective == "align" else "mlm"].defaults)
    made = languages.train_language(
        host, loaded, held, name=title, method=chosen, objective=objective,
        recipe=recipe_of(epochs, max_steps, batch_size, lr, seed, recipe), vocabulary=None if vocab is None else load(vocab),
        head=None if lm_head is None else load(lm_head), settings=settings, max_length=max_length, seed=seed,
        run_dir=run_dir or Path("runs") / title, progress=reporter(quiet=console.quiet), resume=resume,
    )  # fmt: skip
    save(made.module, out)
    if with_head is not None:
        save(made.whole or made.module, with_head)
    _trained(console, made, out)


def head(
    console: Console,
    texts: Texts,
    out: ModuleOut,
    base: BaseOf = "me5-small",
    dev: Annotated[list[Path] | None, typer.Option("--dev", help="Text that selects the best checkpoint; several times.")] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: Batch = None,
    lr: Rate = None,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    recipe: RecipeField = None,
    run_dir: RunDir = None,
    allow_network: AllowNetwork = False,
) -> None:
    """Warm an LM head up for a base that has none, on texts in languages that the base knows; the base stays frozen."""
    from intarsia.host import Host
    from intarsia.languages.train import base_head, warm_head
    from intarsia.modules import save
    from intarsia.train import reporter

    if out.exists():
        raise UsageError(f"--out {out} exists; give a new file name")
    loaded = base_head(base, "mlm", allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    result = warm_head(
        host, loaded, [text for path in texts for text in lines_of(path)], [text for path in dev or () for text in lines_of(path)],
        recipe=recipe_of(epochs, max_steps, batch_size, lr, seed, recipe), max_length=max_length, seed=seed, run_dir=run_dir or Path("runs") / out.stem,
        progress=reporter(quiet=console.quiet),
    )  # fmt: skip
    save(result.module, out)
    told = {"file": str(out), "digest": result.module.digest, "steps": result.steps, "dev": {n: dict(m) for n, m in result.metrics.items()}}
    console.result(told, lambda: console.line(f"{out}: an LM head for {loaded.name}, {result.steps} steps in {result.seconds:.0f} s"))


def recipe_of(
    epochs: float | None, max_steps: int | None, batch_size: int | None, lr: float | None, seed: int, fields: list[str] | None
) -> Recipe:
    """The hyper-parameters that the options ask for."""
    from intarsia.train import Recipe

    given = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": lr, "seed": seed}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, text in parse_pairs(fields, "--recipe").items():
        if key not in Recipe.__dataclass_fields__:
            raise UsageError(f"--recipe: no hyper-parameter {key!r}{nearest(key, Recipe.__dataclass_fields__)}")
        values[key] = parse_value(text)
    return Recipe(**values)


def _trained(console: Console, made: Trained, out: Path) -> None:
    from intarsia.cli.evaluate import interval

    result = made.result
    bits = {name: None if found is None else found.bits for name, found in (("before", made.before), ("after", made.after))}
    cost = made.module.card.cost
    warnings = [*result.warnings, *made.module.card.warnings]
    told = {
        "file": str(out), "digest": made.module.digest, "steps": result.steps, "best_step": result.best_step, "seconds": round(result.seconds, 3),
        "dev": {name: dict(m) for name, m in result.metrics.items()}, "bits_per_character": bits, "trained": None if cost is None else cost.trainable,
        "bytes": out.stat().st_size, "warnings": warnings,
    }  # fmt: skip

    def human() -> None:
        console.line(f"{out}: {result.steps} steps in {result.seconds:.0f} s, {size_text(out.stat().st_size)}; base and frozen modules verified bit by bit")
        if result.metrics:
            console.table(["held out", *result.metrics], [["", *(interval(dict(m)) for m in result.metrics.values())]])
        if made.after is not None:
            before = "not measurable before" if made.before is None else f"{made.before.bits:.3f} before"
            console.line(f"bits per character: {before}, {made.after.bits:.3f} after ({made.after.note})")
        for warning in warnings:
            console.line(f"warning: {warning}")

    console.result(told, human)
