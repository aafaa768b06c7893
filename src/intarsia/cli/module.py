"""`intarsia module show`: what a module file says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.verb import verb

if TYPE_CHECKING:
    from intarsia.modules import Header

File = Annotated[Path, typer.Argument(help="A module file (.safetensors).")]
Verify = Annotated[bool, typer.Option("--verify", help="Read the tensors too and check every byte against the digests.")]
Card = Annotated[bool, typer.Option("--card", help="Print the card as markdown.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Look at module files.", no_args_is_help=True)
    verb(room, "show")(show)
    app.add_typer(room, name="module")


def show(console: Console, file: File, verify: Verify = False, card: Card = False, tensors: Tensors = False) -> None:
    """Show a module's method, base, labels, card and tensors.  The tensors are not read unless asked to."""
    from intarsia.modules import load, read_header

    header = read_header(file)
    if verify:
        load(file)
    payload = describe(header)

    def human() -> None:
        if card:
            console.line(header.card.to_markdown().rstrip())
            return
        _facts(console, header, payload, verified=verify)
        if tensors:
            console.heading("Tensors")
            console.table(["name", "type", "shape"], [[n, t["dtype"], " x ".join(map(str, t["shape"]))] for n, t in payload["tensors"].items()])

    console.result(payload, human)


def describe(header: Header) -> dict[str, Any]:
    """A module's header as plain values."""
    from intarsia._codec import encode

    return {
        "name": header.name,
        "digest": header.digest,
        "version": header.version,
        "size": header.size,
        "parameters": sum(_elements(entry.shape) for entry in header.tensors.values()),
        "method": dict(header.specification),
        "base": header.base.to_dict(),
        "labels": header.labels,
        "roles": dict(header.roles),
        "requires": list(header.requires),
        "context": dict(header.context),
        "card": encode(header.card),
        "card_missing": header.card.missing(),
        "tensors": {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in header.tensors.items()},
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _facts(console: Console, header: Header, payload: dict[str, Any], *, verified: bool) -> None:
    from intarsia.cli.axes import patch_rows, settings_text
    from intarsia.modules.readme import interval_text

    method, base = header.method, header.base
    state = "every byte verified" if verified else "tensors not read; --verify checks them"
    console.line(f"{header.name}: {method.name}, {payload['parameters']:,} values, {size_text(header.size)} ({state})")
    console.line(f"  digest    {header.digest}")
    console.line(f"  method    {method.name}({settings_text(method.settings)})  {method.source}")
    console.line(f"  base      {header.card.base or base.architecture}: {base.architecture}, layers {'+'.join(map(str, base.layers))}, width {base.width}, weights {base.weights}")
    if header.labels is not None:
        console.line(f"  labels    {', '.join(header.labels)}")
    for title, values in (("roles", header.roles), ("context", header.context)):
        if values:
            console.line(f"  {title:<9} {settings_text(values)}")
    if header.requires:
        console.line(f"  requires  {', '.join(header.requires)}")
    for metric in header.card.metrics:
        console.line(f"  {metric.name} {metric.split} {metric.language}: {metric.value:.4g} {interval_text(metric)}".rstrip())
    if payload["card_missing"]:
        console.line(f"  card      lacks: {', '.join(payload['card_missing'])}")
    rows = list(patch_rows(method))
    if rows:
        console.heading("It changes the model at")
        console.table(["where", "form", "op"], rows)
