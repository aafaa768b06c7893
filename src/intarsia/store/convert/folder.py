"""Reading and writing the folders of peers: a JSON configuration and a safetensors file, with limits before allocation.

Pickled weights (`.bin`) are refused, since opening one can run code, unless the caller allows the restricted loader (`pickled.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from intarsia._codec import parse_json
from intarsia.errors import IntarsiaError, ModuleError, SpecError, StoreError, listing, nearest
from intarsia.modules.atomic import write_atomic
from intarsia.modules.file import check_finite
from intarsia.store.convert.pickled import read_pickled

MAX_CONFIG = 4_000_000
MAX_HEADER = 4_000_000
MAX_TENSORS = 20_000


@contextlib.contextmanager
def sound(source: str) -> Iterator[None]:
    """Turn what goes wrong when fields or tensors of a file do not fit together into an error that says so.

    A file may hold any value of any type; what a reader makes of it without looking at each is caught here.
    """
    try:
        yield
    except IntarsiaError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"the field or tensor {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {str(error)[:200]}"
        raise ModuleError(f"{source}: its fields and tensors do not fit together ({what})") from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a folder's configuration file.

    Raises:
        StoreError: it is missing; sub-folders that have one are named.
        ModuleError: it is too large or no strict JSON object.
    """
    path = folder / name
    if not path.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{name}")) if folder.is_dir() else []
        hint = f"; name one of its sub-folders: {listing(inner)}" if inner else ""
        raise StoreError(f"{folder} has no {name}{hint}")
    if path.stat().st_size > MAX_CONFIG:
        raise ModuleError(f"{path}: {path.stat().st_size:,} bytes; a configuration has at most {MAX_CONFIG:,}")
    try:
        value = parse_json(path.read_bytes(), str(path))
    except SpecError as error:
        raise ModuleError(str(error)) from None
    if not isinstance(value, dict):
        raise ModuleError(f"{path}: not a JSON object")
    return value


def check_fields(raw: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuse fields that `what` does not have.

    Raises:
        ModuleError: names them.
    """
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise ModuleError(f"{what} has no field {listing(map(repr, unknown))}{nearest(unknown[0], known)}")


def read_tensors(folder: Path, name: str, pickled: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file, finite ones only.

    Args:
        pickled: name of the file that older versions of the peer write instead.
        allow_pickle: open that one in a restricted process if there is no other.

    Raises:
        StoreError: it is missing; a pickle beside it is refused with the way to convert it.
        ModuleError: it is damaged, breaks a limit or holds NaN or infinity.
    """
    path = folder / name
    if not path.is_file():
        if (folder / pickled).exists() and allow_pickle:
            return _plain(read_pickled(folder / pickled), folder / pickled)
        if (folder / pickled).exists():
            raise StoreError(
                f"{folder} holds {pickled}, a pickle; opening one can run code, so it is not read. Give allow_pickle=True to open it in a process "
                f"of its own that builds tensors only, or save it again where you trust it: from torch import load; from safetensors.torch import "
                f"save_file; save_file(load({pickled!r}, weights_only=True), {name!r}, metadata={{'format': 'pt'}})"
            )
        raise StoreError(f"{folder} has no {name}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ModuleError(f"{path}: its header would be {length:,} bytes, at most {MAX_HEADER:,} are allowed")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModuleError(f"{path} is no sound safetensors file: {error}") from None
    return checked(tensors, path)


def _plain(found: Mapping[tuple[str, ...], Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle that is one dictionary."""
    nested = [name for name in found if len(name) != 1]
    if nested:
        raise ModuleError(f"{path}: expected a dictionary of tensors, found {'/'.join(nested[0])[:80]!r}")
    return checked({name[0]: tensor for name, tensor in found.items()}, path)


def checked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors, if they are not too many and all finite.

    Raises:
        ModuleError: says which is not.
    """
    if len(tensors) > MAX_TENSORS:
        raise ModuleError(f"{path} lists {len(tensors):,} tensors; at most {MAX_TENSORS:,} are allowed")
    try:
        check_finite(tensors)
    except ModuleError as error:
        raise ModuleError(f"{path}: {error}") from None
    return tensors


def write_folder(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write files into a folder that is made if it is not there; none of them may exist.

    Raises:
        StoreError: a file of that name is there, or writing failed.
    """
    path = Path(folder)
    there = [name for name in files if (path / name).exists()]
    if there:
        raise StoreError(f"{path} already holds {listing(there)}; give a new folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path}: {error.strerror or error}") from error
    for name, data in files.items():
        write_atomic(path / name, [data], len(data))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Configuration text as peers write it: indented, keys sorted, no final newline."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file as torch programs write it."""
    return to_bytes({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata={"format": "pt"})


def as_float(tensor: Tensor) -> Tensor:
    """At least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tidy(value: float) -> float | int:
    """A whole number where rounding alone keeps it from being one."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value
