"""One process per run directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import TrainingError
from intarsia.train.lock import NAME, locked

HOLD = """
import sys, time
from intarsia.train.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_leaves_a_stale_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(TrainingError, match=f"in use by process {process.pid} on {socket.gethostname()}"), locked(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text("utf-8"))["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(TrainingError, match="in use"), locked(tmp_path):
            pass
        assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, False),  # alive
        ({"host": "elsewhere", "pid": 1}, False),  # cannot be checked
        ({"pid": 2**22 + 1}, True),  # no such process
        pytest.param({"began": "another-boot:1"}, True, marks=pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")),  # the id was used again
    ],
)
def test_stale_locks_are_taken_over_and_others_are_not(tmp_path: Path, change: dict[str, Any], taken: bool) -> None:
    with locked(tmp_path):
        text = (tmp_path / NAME).read_text("utf-8")
    (tmp_path / NAME).write_text(json.dumps({**json.loads(text), **change}), "utf-8")
    if taken:
        with locked(tmp_path):
            pass
    else:
        with pytest.raises(TrainingError, match=r"remove .*run\.lock"), locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_is_respected(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text, "utf-8")
    with pytest.raises(TrainingError, match="in use by another process"), locked(tmp_path):
        pass


def test_a_lock_taken_by_somebody_else_meanwhile_is_not_removed(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / NAME).write_text("another", "utf-8")
    assert (tmp_path / NAME).read_text("utf-8") == "another"


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with locked(tmp_path), pytest.raises(TrainingError, match="in use"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
