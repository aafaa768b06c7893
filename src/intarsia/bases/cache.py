"""The user's cache of converted bases: built beside, made durable, moved into place, checked when used.

An entry is a folder that never changes once it has its name.  Its `manifest.json` names the converter, the package and
the size and SHA-256 of every file.  Two processes that build the same entry wait for each other; where locks do not
work (some network drives) the second one finds the entry there and drops its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from intarsia.errors import BaseError

MANIFEST = "manifest.json"
FORMAT = 1
#: a manifest lists a handful of files
LARGEST_MANIFEST = 1 << 20
WAIT_SECONDS = 600
#: start of the names of folders that are being built or thrown away
BUILDING = ".building-"
#: such a folder without a change for this long was left by a builder that was killed
STALE_SECONDS = 3600

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """`$INTARSIA_CACHE`, or `$XDG_CACHE_HOME/intarsia`, or `~/.cache/intarsia`; not created here."""
    if own := os.environ.get("INTARSIA_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification asks to ignore relative ones
        return Path(xdg) / "intarsia"
    try:
        return Path.home() / ".cache" / "intarsia"
    except RuntimeError:
        raise BaseError("there is no home folder to keep converted bases in; set INTARSIA_CACHE to a folder") from None


def entry_path(name: str, package_version: str, converter_version: int) -> Path:
    """Folder of an entry; another package or converter version is another entry."""
    return cache_root() / "bases" / name / f"{package_version}-c{converter_version}"


def entries(name: str, converter_version: int) -> list[Path]:
    """Folders of all entries of a base, whatever version of the package they were made from."""
    found = cache_root().joinpath("bases", name).glob(f"[!.]*-c{converter_version}")
    return [path for path in found if path.is_dir()]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _sync(path: Path) -> None:
    """Make a file or folder durable; a system that cannot sync folders keeps them durable by itself."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a finished folder and make everything in it durable."""
    manifest = folder / MANIFEST
    files = sorted(path for path in folder.iterdir() if path != manifest)
    content = {
        "format": FORMAT,
        **facts,
        "files": {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in files},
    }
    manifest.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    for path in files:
        path.chmod(manifest.stat().st_mode & 0o777)  # libraries write some files readable by the owner only
        _sync(path)
    _sync(manifest)
    _sync(folder)


def problem(folder: Path, facts: dict[str, Any], *, thorough: bool = False) -> str | None:
    """What is wrong with an entry, None if nothing is.

    Args:
        facts: what the manifest must say (converter, package and its version).
        thorough: compare digests too, not only names and sizes.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            return f"{MANIFEST} is larger than {LARGEST_MANIFEST:,} bytes"
        content = json.loads(path.read_text("utf-8"))
        files = content["files"]
        wrong = [key for key, value in {"format": FORMAT, **facts}.items() if content.get(key) != value]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if wrong:
        return f"{MANIFEST} differs in {', '.join(wrong)}"
    for name, (size, expected) in listed.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, {size:,} were written"
        if thorough and digest(file) != expected:
            return f"{name} has another content than was written"
    return None


def ensure(
    target: Path, facts: dict[str, Any], build: Callable[[Path], None] | None, *, verify: bool = False
) -> list[str]:
    """Make sure an entry is there and whole; build it if not.

    Args:
        target: folder of the entry.
        facts: what identifies its content, kept in the manifest.
        build: fills an empty folder; None if the source is absent.
        verify: compare the digest of every file.

    Returns:
        What was done, for the base's notes: nothing if the entry was there and whole.

    Raises:
        BaseError: the entry is absent or damaged and cannot be built, or the cache cannot be written.
    """
    _sweep(target.parent)
    if target.is_dir() and problem(target, facts, thorough=verify) is None:
        return []
    if build is None:
        raise BaseError(f"the cached copy {target} is damaged: {problem(target, facts, thorough=verify)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock", timeout=WAIT_SECONDS):
            return _build(target, facts, build, verify)
    except TimeoutError as error:
        raise BaseError(
            f"another process has been building {target} for {WAIT_SECONDS} seconds; wait for it, or end it and try again"
        ) from error
    except OSError as error:
        raise BaseError(
            f"cannot write the cache {target.parent}: {error.strerror or error}; set INTARSIA_CACHE to a folder with room"
        ) from error


def _sweep(parent: Path) -> None:
    """Remove what killed builders left; by age, since a lock that does not work cannot tell who is alive."""
    for left in parent.glob(f"{BUILDING}*"):
        try:
            old = time.time() - left.stat().st_mtime > STALE_SECONDS
        except OSError:  # its builder has just finished
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)


def _build(target: Path, facts: dict[str, Any], build: Callable[[Path], None], verify: bool) -> list[str]:
    done = []
    if target.exists():
        reason = problem(target, facts, thorough=verify)
        if reason is None:  # built by the process we waited for
            return []
        log.warning("the cached copy %s is damaged (%s) and is built again", target, reason)
        done.append(f"the cached copy was damaged ({reason}) and was built again")
    work = target.parent / f"{BUILDING}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        build(work)
        _seal(work, facts)
        if done:
            target.rename(work.with_name(work.name + "-old"))
        try:
            work.rename(target)
        except OSError:
            if problem(target, facts) is not None:
                raise
            # a builder that the lock did not hold was quicker
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(work.with_name(work.name + "-old"), ignore_errors=True)
    _sync(target.parent)
    return done
