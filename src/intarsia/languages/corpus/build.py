"""`build`: sources -> filters -> no overlap with the task -> splits -> a folder with text and a manifest of everything that went.

    train.tsv, dev.tsv                       columns id, source, text
    parallel-train.tsv, parallel-dev.tsv     columns id, source, target (the other language, this one), where one was given
    dropped.tsv                              every line that went: step, reason, source, id, text
    manifest.json                            sources with licence and hash, steps with counts, splits with hashes
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia._codec import parse_json
from intarsia.data import Table, read, write
from intarsia.data.characters import scripts, word_spans
from intarsia.data.writer import write_lines
from intarsia.errors import DataError, StoreError, UsageError, listing
from intarsia.languages.corpus.filters import Filter, Normalise, Step, apply
from intarsia.languages.corpus.overlap import Hit, overlap
from intarsia.languages.corpus.sources import Line, Read, Source, load
from intarsia.languages.corpus.splits import Pair, pairs, split

FORMAT = 1
MANIFEST = "manifest.json"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a corpus is to be made of.

    Attributes:
        language: BCP-47 tag.
        sources: files.
        filters: in order.
        dev: share of the lines that is held out.
        books: to hold out; None for a choice.
        parallel: the same verses in another language, None for none; `parallel_language` is its tag.
        task_texts: (place, text) of the task's test data, which must not be in the corpus.
        drop_overlap: take lines that hold them out instead of refusing.
        seed: of the blocks that are held out.
    """

    language: str
    sources: tuple[Source, ...]
    filters: tuple[Filter, ...]
    dev: float = 0.05
    books: tuple[str, ...] | None = None
    parallel: Source | None = None
    parallel_language: str = ""
    task_texts: tuple[tuple[str, str], ...] = ()
    drop_overlap: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus in memory or from a folder.

    Attributes:
        language: BCP-47 tag.
        train, dev: tables with the columns id, source, text.
        parallel_train, parallel_dev: tables with the columns id, source, target; None without a second language.
        manifest: plain values, see the module's docstring.
        dropped: (step, line, reason); empty where the corpus was read from a folder.
    """

    language: str
    train: Table
    dev: Table | None
    parallel_train: Table | None
    parallel_dev: Table | None
    manifest: Mapping[str, Any]
    dropped: tuple[tuple[str, Line, str], ...] = field(default=(), repr=False)

    @property
    def digest(self) -> str:
        """sha256 over all parts."""
        return str(self.manifest["sha256"])

    def texts(self) -> list[str]:
        """The training lines."""
        return list(self.train.texts("text"))


def build(plan: Plan) -> Corpus:
    """Make a corpus.

    Raises:
        DataError: a source is malformed, nothing is left, or the task's sentences are in it (they are shown).
        UsageError: there is no source, or a setting means nothing.
    """
    if not plan.sources:
        raise UsageError("a corpus needs at least one source: --text, --bible, --udhr or --treebank")
    found = [load(source, number) for number, source in enumerate(plan.sources)]
    lines: list[Line] = [line for one in found for line in one.lines]
    steps: list[Step] = []
    gone: list[tuple[str, Line, str]] = []
    for step in plan.filters:
        lines, done, dropped = apply(step, lines)
        steps.append(done)
        gone += [(step.name, d.line, d.why) for d in dropped]
    if not lines:
        raise DataError(f"no line is left after the filters: {_story(steps)}")
    lines = _without_task(plan, lines, steps, gone)
    parts = split(lines, plan.dev, plan.books, plan.seed)
    titles = [source.title for source in plan.sources]
    train, dev = _table(parts.train, titles), _table(parts.dev, titles) if parts.dev else None
    both = None if plan.parallel is None else _parallel(plan, parts.train, parts.dev)
    manifest = _manifest(plan, found, steps, parts.books, train, dev, both)
    paired = (None, None) if both is None else (both.train, both.dev)
    return Corpus(plan.language, train, dev, *paired, manifest, tuple(gone))


def _without_task(plan: Plan, lines: list[Line], steps: list[Step], gone: list[tuple[str, Line, str]]) -> list[Line]:
    if not plan.task_texts:
        return lines
    hits = overlap(lines, plan.task_texts)
    if hits and not plan.drop_overlap:
        shown = "; ".join(f"{h.line.ident} = {h.where} {h.sentence[:60]!r}" for h in hits[:3])
        raise OverlapError(
            f"{len(hits)} lines of the corpus hold sentences of the task's test data ({shown}{' ...' if len(hits) > 3 else ''}): a result on it "
            "would mean nothing. Take them out with --drop-overlap",
            hits,
        )
    away = {(h.line.source, h.line.ident): h for h in hits}
    steps.append(
        Step("overlap with the task", {"sentences": len(plan.task_texts)}, len(lines), {"sentence of the task's test data": len(hits)} if hits else {}, 0,
             tuple((h.line.ident, h.where, h.sentence[:200]) for h in hits[:_SHOWN]))
    )  # fmt: skip
    gone += [("overlap with the task", h.line, f"holds {h.where}") for h in hits]
    return [line for line in lines if (line.source, line.ident) not in away]


class OverlapError(DataError):
    """The task's test data are in the corpus; `hits` says where."""

    def __init__(self, message: str, hits: Sequence[Hit]) -> None:
        super().__init__(message)
        self.hits = tuple(hits)


