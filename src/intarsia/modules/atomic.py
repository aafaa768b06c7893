"""Writing a file so that a reader, a crash or a full disk sees the old file or the new one, whole.

Order of steps: temporary file in the same folder (created with the umask's mode), write, fsync, rename, fsync of the
folder.  Whatever goes wrong before the rename removes the temporary file; a killed process leaves it behind, and
`sweep_temporary` removes such leftovers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from intarsia.errors import StoreError

_TEMPORARY = re.compile(r"\.intarsia-[0-9]+-[0-9a-f]{16}\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: str | os.PathLike[str], chunks: Iterable[Any], size: int) -> Path:
    """Write `chunks` (bytes-like) to `path`, replacing a file of that name only when all is on disk.

    A symbolic link is followed: its target is replaced, the link stays.

    Args:
        size: bytes that will be written, for the message when the disk is full.

    Returns:
        The path written, links resolved.

    Raises:
        StoreError: the folder does not exist or may not be written, the path is a folder, the disk is full.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    temporary = folder / f".intarsia-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        _write_synced(temporary, chunks)
        os.replace(temporary, target)
        _sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may not exist; what went wrong first is what counts
            temporary.unlink()
        if isinstance(error, OSError):
            raise StoreError(_explain(error, target, size)) from error
        raise
    return target


def sweep_temporary(folder: str | os.PathLike[str], older_than: float = 3600.0) -> list[Path]:
    """Remove temporary files that killed writers left in a folder.

    Args:
        older_than: seconds since the last write; a younger file may belong to a writer at work.

    Returns:
        The files removed.
    """
    now, removed = time.time(), []
    for entry in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(entry.name) and now - entry.lstat().st_mtime >= older_than:
            entry.unlink(missing_ok=True)
            removed.append(entry)
    return removed


def _write_synced(path: Path, chunks: Iterable[Any]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)  # the umask decides, as for any file a user makes
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        _sync(descriptor)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # there fsync stops at the drive's cache
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; a platform without folder descriptors (Windows) has no such step."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path, size: int) -> str:
    folder = target.parent
    if error.errno in _FULL:
        free = shutil.disk_usage(folder).free
        limit = "the file-size limit of this process (ulimit -f)" if error.errno == errno.EFBIG else "no space left"
        return f"cannot write {target}: {limit}; the file needs {size:,} bytes, the disk has {free:,} free. Nothing was changed"
    if isinstance(error, FileNotFoundError):
        return f"cannot write {target}: the folder {folder} does not exist; create it with: mkdir -p {str(folder)!r}"
    if isinstance(error, IsADirectoryError):
        return f"cannot write {target}: it is a folder; give a file name in it"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"cannot write {target}: no permission to write in {folder} ({error.strerror}); choose another folder"
    return f"cannot write {target}: {error.strerror or error}"
