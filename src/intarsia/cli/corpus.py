"""`intarsia corpus`: from files in a language to a folder with text, splits and a manifest of what was dropped and why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.lang import Language, lines_of, texts_of
from intarsia.cli.options import parse_pairs
from intarsia.cli.verb import verb
from intarsia.errors import DataError, UsageError

if TYPE_CHECKING:
    from intarsia.languages.corpus.build import Corpus
    from intarsia.languages.corpus.filters import Filter, Normalise
    from intarsia.languages.corpus.sources import Source

Out = Annotated[Path, typer.Option("--out", "-o", help="A new folder.")]
Text = Annotated[list[Path] | None, typer.Option("--text", help="Plain text, a sentence a line; may be given several times.")]
Bible = Annotated[list[Path] | None, typer.Option("--bible", help="A Bible by verse: .tsv (id, text) or .xml.")]
Udhr = Annotated[list[Path] | None, typer.Option("--udhr", help="The Universal Declaration of Human Rights: .html or .xml.")]
Treebank = Annotated[list[Path] | None, typer.Option("--treebank", help="Sentences of a treebank (.conllu).")]
Licence = Annotated[list[str] | None, typer.Option("--licence", help="Of all sources, or of one: FILE=LICENCE.")]
Form = Annotated[str, typer.Option("--normalise", help="Unicode normalisation: NFC, NFD, NFKC, NFKD or none.")]
Lower = Annotated[bool, typer.Option("--lower", help="Lower case, for a text in capitals whose task is not.")]
Strip = Annotated[list[str] | None, typer.Option("--strip-mark", metavar="U+0305", help="A combining mark to take away; may be given several times.")]
Romanise = Annotated[str | None, typer.Option("--romanise", help="In Latin letters: anyascii, uroman or marks.")]
ScriptOf = Annotated[str | None, typer.Option("--script", help="Drop lines that are not mostly in this script (Latin, Coptic, Ol Chiki).")]
LeastWords = Annotated[int, typer.Option("--least-words", help="Words a line has at least.", min=1)]
Longest = Annotated[int, typer.Option("--most-characters", help="Characters a line has at most.", min=1)]
Lid = Annotated[list[str] | None, typer.Option("--lid", metavar="TAG=FILE", help="Drop lines that look like this language, whose text is in FILE; several times.")]
LidOwn = Annotated[Path | None, typer.Option("--lid-own", help="Text that shows what the language looks like.", show_default="the corpus itself")]
Margin = Annotated[float, typer.Option("--lid-margin", help="By how much another language must fit better (nats per n-gram).")]
Near = Annotated[float, typer.Option("--near-duplicates", help="Jaccard index of 5-grams from which a line repeats another; above 1: equal lines only.")]
Personal = Annotated[list[Path] | None, typer.Option("--personal-data", help="A list, an entry a line: lines that hold one are dropped.")]
Toxic = Annotated[list[Path] | None, typer.Option("--toxicity", help="The same for words that hurt.")]
Dev = Annotated[float, typer.Option("--dev", help="Share of the lines that is held out: whole books, blocks of other text.")]
Books = Annotated[list[str] | None, typer.Option("--dev-book", help="A book to hold out (ROM); several times.", show_default="chosen by size")]
Parallel = Annotated[Path | None, typer.Option("--parallel", help="The same verses in another language, for TLM and alignment.")]
ParallelLanguage = Annotated[str, typer.Option("--parallel-language", help="Its tag.")]
TestTexts = Annotated[list[Path] | None, typer.Option("--test-texts", help="Test data of the task: refused if they are in the corpus; several times.")]
DropOverlap = Annotated[bool, typer.Option("--drop-overlap", help="Take lines with test sentences out instead of refusing.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the blocks that are held out.", min=0)]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Text in a language: build a corpus and look at it.", no_args_is_help=True)
    verb(room, "build")(build)
    verb(room, "show")(show)
    verb(room, "romanise")(romanise_table)
    app.add_typer(room, name="corpus")


def build(
    console: Console,
    out: Out,
    language: Language,
    text: Text = None,
    bible: Bible = None,
    udhr: Udhr = None,
    treebank: Treebank = None,
    licence: Licence = None,
    normalise: Form = "NFC",
    lower: Lower = False,
    strip_mark: Strip = None,
    romanise: Romanise = None,
    script: ScriptOf = None,
    least_words: LeastWords = 1,
    most_characters: Longest = 5_000,
    lid: Lid = None,
    lid_own: LidOwn = None,
    lid_margin: Margin = 0.1,
    near_duplicates: Near = 0.8,
    personal_data: Personal = None,
    toxicity: Toxic = None,
    dev: Dev = 0.05,
    dev_book: Books = None,
    parallel: Parallel = None,
    parallel_language: ParallelLanguage = "en",
    test_texts: TestTexts = None,
    drop_overlap: DropOverlap = False,
    seed: Seed = 0,
) -> None:
    """Clean text, drop repeats, hold out books, refuse what overlaps with a test set; everything dropped is counted and kept beside.

    intarsia corpus build --language kab --bible kab.tsv --licence CC0-1.0 --test-texts test.tsv --out corpora/kab
    """
    from intarsia.languages.corpus import build as corpora
    from intarsia.languages.corpus.filters import Normalise
    from intarsia.languages.corpus.sources import Source, kind_of
    from intarsia.languages.tags import iso639_3

    iso639_3(language)
    if out.exists():
        raise UsageError(f"--out {out} exists; a corpus is not overwritten")
    groups = {"text": text, "bible": bible, "udhr": udhr, "treebank": treebank}
    sources = sources_of(groups, licence, parallel)
    filters = filters_of(
        sources, language, Normalise(normalise, lower, tuple(strip_mark or ()), romanise or ""), script, least_words, most_characters, lid, lid_own,
        lid_margin, near_duplicates,
        {"personal data": personal_data, "toxicity": toxicity},
    )  # fmt: skip
    other = None if parallel is None else Source(str(parallel), kind_of(parallel), _licences(licence, [parallel]).get(str(parallel), "unknown"))
    plan = corpora.Plan(
        language, sources, filters, dev, None if dev_book is None else tuple(dev_book), other, parallel_language,
        tuple(pair for path in test_texts or () for pair in sentences_of(path)), drop_overlap, seed,
    )  # fmt: skip
    try:
        made = corpora.build(plan)
    except corpora.OverlapError as error:
        for hit in error.hits:
            console.warn(f"{hit.line.ident} {'is' if hit.whole else 'holds'} {hit.where}: {hit.sentence}")
        raise
    corpora.save(made, out)
    console.result({"folder": str(out), **made.manifest}, lambda: _told(console, made, out))


def show(console: Console, folder: Annotated[Path, typer.Argument(help="A corpus folder.")]) -> None:
    """What a corpus is made of; its files are compared with the hashes of the manifest."""
    from intarsia.languages.corpus.build import read_corpus

    found = read_corpus(folder)
    console.result({"folder": str(folder), **found.manifest}, lambda: _told(console, found, folder))


def romanise_table(
    console: Console,
    file: Annotated[Path, typer.Argument(help="A table of the task (.tsv, .csv, .jsonl, .conll).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new file of the same format.")],
    how: Annotated[str, typer.Option("--how", help="anyascii, uroman or marks, as the corpus.")] = "anyascii",
    column: Annotated[list[str] | None, typer.Option("--column", help="Columns to romanise.", show_default="the texts")] = None,
) -> None:
    """Write a task's texts in Latin letters, as the corpus was."""
    from intarsia.cli.data import TEXTS, guessed
    from intarsia.data import Table, read, write
    from intarsia.languages.romanise import romaniser

    if out.exists():
        raise UsageError(f"--out {out} exists; give a new file name")
    table, latin = read(file), romaniser(how)
    chosen = column or guessed(table, TEXTS, "--column").split(",")
    cells: dict[str, Any] = {name: table.column(name) for name in table.names}
    for name in chosen:
        cells[name] = [latin(cell) if isinstance(cell, str) else [latin(token) or token for token in cell] for cell in table.column(name)]
    write(Table.of(cells), out)
    console.result({"file": str(out), "rows": len(table), "columns": chosen, "how": how}, lambda: console.line(f"{out}: {len(table):,} rows, {', '.join(chosen)} by {how}"))