def _table(lines: Sequence[Line], titles: Sequence[str]) -> Table:
    return Table.of({"id": [line.ident for line in lines], "source": [titles[line.source] for line in lines], "text": [line.text for line in lines]})


@dataclass(frozen=True, slots=True)
class _Both:
    train: Table | None
    dev: Table | None
    read: Read
    left_out: dict[str, int]


def _parallel(plan: Plan, train: Sequence[Line], dev: Sequence[Line]) -> _Both:
    assert plan.parallel is not None
    other = load(plan.parallel)
    clean = Normalise().run(other.lines)[0]
    found, out = pairs([*train, *dev], clean)
    if not found:
        raise DataError(f"{plan.parallel.path}: no verse of it is in this corpus; verses are matched by their ids (BOOK.CHAPTER.VERSE)")
    held = {line.ident for line in dev}
    halves = [[p for p in found if (p.ident in held) == is_dev] for is_dev in (False, True)]
    tables = [_pairs_table(half) if half else None for half in halves]
    return _Both(tables[0], tables[1], other, out)


def _pairs_table(found: Sequence[Pair]) -> Table:
    return Table.of({"id": [p.ident for p in found], "source": [p.other for p in found], "target": [p.text for p in found]})


def _facts(table: Table, column: str = "text") -> dict[str, Any]:
    texts = table.texts(column)
    return {
        "lines": len(table), "words": sum(len(word_spans(t)) for t in texts), "characters": sum(map(len, texts)),
        "scripts": dict(list(scripts(texts).items())[:5]), "sha256": table.digest,
    }  # fmt: skip


def _manifest(
    plan: Plan, found: Sequence[Read], steps: Sequence[Step], books: Sequence[str], train: Table, dev: Table | None, both: _Both | None
) -> dict[str, Any]:
    parts: dict[str, Table | None] = {"train": train, "dev": dev}
    if both is not None:
        parts |= {"parallel-train": both.train, "parallel-dev": both.dev}
    splits = {name: _facts(table, "target" if name.startswith("parallel") else "text") for name, table in parts.items() if table is not None}
    digest = hashlib.sha256("".join(f"{name} {facts['sha256']}\n" for name, facts in splits.items()).encode()).hexdigest()
    sources = [
        {"name": r.source.title, "kind": r.source.kind, "licence": r.source.licence, "sha256": r.sha256, "lines": len(r.lines), "skipped": r.skipped}
        for r in found
    ]
    manifest: dict[str, Any] = {
        "format": FORMAT, "language": plan.language, "sha256": digest, "sources": sources, "steps": [step.to_dict() for step in steps],
        "held_out_books": list(books), "dev_share": plan.dev, "seed": plan.seed, "splits": splits,
        "warnings": _warnings(plan, found, steps, dev),
    }  # fmt: skip
    if both is not None:
        r = both.read
        manifest["parallel"] = {
            "name": r.source.title, "language": plan.parallel_language, "licence": r.source.licence, "sha256": r.sha256, "left_out": both.left_out,
        }  # fmt: skip
    return manifest


