"""The README and the pages of the documentation: commands exist, Python runs, generated pages are up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from intarsia.cli.app import app
from intarsia.methods import METHODS
from tests.cli.bases import make_base, make_topics
from tests.cli.run import Here

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[str]:
    """Fenced blocks of a page."""
    return [text for kind, text in FENCE.findall(page.read_text("utf-8")) if kind in kinds]


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks and transcripts that call intarsia, as words."""
    lines = [line.removeprefix("$ ") for text in blocks(page, "sh", "console") for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("intarsia ")]


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in ALL])
def test_commands_exist_with_their_options(page: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not hasattr(command, "commands") or rest == ["--help"], f"{page}: {words} names no verb"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*", word) and word not in known]
    assert not unknown, f"{page}: {words[1]} has no {unknown}"


def test_the_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))  # the page registers a method
    base = make_base(tmp_path / "base")
    make_topics(tmp_path / "train.csv", 48, 0)
    make_topics(tmp_path / "dev.csv", 16, 1)
    text = "\n".join(blocks(ROOT / "docs" / "python.md", "python")).replace('"me5-small"', repr(str(base)))
    assert "me5-small" not in text
    exec(compile("from __future__ import annotations\n" + text, "docs/python.md", "exec"), {"__name__": "docs"})
    assert (tmp_path / "topic.safetensors").exists()


def test_the_methods_page_is_up_to_date(cli: Here) -> None:
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == cli("methods", "--markdown").ok().out, (
        "run: intarsia methods --markdown > docs/methods.md"
    )


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_two_commands_do_all_set_up_and_ci_runs_the_second() -> None:
    set_up = [line for text in blocks(ROOT / "README.md", "sh") for line in text.splitlines() if "-m venv" in line]
    demo, test = set_up
    assert demo.endswith("intarsia demo") and test.endswith("-m pytest") and all("-c constraints.txt" in line for line in set_up)
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    pattern = re.search(r"grep -E '([^']+)' README\.md", script)
    assert pattern is not None
    found = subprocess.run(["grep", "-E", pattern.group(1), "README.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == test + "\n"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_pins_cover_what_the_package_needs() -> None:
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line}
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = re.findall(r'"([A-Za-z0-9._-]+)(?:\[[a-z]+\])?(?:[><=!~][^"]*)?"', text.split("dependencies = [")[1].split("]")[0])
    needed += re.findall(r'"([A-Za-z0-9._-]+)', "".join(re.findall(r"^(?:demo|test) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)))
    assert len(needed) > 15 and {name.lower().replace("_", "-") for name in needed} - {"sys-platform"} <= pinned
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+|", line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())


def test_what_is_printed_as_a_transcript_was_printed_by_this_version() -> None:
    """The README's transcript has the demo's five steps and the modules of its plan."""
    from intarsia.demo.plan import PLAN

    transcript = next(text for text in blocks(ROOT / "README.md", "console") if "intarsia demo" in text)
    for step in range(1, 6):
        assert f"[{step}/5]" in transcript
    for name in PLAN.methods:
        assert re.search(rf"^{name} ", transcript, re.MULTILINE), name
