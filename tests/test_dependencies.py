"""The import directions of docs/architecture.md, read from the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "intarsia"
ORDER = ["errors", "_registry", "_codec", "sites", "patches", "methods", "modules", "compose", "host", "train", "tasks",
         "languages", "bench", "serve", "demo", "cli"]
#: rooms beside the line: what they may import, and who may import them is anybody right of the first user
ASIDE = {"bases": {"errors", "_registry"}, "data": {"errors", "_registry", "_codec"},
         "store": {"errors", "_registry", "_codec", "sites", "patches", "methods", "modules"}}
FREE_OF_TORCH = ["errors", "_registry", "_codec", "data"]


def imports(file: Path) -> set[str]:
    """First component below `intarsia` of every import in a file, wherever it stands."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{a.name}" if node.module == "intarsia" else str(node.module) for a in node.names]
        rooms.update(n.split(".")[1] for n in names if n.startswith("intarsia."))
    return rooms


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_left(file: Path) -> None:
    room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__", "testing"):
        return
    for other in imports(file) - {room}:
        if other.removesuffix(".py") not in ORDER and other not in ASIDE:
            continue  # a name exported by the package page
        if room in ASIDE:
            assert other in ASIDE[room], f"{room} may not import {other}"
        elif other in ASIDE:
            assert room in ORDER and ORDER.index(room) >= ORDER.index("host"), f"{room} may not import {other}"
        else:
            assert ORDER.index(other) < ORDER.index(room), f"{room} may not import {other}"
