"""`intarsia store tree | diff`: where modules come from, which languages have some, how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import StoreFolder
from intarsia.cli.store import readable
from intarsia.errors import DataError, UsageError

if TYPE_CHECKING:
    from intarsia.store.diff import Compared
    from intarsia.store.families import Branch, Groups
    from intarsia.store.lineage import Line
    from intarsia.store.store import Store



def tree(
    console: Console,
    module: Annotated[str | None, typer.Argument(help="One module; without it, all.")] = None,
    languages: Annotated[bool, typer.Option("--languages", help="The tree of languages, with how many have modules, instead of lineage.")] = False,
    families: Annotated[
        Path | None, typer.Option("--families", help="With --languages: Glottolog's CLDF folder, or a CSV file with the columns iso and family ('Afro-Asiatic>Berber').")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="With --languages: show languages without modules too.")] = False,
    store: StoreFolder = None,
) -> None:
    """Show what modules were made from and trained on top of; or which languages have modules.

    intarsia store tree --languages --families path/to/glottolog-cldf
    """
    from intarsia.store.store import Store

    place = Store(store)
    if languages:
        if module is not None:
            raise UsageError("--languages shows all modules; leave out the name, or look for one with: intarsia store ls --lang")
        _languages(console, place, families, missing)
        return
    if families is not None or missing:
        raise UsageError("--families and --missing belong to the tree of languages: add --languages")
    from intarsia.store.lineage import Lineage

    lineage = Lineage(place)
    for problem in lineage.problems:
        console.warn(problem)
    lines = list(lineage.lines(None if module is None else place.header(module).digest))
    console.result([_line_payload(line) for line in lines], lambda: _lineage(console, lines, str(place.path)))


def _lineage(console: Console, lines: list[Line], where: str) -> None:
    from intarsia.store.lineage import origin

    if not lines:
        console.line(f"no modules in {where}")
    for line in lines:
        lead = "  " * line.depth + (f"{line.relation} " if line.relation else "")
        if line.header is None or line.seen:
            console.line(f"{lead}{line.kin}" + (" (above)" if line.seen and line.header is not None else ""))
            continue
        told = origin(line.header)
        facts = [str(told["operation"] or told["method"])]
        facts += [f"seed {', '.join(map(str, told['seeds']))}"] if told["seeds"] else []
        facts += [f"data {', '.join(s['name'] + (' ' + s['sha256'][:12] if s['sha256'] else '') for s in told['data'])}"] if told["data"] else []
        console.line(f"{lead}{line.kin}: {'; '.join(facts)}")


def _line_payload(line: Line) -> dict[str, Any]:
    from intarsia.store.lineage import origin

    kin = line.kin
    told = {} if line.header is None else {"origin": origin(line.header)}
    return {"depth": line.depth, "relation": line.relation or None, "digest": kin.digest, "sha256": kin.sha256, "names": list(kin.names), "title": kin.title, "seen": line.seen, **told}


def _languages(console: Console, place: Store, families: Path | None, missing: bool) -> None:
    from intarsia.store.families import language_tree

    groups, source = family_data(families)
    if groups is None:
        console.note(source)
        if missing:
            raise UsageError("--missing needs to know which languages there are: --families FILE")
    root = language_tree(readable(console, place), groups, whole=missing)
    payload = {"families": source if groups is not None else None, **_branch_payload(root)}

    def human() -> None:
        if not root.below:
            console.line(f"no modules in {place.path}")
            return
        _branches(console, root, 0)
        console.line(f"{root.covered} language{'s' * (root.covered != 1)} with modules" + (f", of {root.known:,} shown of {len(groups):,} in {source}" if groups is not None else ""))

    console.result(payload, human)


def family_data(path: Path | None) -> tuple[Groups | None, str]:
    """Groups of every language by ISO 639-3 code and where they come from; or None and why there are none.

    Without a path the URIEL data of the package lang2vec are taken if it is installed.

    Raises:
        DataError: the file is not such data.
    """
    from intarsia.languages.typology import Glottolog, read_csv, uriel

    if path is not None and path.is_dir():
        tree = Glottolog.read(path)
        return {iso: tuple(tree.names.get(each, each) for each in tree.ancestors.get(code, ())) for iso, code in tree.codes.items()}, f"Glottolog ({path})"
    if path is not None:
        own = read_csv(path)
        if not own.families:
            raise DataError(f"{path}: no column 'family'; expected groups from the largest to the smallest, such as Afro-Asiatic>Berber")
        return own.families, own.source
    try:
        data = uriel()
    except UsageError:
        return None, "no family tree: languages stand below their macro-language; --families FILE or pip install 'intarsia[typology]' brings one"
    return {code: data.families.get(code, ()) for code in data.languages}, data.source


def _branches(console: Console, branch: Branch, depth: int) -> None:
    for name in sorted(branch.below):
        part = branch.below[name]
        share = f"  {part.covered} of {part.known:,}" if part.known and part.below else ""
        script = f" ({'+'.join(sorted(part.scripts))})" if part.scripts else ""
        what = f"{script}: {', '.join(part.modules)}" if part.modules else ": none" if part.language and not part.below else ""
        console.line(f"{'  ' * depth}{name}{share}{what}")
        _branches(console, part, depth + 1)


def _branch_payload(branch: Branch) -> dict[str, Any]:
    return {
        "name": branch.name, "language": branch.language, "modules": branch.modules, "scripts": sorted(branch.scripts),
        "covered": branch.covered, "known": branch.known, "below": [_branch_payload(branch.below[name]) for name in sorted(branch.below)],
    }  # fmt: skip


def diff(
    console: Console,
    one: Annotated[str, typer.Argument(help="A module of the store, or a module file.")],
    other: Annotated[str, typer.Argument(help="Another one.")],
    places: Annotated[bool, typer.Option("--places", help="Every place instead of every layer.")] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw it into a new .png, .svg or .pdf file.")] = None,
    store: StoreFolder = None,
) -> None:
    """Compare two modules layer by layer: support overlap, sign conflict, cosine, on the true change of the weights.

    intarsia store diff topics@1 topics@2 --picture diff.png
    """
    from intarsia.cli.placing import check_free
    from intarsia.modules import load
    from intarsia.store.diff import compare
    from intarsia.store.diff import picture as draw
    from intarsia.store.store import Store

    if picture is not None:
        check_free(picture)
    place = Store(store)
    a, b = (load(word) if Path(word).is_file() else place.get(word) for word in (one, other))
    found = compare(a, b, (one, other))
    if found.unlike:
        console.warn(found.unlike)
    whole, rows = found.whole, list(found.places if places else found.layers)
    payload = {
        "modules": [one, other], "equal": a.digest == b.digest, "unlike": found.unlike or None, "whole": _compared(whole),
        "rows": [_compared(row) for row in rows], "picture": None if picture is None else str(picture),
    }  # fmt: skip
    if picture is not None:
        draw(found, picture)

    def human() -> None:
        if a.digest == b.digest:
            console.line("the same module" + ("" if a.card == b.card else ", with another card"))
        console.table(
            ["place" if places else "layer", "compared", "norm", "norm", "overlap", "sign conflict", "cosine"],
            [[row.place, row.what, *(_number(each) for each in (*row.norms, row.overlap, row.conflict, row.cosine))] for row in (*rows, whole)],
        )

    console.result(payload, human)


def _compared(row: Compared) -> dict[str, Any]:
    return {
        "place": row.place, "layer": row.layer, "compared": row.what, "norms": list(row.norms), "overlap": row.overlap, "conflict": row.conflict,
        "cosine": row.cosine, "entries": row.entries,
    }  # fmt: skip


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
