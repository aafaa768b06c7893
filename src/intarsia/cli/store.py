"""`intarsia store`: modules kept by the hash of their bytes, with names, versions and tags.

What is not here: `tree` and `diff` (`store_views.py`), `import`, `push` and `pull` (`store_moves.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.options import StoreFolder
from intarsia.cli.verb import verb
from intarsia.errors import ModuleError

if TYPE_CHECKING:
    from intarsia.store.entry import Stored
    from intarsia.store.store import Store

AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="Go on although a required module is not there.")]
Reference = Annotated[str, typer.Argument(help="A name, name@version, name@tag, or 8 or more first digits of the sha256.")]


def register(app: typer.Typer) -> None:
    from intarsia.cli.store_moves import export, pull, push, take
    from intarsia.cli.store_views import diff, tree

    room = typer.Typer(help="Keep modules under names and versions.", no_args_is_help=True)
    for name, function in (
        ("add", add), ("ls", ls), ("show", show), ("tree", tree), ("diff", diff), ("verify", verify), ("tag", tag), ("rm", rm), ("gc", gc),
        ("export", export), ("import", take), ("push", push), ("pull", pull),
    ):  # fmt: skip
        verb(room, name)(function)
    app.add_typer(room, name="store")


def add(
    console: Console,
    file: Annotated[Path, typer.Argument(help="A module file (.safetensors).")],
    name: Annotated[str | None, typer.Option("--name", help="Name in the store.", show_default="the module's own")] = None,
    version: Annotated[str | None, typer.Option("--version", help="Version; begins with a digit.", show_default="the next number")] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="A tag to move to it; may be repeated.")] = None,
    conflicts: Annotated[list[str] | None, typer.Option("--conflicts", help="A module of the store it must not be used together with; may be repeated.")] = None,
    allow_missing: AllowMissing = False,
    store: StoreFolder = None,
) -> None:
    """Verify a module file and keep it."""
    from intarsia.store.store import Store

    place = Store(store)
    sha256 = place.add(file, name=name, version=version, tags=tags or (), conflicts=conflicts or (), allow_missing=allow_missing)
    names = place.names_of(sha256)
    console.result({"sha256": sha256, "names": names, "store": str(place.path)}, lambda: console.line(f"{sha256[:12]}  {', '.join(names)}"))


def ls(
    console: Console,
    language: Annotated[str | None, typer.Option("--lang", help="BCP-47 tag or ISO 639 code; a macro-language finds its members.")] = None,
    script: Annotated[str | None, typer.Option("--script", help="ISO 15924 code, such as Latn.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task, as in the card.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base, as in the card or the fingerprint.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Name of the method.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="The role domain.")] = None,
    store: StoreFolder = None,
) -> None:
    """List modules; only headers are read."""
    from intarsia.store.finding import Query
    from intarsia.store.store import Store

    place = Store(store)
    asked = {"language": language, "script": script, "task": task, "base": base, "method": method, "domain": domain}
    found = readable(console, place)
    if any(value is not None for value in asked.values()):
        query = Query(**asked)
        found = [entry for entry in found if entry.header is not None and query.fits(entry.header)]
    rows = [_summary(entry) for entry in found]
    head = ["module", "names", "method", "languages", "task", "base", "size"]

    def human() -> None:
        if not rows:
            console.line(f"no modules in {place.path}" + (" answer to that" if any(asked.values()) else ""))
            return
        console.table(
            head,
            [[r["sha256"][:12], ", ".join(r["names"]), r["method"], ", ".join(r["languages"]), r["task"], r["base"], r["size"] and size_text(r["size"])] for r in rows],
        )

    console.result(rows, human)


def show(console: Console, module: Reference, store: StoreFolder = None) -> None:
    """Show what a module says of itself, its names and its relations.  The tensors are not read."""
    from intarsia.cli.module import _facts, describe
    from intarsia.store.lineage import Lineage, origin
    from intarsia.store.store import Store

    place = Store(store)
    sha256 = place.resolve(module)
    header = place.header(sha256)
    names = place.names_of(sha256)
    known = Lineage(place)
    for problem in known.problems:
        console.warn(problem)
    kin = {"made from": known.parents(header), "requires": known.requires(header), "conflicts": known.conflicts(header), "needed by": known.children(header.digest)}
    relations = {what: [{"digest": each.digest, "sha256": each.sha256, "names": list(each.names), "title": each.title} for each in found] for what, found in kin.items()}
    payload = {"sha256": sha256, "names": names, **describe(header), "relations": relations, "origin": origin(header)}

    def human() -> None:
        console.line(f"{sha256}  {', '.join(names) or 'no name'}")
        _facts(console, header, payload, verified=False)
        rows = [[what, str(each)] for what, found in kin.items() for each in found]
        if rows:
            console.heading("Relations")
            console.table(["how", "module"], rows)

    console.result(payload, human)


def verify(console: Console, module: Annotated[str | None, typer.Argument(help="One module; without it, all.")] = None, store: StoreFolder = None) -> None:
    """Read modules and check every byte, that what they require is there, and what their cards lack."""
    from intarsia.store.store import Store

    place = Store(store)
    problems = place.verify(module)
    if problems:
        for problem in problems[1:]:
            console.note(problem)
        raise ModuleError(f"store {place.path}: {len(problems)} problem{'s' * (len(problems) > 1)}: {problems[0]}")
    wanted = None if module is None else place.resolve(module)
    lacking = {entry.title: entry.header.card.missing() for entry in place.entries() if entry.header is not None and wanted in (None, entry.sha256)}
    lacking = {name: missing for name, missing in lacking.items() if missing}

    def human() -> None:
        console.line("every byte verified")
        for name, missing in lacking.items():
            console.line(f"the card of {name} lacks: {', '.join(missing)}")

    console.result({"problems": [], "cards": lacking}, human)


def tag(
    console: Console,
    module: Annotated[str, typer.Argument(help="A name, name@version or name@tag.")],
    tag: Annotated[str, typer.Argument(help="The tag, such as 'best'.")],
    if_match: Annotated[str | None, typer.Option("--if-match", help="Only if the tag holds the sha256 that begins so, or 'none'.")] = None,
    store: StoreFolder = None,
) -> None:
    """Move a tag to a version of a name."""
    from intarsia.store.store import Store

    sha256 = Store(store).tag(module, tag, expected=if_match)
    name = module.rpartition("@")[0] or module
    console.result({"sha256": sha256, "tag": f"{name}@{tag}"}, lambda: console.line(f"{sha256[:12]}  {name}@{tag}"))


def rm(console: Console, module: Annotated[str, typer.Argument(help="name@version, name@tag, or a name with all of them.")], store: StoreFolder = None) -> None:
    """Remove names; the bytes stay until `gc`."""
    from intarsia.store.store import Store

    removed = Store(store).remove(module)
    console.result({"removed": removed}, lambda: console.line(f"removed {', '.join(removed)}"))


def gc(
    console: Console,
    grace: Annotated[float, typer.Option("--grace", help="Keep what is younger, in seconds.")] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    store: StoreFolder = None,
) -> None:
    """Remove modules that no name reaches, directly or because another module requires them."""
    from intarsia.store.store import Store

    done = Store(store).gc(grace=grace, dry_run=dry_run)
    said = "would remove" if dry_run else "removed"
    payload = {"removed": done.removed, "kept": done.kept, "freed": done.freed, "dry_run": dry_run}
    console.result(payload, lambda: console.line(f"{said} {len(done.removed)}, {size_text(done.freed)}; kept {done.kept}"))


def readable(console: Console, place: Store) -> list[Stored]:
    """Every module of a store, with a warning for each that cannot be read: what is in it is not known."""
    found = place.entries()
    for entry in found:
        if entry.problem:
            console.warn(entry.problem)
    return found


def _summary(entry: Stored) -> dict[str, Any]:
    from intarsia.store.finding import languages_of, method_name

    row: dict[str, Any] = {"sha256": entry.sha256, "names": list(entry.names), "problem": entry.problem}
    header = entry.header
    if header is None:
        return {**row, "method": None, "languages": [], "task": None, "domain": None, "base": None, "size": None}
    return {
        **row, "method": method_name(header), "languages": languages_of(header), "task": header.card.task or header.roles.get("task"),
        "domain": header.roles.get("domain"),
        "base": header.card.base or header.base.architecture, "size": header.size,
    }  # fmt: skip