def _warnings(plan: Plan, found: Sequence[Read], steps: Sequence[Step], dev: Table | None) -> list[str]:
    lines = []
    kinds = {r.source.kind for r in found}
    if kinds == {"bible"}:
        lines.append("religious text only: a module of it knows this register and no other; evaluate on other text too")
    unlicensed = [r.source.title for r in found if r.source.licence == "unknown"]
    if unlicensed:
        lines.append(f"licence unknown: {listing(unlicensed)}; say it with --licence")
    for step in steps:
        lost = sum(step.dropped.values())
        if step.before and lost / step.before > 0.1:
            lines.append(f"{step.name} dropped {lost:,} of {step.before:,} lines ({lost / step.before:.0%}); look at dropped.tsv: filters take more of small languages than of large ones")
    if dev is None:
        lines.append("no dev part: nothing selects a checkpoint, nothing can be measured")
    if not plan.task_texts:
        lines.append("overlap with a task's test data was not looked for (--test-texts)")
    return lines


def _story(steps: Sequence[Step]) -> str:
    told = [f"{step.name} dropped {count} ({why})" for step in steps for why, count in step.dropped.items()]
    return "; ".join(told) or "none dropped anything"


# -- folders -----------------------------------------------------------------------------------------------------------

_FILES = {"train": "train.tsv", "dev": "dev.tsv", "parallel_train": "parallel-train.tsv", "parallel_dev": "parallel-dev.tsv"}
_CLEAN = re.compile(r"[\t\r\n\0]+")


def save(corpus: Corpus, folder: str | os.PathLike[str]) -> Path:
    """Write a corpus into a new folder; it appears whole or not at all.

    Raises:
        StoreError: the folder exists, or cannot be written.
    """
    target = Path(folder)
    if os.path.lexists(target):
        raise StoreError(f"{target} exists; a corpus is not overwritten: choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        for part, name in _FILES.items():
            table = getattr(corpus, part)
            if table is not None:
                write(table, place / name, format="tsv")
        rows = [(step, why, str(line.source), line.ident, _CLEAN.sub(" ", line.text)) for step, line, why in corpus.dropped]
        write_lines(place / "dropped.tsv", ("\t".join(row) for row in (("step", "reason", "source", "id", "text"), *rows)))
        write_lines(place / MANIFEST, [json.dumps(corpus.manifest, ensure_ascii=False, indent=1)])
        place.chmod(0o755)
        os.rename(place, target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return target


def read_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """A corpus from its folder; its files are compared with the hashes of the manifest.

    Raises:
        DataError: there is no manifest, it is of a newer format, or a file was changed.
    """
    place = Path(folder)
    try:
        text = (place / MANIFEST).read_text("utf-8")
    except OSError as error:
        raise DataError(f"{place}: no corpus folder ({MANIFEST}: {error.strerror or error}); make one with intarsia corpus build") from None
    manifest = parse_json(text, str(place / MANIFEST))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("splits"), dict):
        raise DataError(f"{place / MANIFEST}: this is no corpus manifest of format {FORMAT}")
    tables: dict[str, Table | None] = {}
    for part, name in _FILES.items():
        facts = manifest["splits"].get(name.removesuffix(".tsv"))
        table = None if facts is None else read(place / name, format="tsv", normalise="none")
        if table is not None and table.digest != facts["sha256"]:
            raise DataError(f"{place / name} was changed after the corpus was built: its hash is {table.digest[:12]}, the manifest has {facts['sha256'][:12]}")
        tables[part] = table
    train = tables["train"]
    if train is None:
        raise DataError(f"{place / MANIFEST}: the corpus has no training part")
    return Corpus(str(manifest["language"]), train, tables["dev"], tables["parallel_train"], tables["parallel_dev"], manifest)
