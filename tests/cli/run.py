"""Running the command line in this process, and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from intarsia.cli import main


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error(self, code: int) -> str:
        """The one line of an error with this exit code."""
        assert self.code == code, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        assert "Traceback" not in self.err
        return lines[0]

    def ok(self) -> Result:
        assert self.code == 0, (self.code, self.out, self.err)
        return self


@dataclass(frozen=True)
class Here:
    """Calls `main` in this process."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> Result:
        self.capture.readouterr()
        code = main(words)
        out, err = self.capture.readouterr()
        return Result(code, out, err)


def process(*words: str, env: Mapping[str, str | None] | None = None, stdin: bytes = b"", timeout: float = 120) -> Result:
    """Run `python -m intarsia` with some environment variables changed (None removes one)."""
    done = subprocess.run(
        [sys.executable, "-m", "intarsia", *words], input=stdin, capture_output=True, timeout=timeout, env=environment(env), check=False
    )
    return Result(done.returncode, done.stdout.decode("utf-8", "backslashreplace"), done.stderr.decode("utf-8", "backslashreplace"))


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with changes."""
    merged: dict[str, str | None] = {**os.environ, **(changes or {})}
    return {key: value for key, value in merged.items() if value is not None}


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of one command, in seconds."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, env=environment())
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system