def _licences(given: Sequence[str] | None, paths: Iterable[Path]) -> dict[str, str]:
    """Licence by path: `FILE=LICENCE`, or one word for all."""
    general = [item for item in given or () if "=" not in item]
    if len(general) > 1:
        raise UsageError(f"--licence: {general[0]!r} and {general[1]!r} are both for all sources; say FILE=LICENCE")
    own = parse_pairs([item for item in given or () if "=" in item], "--licence")
    known = [str(path) for path in paths]
    for path in own:
        if path not in known:
            raise UsageError(f"--licence {path}={own[path]}: there is no source {path!r}; sources: {', '.join(known)}")
    return {path: own.get(path, general[0] if general else "unknown") for path in known}


def sources_of(groups: dict[str, list[Path] | None], licence: Sequence[str] | None, parallel: Path | None) -> tuple[Source, ...]:
    """The files by kind, with their licences."""
    from intarsia.languages.corpus.sources import Source

    paths = [(kind, path) for kind, given in groups.items() for path in given or ()]
    licences = _licences(licence, [path for _, path in paths] + ([parallel] if parallel is not None else []))
    return tuple(Source(str(path), kind, licences[str(path)]) for kind, path in paths)


def filters_of(
    sources: Sequence[Source], language: str, clean: Normalise, script: str | None, least: int, most: int,
    lid: Sequence[str] | None, own: Path | None, margin: float, near: float, lists: dict[str, list[Path] | None],
) -> tuple[Filter, ...]:  # fmt: skip
    """The filters that the options ask for, in the order in which they run."""
    from intarsia.languages.corpus.duplicates import Duplicates
    from intarsia.languages.corpus.filters import Length, Script, Words
    from intarsia.languages.corpus.identity import Identity, Profile
    from intarsia.languages.corpus.sources import load

    found: list[Filter] = [clean, Length(least, most)]
    if script is not None:
        found.append(Script(script))
    if lid:
        texts = lines_of(own) if own is not None else [line.text for source in sources for line in load(source).lines]
        others = tuple(Profile.of(tag, map(clean.text, lines_of(Path(path)))) for tag, path in parse_pairs(lid, "--lid").items())
        found.append(Identity(Profile.of(language, map(clean.text, texts)), others, margin))
    for what, paths in lists.items():
        for path in paths or ():
            try:
                data = path.read_bytes()
                entries = tuple(line for line in data.decode("utf-8").splitlines() if line.strip())
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: the list for {what} cannot be read: {error}") from None
            found.append(Words(what, entries, hashlib.sha256(data).hexdigest()))
    return (*found, Duplicates(near))


