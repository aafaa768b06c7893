"""`intarsia demo`: modules trained, tried on other languages and laid together, in a few minutes, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork
from intarsia.cli.verb import verb

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report, the pictures and the modules.")]

Base = Annotated[str | None, typer.Option("--base", help="Another base than me5-small: a folder, an embedded name or a hub id.")]


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


def demo(console: Console, out: Out = Path("intarsia-demo"), base: Base = None, allow_network: AllowNetwork = False) -> None:
    """Train four modules on real data, try them on five other languages, lay two together, write a report.

    Works offline; needs pip install "intarsia\\[demo]"; under 5 minutes on 2 cores.
    """
    from intarsia.demo.plan import PLAN
    from intarsia.demo.run import run
    from intarsia.train import reporter

    plan = PLAN if base is None else replace(PLAN, base=base)
    outcome = run(out, Silent() if console.json else console, reporter(quiet=console.quiet), plan=plan, allow_network=allow_network)
    if console.json:
        console.document(outcome.to_dict())
