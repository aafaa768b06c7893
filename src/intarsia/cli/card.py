"""`intarsia card`: what a module's card says, what it lacks, completing it, and the card as a README."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import parse_pairs, parse_value
from intarsia.cli.verb import verb
from intarsia.errors import DataError, ModuleError, UsageError

if TYPE_CHECKING:
    from intarsia.modules import Card, Header

File = Annotated[Path, typer.Argument(help="A module file (.safetensors).")]
Statements = Annotated[list[str] | None, typer.Argument(help="Statements: licence=CC-BY-4.0 contact=... data.1.origin=...", metavar="[KEY=VALUE]...")]
Evaluation = Annotated[Path | None, typer.Option("--eval", help="Metrics to add: what `intarsia eval --out` wrote for this module.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write instead of standard output, e.g. README.md; must not exist.")]
BaseModel = Annotated[str | None, typer.Option("--base-model", help="The base's repository on the Hub, owner/name; else what the card's base says.")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Read, check and complete the card of a module.", no_args_is_help=True)
    for name, function in (("show", show), ("check", check), ("set", set_), ("render", render)):
        verb(room, name)(function)
    app.add_typer(room, name="card")


def show(console: Console, file: File) -> None:
    """Show every statement of a card, those that are lacking too."""
    from intarsia._codec import encode
    from intarsia.modules import read_header

    header = read_header(file)
    payload = {"name": header.name, "digest": header.digest, "card": encode(header.card), "missing": header.card.missing()}
    console.result(payload, lambda: _show(console, header))


def check(console: Console, file: File) -> None:
    """Say what a card lacks and what to type for it; exit status 4 if it lacks anything.

    intarsia card check swh.safetensors
    """
    from intarsia.modules import read_header
    from intarsia.modules.completing import advice

    lacking = advice(read_header(file).card)
    payload = {"file": str(file), "complete": not lacking, "missing": [{"what": what, "type": how} for what, how in lacking]}

    def human() -> None:
        if not lacking:
            console.line(f"{file}: the card is complete")
            return
        console.table(["missing", f"intarsia card set {file} ..."], lacking)

    console.result(payload, human)
    if lacking:
        raise ModuleError(f"the card of {file} lacks {len(lacking)} statement{'s' * (len(lacking) > 1)}: {', '.join(what for what, _ in lacking)}")


def set_(console: Console, file: File, statement: Statements = None, evaluation: Evaluation = None) -> None:
    """Complete a card.  The module stays what it is: its tensors and its digest do not change.

    intarsia card set swh.safetensors licence=CC-BY-4.0 contact=me@example.org data.licence=CC-BY-SA-4.0
    """
    from intarsia.modules import complete, put_card, read_header
    from intarsia.modules.completing import measured

    if not statement and evaluation is None:
        raise UsageError("say what to set, e.g. licence=CC-BY-4.0; intarsia card check FILE says what is missing")
    header = read_header(file)
    card = complete(header.card, statements(statement, "statement"))
    if evaluation is not None:
        card = measured(card, evaluated(evaluation, header))
    digest = put_card(file, card)
    payload = {"file": str(file), "digest": digest, "missing": card.missing()}

    def human() -> None:
        rest = len(card.missing())
        console.line(f"{file}: the card is written, " + (f"{rest} statement{'s' * (rest > 1)} still missing: {', '.join(card.missing())}" if rest else "and complete"))

    console.result(payload, human)


def render(console: Console, file: File, out: Out = None, base_model: BaseModel = None) -> None:
    """Print a card as markdown, with the block at the top that the Hugging Face Hub reads."""
    from intarsia.cli.placing import check_free
    from intarsia.modules import read_header, readme, write_atomic

    card = read_header(file).card
    text = readme.render(card, base_model=base_model or hub_id(card.base))
    if out is not None:
        check_free(out)
        write_atomic(out, [text.encode()], len(text.encode()))
    console.result({"out": None if out is None else str(out), "markdown": text}, lambda: console.line(text.rstrip() if out is None else f"wrote {out}"))


def statements(pairs: Sequence[str] | None, option: str) -> dict[str, Any]:
    """`["licence=MIT", "recipe.epochs=3"]` -> values by key: text as it is, languages and warnings also as lists in JSON, the recipe by type."""
    found: dict[str, Any] = parse_pairs(pairs, option)
    for key, text in found.items():
        if key.startswith("recipe."):
            found[key] = parse_value(text)
        elif key in ("languages", "warnings") and text.startswith("["):
            with contextlib.suppress(ValueError):
                found[key] = json.loads(text)
    return found


def evaluated(file: Path, header: Header) -> Mapping[str, Any]:
    """An evaluation of this module, alone or on top of those it requires.

    Raises:
        DataError: the file cannot be read.
        ModuleError: it is the evaluation of something else, or was made on another base.
    """
    from intarsia._codec import parse_json

    try:
        document = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise DataError(f"--eval {file}: {error.strerror or error}") from error
    told: Mapping[str, Any] = document if isinstance(document, dict) else {}
    if told.get("forced_base"):
        raise ModuleError(f"--eval {file}: measured with --force-base, so the numbers are not those of the base that the modules belong to; evaluate on that one")
    used = told.get("digests")
    if not isinstance(used, dict) or header.digest not in used.values():
        raise ModuleError(f"--eval {file}: not an evaluation of this module ({header.digest[:12]}...); make one with: intarsia eval -m MODULE test=FILE --out {file}")
    others = sorted(name for name, digest in used.items() if digest != header.digest and digest not in header.requires)
    if others:
        raise ModuleError(f"--eval {file}: measured together with {', '.join(others)}, which this module does not require; evaluate it alone")
    return told


def hub_id(base: str) -> str | None:
    """Where an embedded base comes from on the Hub."""
    from intarsia.bases.rows import BASES

    return BASES[base].hub_id if base in BASES else None


def _show(console: Console, header: Header) -> None:
    from intarsia.cli.axes import settings_text
    from intarsia.modules import readme

    card: Card = header.card
    console.line(f"{header.name}  {header.digest}")
    made_from = ", ".join(f"{name} {digest[:12]}".strip() for name, digest in card.named_parents())
    plain = [(name, getattr(card, name)) for name in ("title", "description", "script", "task", "base", "method", "licence", "contact")]
    plain += [("languages", ", ".join(card.languages)), ("intended_use", card.intended_use), ("out_of_scope", card.out_of_scope)]
    plain += [("bias_evaluation", card.bias_evaluation), ("warnings", "; ".join(card.warnings)), ("made from", made_from)]
    plain += [("recipe", settings_text(card.recipe)), ("cost", "" if card.cost is None else settings_text(_stated(card.cost)))]
    console.table(["statement", "value"], [[name, " ".join(value.split()) or None] for name, value in plain])
    if card.data:
        console.heading("Data")
        head = ["", "name", "version", "origin", "licence", "rows", "sha256"]
        console.table(head, [[str(i), d.name, d.version or None, d.origin or None, d.licence or None, d.rows, d.sha256[:12] or None] for i, d in enumerate(card.data, 1)])
    if card.metrics:
        console.heading("Metrics")
        rows = [[m.name, m.split or None, m.language or None, f"{m.value:.4g}", readme.interval_text(m) or None, m.n,
                 ", ".join(map(str, m.seeds)) or None] for m in card.metrics]  # fmt: skip
        console.table(["metric", "split", "language", "value", "95 % interval", "rows", "seeds"], rows)
    if card.missing():
        console.line()
        console.line(f"missing: {', '.join(card.missing())} (intarsia card check says what to type)")


def _stated(cost: Any) -> dict[str, Any]:
    return {name: value for name in ("seconds", "device", "trainable", "bytes") if (value := getattr(cost, name)) not in (None, "")}