def sentences_of(path: Path) -> list[tuple[str, str]]:
    """(place, text) of a task's file: sentences of a treebank, a column `text` or `sentence`, both sides of pairs, lines."""
    if path.suffix.lower() == ".conllu":
        from intarsia.languages.corpus.sources import Source, load

        return [(f"{path.name}:{line.ident}", line.text) for line in load(Source(str(path), "treebank")).lines]
    return texts_of(path, "--test-texts")


def _told(console: Console, made: Corpus, folder: Path) -> None:
    m: Any = made.manifest
    console.table(["source", "kind", "licence", "lines"], [[s["name"], s["kind"], s["licence"], s["lines"]] for s in m["sources"]])
    console.heading("what went, and why")
    rows = [[step["name"], step["before"], why, count] for step in m["steps"] for why, count in step["dropped"].items()]
    rows += [[step["name"], step["before"], "(text changed)", step["changed"]] for step in m["steps"] if step["changed"]]
    if rows:
        console.table(["step", "lines before", "reason", "lines"], rows)
    else:
        console.line("nothing")
    console.heading("parts")
    console.table(["part", "lines", "words", "characters", "sha256"], [[n, f["lines"], f["words"], f["characters"], f["sha256"][:12]] for n, f in m["splits"].items()])
    if m["held_out_books"]:
        console.line(f"held out: {', '.join(m['held_out_books'])}")
    if "parallel" in m and m["parallel"]["left_out"]:
        console.line("verses without a pair: " + ", ".join(f"{count} {why}" for why, count in m["parallel"]["left_out"].items()))
    for warning in m["warnings"]:
        console.line(f"warning: {warning}")
    console.line(f"{folder}: corpus {m['sha256'][:12]}")
