"""`new_folder`: a folder that appears under its name only when all of it is on disk, and never over something that is there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from intarsia.errors import StoreError


def check_free(target: Path) -> None:
    """Refuse a path at which something is.

    Raises:
        StoreError: a file, folder or link is there, or the folder it would lie in is missing.
    """
    if os.path.lexists(target):
        raise StoreError(f"{target} exists already and is not replaced; give another path or remove it first")
    if not target.parent.is_dir():
        raise StoreError(f"cannot write {target}: the folder {target.parent} does not exist; create it with: mkdir -p {str(target.parent)!r}")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; renamed to it at the end, removed if anything fails.

    Raises:
        StoreError: something is at `target`, before or after the work, or writing failed.
    """
    check_free(target)
    temporary = target.parent / f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as the umask says; safetensors makes files that only their owner may read
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(mode)
            _sync(path)
        check_free(target)  # a rename would replace an empty folder made in the meantime
        temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows has no descriptors of folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
