"""`read_pickled`: tensors of a file written by `torch.save`, opened in a restricted process.

A pickle is a program.  What it may do is limited three times: before anything is opened, the archive must be what torch
writes and nothing else (no path that climbs, no link, no compression, no code, one entry per name); a process of its own then
opens it with torch's `weights_only`, which builds tensors and refuses any other object; and that process has limits on
memory, time, files and processes, a minimal environment, and hands back a safetensors file, which is read as any other.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from intarsia.errors import ModuleError, StoreError, listing
from intarsia.modules.container import MAX_TENSORS

MAX_FILE = 8 << 30
MAX_PROGRAM = 256 << 20
"""Bytes of the pickle itself; its tensors lie beside it."""
SECONDS = 120
SHARED_COPIES = 64
"""How often tensors of one storage may repeat it: AdapterHub writes its prefixes once per layer."""
MAX_SHARED = 1 << 30
"""Bytes above which tensors may have no more than twice the size of their file."""
_ENTRY = re.compile(r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+)\Z")
_KEPT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "USERPROFILE", "VIRTUAL_ENV")


def read_pickled(path: str | os.PathLike[str], *, numpy: bool = False, seconds: int = SECONDS) -> dict[tuple[str, ...], Tensor]:
    """The tensors of a `torch.save` archive by their path of keys; sizes and lists of integers come as tensors of integers.

    Args:
        numpy: also accept numpy integers (composable-sft has them).
        seconds: of processor time.

    Raises:
        StoreError: the file is missing.
        ModuleError: the file is no plain archive of tensors, breaks a limit, or asks for anything but tensors.
    """
    path = Path(path)
    size = check_archive(path)
    warnings.warn(f"{path} is a pickle: opened in a restricted process, tensors only; prefer safetensors", stacklevel=2)
    with tempfile.TemporaryDirectory(prefix="intarsia-") as folder:
        target = Path(folder) / "tensors.safetensors"
        job = {"target": str(target), "bytes": max(2 * size, min(SHARED_COPIES * size, MAX_SHARED)), "seconds": seconds, "numpy": numpy}
        _run(job, path, folder, seconds)
        return _take(target, path)


def check_archive(path: Path) -> int:
    """Refuse an archive that is not exactly what torch writes; its size in bytes.

    Raises:
        StoreError, ModuleError: see `read_pickled`.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ModuleError(f"{path}: {size:,} bytes; at most {MAX_FILE:,} are read from a pickle")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModuleError(f"{path} is no zip archive as torch.save writes since 1.6 ({error}); load it where you trust it and save it again") from None
    if len(entries) > MAX_TENSORS:
        raise ModuleError(f"{path} lists {len(entries):,} entries; at most {MAX_TENSORS:,} are allowed")
    wrong = [reason for entry in entries if (reason := _why_not(entry))]
    names = [entry.filename for entry in entries]
    tops = {name.partition("/")[0] for name in names}
    if len(set(names)) != len(names):
        wrong.append("two entries have one name")
    if len(tops) != 1:
        wrong.append(f"entries lie in {len(tops)} folders ({listing(sorted(map(ascii, tops)))})")
    if sum(entry.file_size for entry in entries) > size:
        wrong.append("its entries claim more bytes than the file has")
    if wrong:
        raise ModuleError(f"{path} is not the plain archive that torch.save writes: {listing(wrong, 3)}; nothing of it was opened")
    return size


def _why_not(entry: zipfile.ZipInfo) -> str | None:
    name = ascii(entry.filename)[:80]
    if stat.S_ISLNK(entry.external_attr >> 16):
        return f"entry {name} is a link"
    top, _, rest = entry.filename.partition("/")
    if not top or top in (".", "..") or not _ENTRY.match(rest) or "\\" in entry.filename or ":" in entry.filename:
        return f"entry {name} is none that torch writes"
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        return f"entry {name} is compressed"
    if entry.flag_bits & 1:
        return f"entry {name} is encrypted"
    if rest == "data.pkl" and entry.file_size > MAX_PROGRAM:
        return f"entry {name} has {entry.file_size:,} bytes, at most {MAX_PROGRAM:,} are read"
    return None


def _run(job: dict[str, object], path: Path, folder: str, seconds: int) -> None:
    program = Path(__file__).with_name("pickle_child.py")
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    try:
        with open(path, "rb") as source:
            done = subprocess.run(
                [sys.executable, "-B", str(program), json.dumps(job)], stdin=source, capture_output=True, text=True, timeout=4 * seconds + 60, env=kept,
                cwd=folder, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModuleError(f"{path}: opening it took longer than {4 * seconds + 60} seconds and was stopped") from None
    if done.returncode:
        raise ModuleError(f"{path} was not read: {_reason(done.stdout, done.returncode)}")


def _reason(output: str, code: int) -> str:
    try:
        text = str(json.loads(output.splitlines()[-1])["error"])
    except (ValueError, LookupError, TypeError):
        return f"the process that opened it ended with {code} (a limit on memory or time, or a damaged file)"
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        return f"it asks for {found[1]}, and only tensors are read from a pickle"
    return text.partition("Please file an issue")[0].replace("\n", " ").strip()[:400]


def _take(target: Path, path: Path) -> dict[tuple[str, ...], Tensor]:
    try:
        with safe_open(target, framework="pt") as file:
            names = json.loads(file.metadata()["names"])
            return {tuple(name): file.get_tensor(str(index)) for index, name in enumerate(names)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModuleError(f"{path}: the process that opened it handed back nothing that can be read ({type(error).__name__})") from None
