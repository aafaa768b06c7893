"""`intarsia demo`: modules trained, tried on other languages and laid together, in a few minutes, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.console import Console
from intarsia.cli.verb import verb

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report, the pictures and the modules.")]


class Silent:
    """A screen that shows nothing, for `--json`."""

    def line(self, text: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        pass


def register(app: typer.Typer) -> None:
    verb(app, "demo")(demo)


def demo(console: Console, out: Out = Path("intarsia-demo")) -> None:
    """Train four modules on real data, try them on five other languages, lay two together, write a report.

    Works offline; needs pip install "intarsia\\[demo]"; under 5 minutes on 2 cores.
    """
    from intarsia.demo.run import run
    from intarsia.train import reporter

    outcome = run(out, Silent() if console.json else console, reporter(quiet=console.quiet))
    if console.json:
        console.document(outcome.to_dict())
