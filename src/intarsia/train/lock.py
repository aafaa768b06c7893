"""One process per run directory: a lock file with process id, host and the time the process began.

A lock whose process has ended (same host) is stale and is taken over.  A lock of another host cannot be checked and is
refused with the sentence that says how to remove it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intarsia.errors import StoreError, TrainingError

NAME = "run.lock"


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold the lock of a run directory for the duration of the block.

    Raises:
        TrainingError: another process holds it; the message says which.
    """
    path = Path(folder) / NAME
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid())})
    while not _create(path, mine):
        _take_over(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            if path.read_text("utf-8") == mine:
                path.unlink()


def _create(path: Path, text: str) -> bool:
    """Put the lock there whole, or find that one is there: a link appears with its content or not at all."""
    temporary = path.with_name(f".{NAME}-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: the content follows the name
            return _create_exclusively(path, text)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot lock the run directory {path.parent}: {error.strerror or error}") from error
    return True


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _take_over(path: Path) -> None:
    """Remove a stale lock, or refuse."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return
    holder = _parse(text)
    if holder is None or not stale(holder):
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise TrainingError(
            f"the run directory {path.parent} is in use by {who}. Wait for it, choose another directory, or, if you know "
            f"that it has ended, remove {path}"
        )
    aside = path.with_name(f".{NAME}-stale-{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_text("utf-8") != text:  # somebody else took over between reading and renaming: give it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _parse(text: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("pid"), int) and isinstance(found.get("host"), str):
            return found
    return None


def stale(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock names has ended, as far as this host can know."""
    if holder["host"] != socket.gethostname() or holder["pid"] <= 0:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists and belongs to somebody else, or the platform cannot say
        return False
    began = _began(holder["pid"])
    return began is not None and holder.get("began") is not None and began != holder["began"]


def _began(pid: int) -> str | None:
    """When a process began (boot id and clock ticks), so that a reused process id is noticed; None where unknown."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{ticks}"
    except (OSError, IndexError):
        return None
