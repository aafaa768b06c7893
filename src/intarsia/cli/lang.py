"""`intarsia lang`: a text in a language, looked at and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork
from intarsia.cli.verb import verb

if TYPE_CHECKING:
    from intarsia.languages.probe import Near, Probe
    from intarsia.languages.typology import Glottolog, Typology

Texts = Annotated[list[Path], typer.Argument(help="Text in the language: .txt, a Bible (.tsv, .xml), UDHR (.html), a treebank (.conllu), or a corpus folder.")]
Language = Annotated[str, typer.Option("--language", "--iso", "-l", help="Its BCP-47 tag or ISO 639 code: kab, kab-Latn.")]
BaseOf = Annotated[str, typer.Option("--base", help="A folder, a name of `intarsia bases`, or a hub id.")]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="The store's folder.", show_default="$INTARSIA_STORE or ~/.local/share/intarsia")]
TypologyOf = Annotated[
    str | None, typer.Option("--typology", help="'uriel' (extra: typology), a CSV file with a column 'iso', or 'none'.", show_default="uriel if it is installed")
]
Tree = Annotated[Path | None, typer.Option("--glottolog", help="Folder of Glottolog's CLDF data (languages.csv).")]
TaskText = Annotated[list[Path] | None, typer.Option("--task-text", help="Texts of the task: are both in the same variety? (.txt, .conllu, .tsv with a column 'text')")]
BitsLines = Annotated[int, typer.Option("--bits-lines", help="Lines on which the base's LM head is measured; 0 for none.", min=0)]
Near_ = Annotated[int, typer.Option("--near", help="Neighbours of each kind.", min=1)]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="A new language: from a text to a module.", no_args_is_help=True)
    verb(room, "probe")(probe)
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
    from intarsia.sites.fingerprint import fingerprint
    from intarsia.store.store import Store

    lines = [text for path in texts for text in lines_of(path)]
    vectors = typology_of(console, typology)
    tree = None if glottolog is None else tree_of(glottolog)
    loaded = load(base, allow_network=allow_network)
    place = Store(store)
    coverage = coverage_of(place, fingerprint(loaded.model, loaded.tokenizer)) if place.names() else {}
    found = look(
        lines, language, loaded, typology=vectors, tree=tree, coverage=coverage, bits_lines=bits_lines, k=near,
        task_texts=[text for path in task_text or () for text in task_lines(path)],
    )  # fmt: skip
    console.result(found.to_dict(), lambda: _show(console, found))


def lines_of(path: Path) -> list[str]:
    """The lines of a text in a language, of whatever kind."""
    from intarsia.languages.corpus.sources import Source, kind_of, load

    return [line.text for line in load(Source(str(path), kind_of(path))).lines]


def task_lines(path: Path) -> list[str]:
    """The texts of a task's file: a column `text` or `sentence`, tokens, or plain lines."""
    from intarsia.cli.data import TEXTS, guessed
    from intarsia.data import read

    table = read(path)
    return [cell if isinstance(cell, str) else " ".join(cell) for name in guessed(table, TEXTS, "--task-text").split(",") for cell in table.column(name)]


def typology_of(console: Console, given: str | None) -> Typology | None:
    """The feature vectors that a user asks for; without a word URIEL's, where they are installed."""
    from intarsia.errors import UsageError
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


def tree_of(folder: Path) -> Glottolog:
    from intarsia.languages.typology import Glottolog

    return Glottolog.read(folder)


def _show(console: Console, found: Probe) -> None:
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
    from intarsia.languages.evidence import CONFLICT

    console.line(CONFLICT)
    for warning in found.warnings:
        console.line(f"warning: {warning}")


def _near(n: Near) -> list[object]:
    measure = f"{n.measure:g} groups" if n.by == "family" else f"{n.measure:.3f}"
    return [n.language, n.by, measure, n.shared or None, ", ".join(n.modules) or "none"]
