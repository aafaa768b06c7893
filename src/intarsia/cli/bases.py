"""`intarsia bases`: the base models that come inside Python packages, and which of them are ready here."""

from __future__ import annotations

from dataclasses import asdict

import typer

from intarsia.cli.console import Console
from intarsia.cli.verb import verb


def register(app: typer.Typer) -> None:
    verb(app, "bases")(bases)


def bases(console: Console) -> None:
    """List base models that can be had without a model hub."""
    from intarsia.bases import list_bases

    found = list_bases()

    def human() -> None:
        console.table(
            ["name", "ready", "architecture", "parameters", "languages", "licence", "size"],
            [[b.name, b.usable, b.architecture, b.parameters, b.languages, b.licence, b.size] for b in found],
        )
        console.line()
        for base in found:
            console.line(f"{base.name}: {'; '.join(base.notes)}")
        console.line()
        console.line("Next:  " + "\n       ".join(dict.fromkeys(b.type_next for b in found)))

    console.result([asdict(base) for base in found], human)
