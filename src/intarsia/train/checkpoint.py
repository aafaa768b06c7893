"""Checkpoints: a folder whose manifest, written last, names every file with its size and SHA-256.

    checkpoints/step-000120/
        module.safetensors   the trained module as it was after this step
        best.safetensors     the best one so far, if that is an earlier one
        optimizer.pt  scheduler.pt  rng-0.pt (one per process)      tensors and plain values only
        trainer_state.json   what the Trainer counts       run_state.json   what the run counts
        manifest.json

A folder without a manifest is incomplete (the process was killed while writing) and is passed over for the one before.  A
complete one in which a file is missing or changed is refused: going on without optimiser or random states would give
another module without saying so.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intarsia._codec import canonical_json, parse_json
from intarsia.errors import SpecError, StoreError, TrainingError
from intarsia.modules import Module, load, write_atomic

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MODULE = "module.safetensors"
BEST = "best.safetensors"
FORMAT = 1
_NAME = re.compile(r"step-([0-9]{6,})")
_FILE = re.compile(r"[a-z][a-z0-9_-]*\.[a-z]+")
_MAX_JSON = 200_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete, verified checkpoint.

    Attributes:
        step: optimiser steps behind it.
        plan: what defined the run (recipe, data, module, task ...), see `difference`.
        files: SHA-256 by file name.
    """

    path: Path
    step: int
    plan: Mapping[str, Any]
    files: Mapping[str, str]

    def module(self) -> Module:
        """The module after this step."""
        return load(self.path / MODULE)

    def best(self) -> Module | None:
        """The best module so far; None if there was no evaluation yet."""
        best = self.run_state()["best"]
        if best is None:
            return None
        return load(self.path / (BEST if BEST in self.files else MODULE))

    def along(self, name: str) -> Module:
        """A module that is trained along, after this step."""
        return load(self.path / along_file(self._others(), name))

    def best_along(self, name: str) -> Module:
        """The same at the best evaluation so far."""
        file = along_file(self._others(), name, best=True)
        return load(self.path / file) if file in self.files else self.along(name)

    def _others(self) -> list[str]:
        return list(self.plan.get("along", {}))

    def run_state(self) -> dict[str, Any]:
        """What `loop.py` counts."""
        state: dict[str, Any] = read_json(self.path / "run_state.json")
        return state

    def tensors(self, name: str) -> Any:
        """Contents of a .pt file: tensors and plain values, never code."""
        path = self.path / name
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise TrainingError(f"{path}: not a file of tensors and plain values, it is not read: {error}") from error


def along_file(others: Sequence[str], name: str, best: bool = False) -> str:
    """Name of the file of a module that is trained along; modules' own names are not always names of files."""
    return f"{'best-' if best else ''}along-{list(others).index(name)}.safetensors"


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:06d}"


def begin(run: Path, step: int) -> Path:
    """An empty folder for the checkpoint of a step; what a killed process left there is removed."""
    path = folder(run, step)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def save_tensors(path: Path, value: Any) -> None:
    """Write tensors and plain values."""
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def save_json(path: Path, value: Any) -> None:
    """Write plain values, whole or not at all."""
    data = (json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode("utf-8")
    write_atomic(path, [data], len(data))


def read_json(path: Path) -> Any:
    """Read plain values, strictly."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise TrainingError(f"{path}: larger than {_MAX_JSON:,} bytes")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except SpecError as error:
        raise TrainingError(str(error)) from error


def complete(path: Path, step: int, plan: Mapping[str, Any]) -> None:
    """Write the manifest of everything in a checkpoint's folder: from now on it counts."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(path.iterdir())}
    save_json(path / MANIFEST, {"format": FORMAT, "step": step, "plan": dict(plan), "files": files})


def rotate(run: Path, keep: int) -> None:
    """Remove all but the newest complete checkpoints, and incomplete ones older than those."""
    found = _folders(run)
    whole = [path for _, path in found if (path / MANIFEST).is_file()]
    kept = set(whole[-keep:])
    for _, path in found:
        if path not in kept and path != found[-1][1]:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that half a removal is an incomplete one
            shutil.rmtree(path, ignore_errors=True)


def remove(run: Path) -> None:
    """Remove all checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def latest(run: Path) -> tuple[Checkpoint, list[Path]]:
    """The newest complete checkpoint, and the incomplete newer ones that were passed over.

    Raises:
        TrainingError: there is none, or a file of it is missing or changed (named).
    """
    passed: list[Path] = []
    for _, path in reversed(_folders(run)):
        if (path / MANIFEST).is_file():
            return read(path), passed
        passed.append(path)
    what = f"{len(passed)} incomplete ones" if passed else "none"
    raise TrainingError(f"{run}: no complete checkpoint to resume from ({what} in {run / FOLDER}); start anew in an empty directory")


def read(path: Path) -> Checkpoint:
    """A complete checkpoint, every file verified.

    Raises:
        TrainingError: names the file and what is wrong with it.
    """
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TrainingError(f"{path / MANIFEST}: not a checkpoint manifest of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
        raise TrainingError(f"{path / MANIFEST}: malformed list of files")
    for name, wanted in files.items():
        _verify(path / name, wanted)
    return Checkpoint(path, int(manifest["step"]), manifest["plan"], {name: str(f["sha256"]) for name, f in files.items()})


def _verify(file: Path, wanted: Mapping[str, Any]) -> None:
    if file.is_symlink() or not file.is_file():
        raise TrainingError(f"{file} is missing; an exact continuation is impossible without it. Put it back, or start anew")
    size = file.stat().st_size
    if size != wanted.get("bytes"):
        raise TrainingError(f"{file} was changed: {size:,} bytes, {wanted.get('bytes'):,} were written; put the right file back, or start anew")
    if file_sha256(file) != wanted.get("sha256"):
        raise TrainingError(f"{file} was changed: its SHA-256 is not that of the manifest; put the right file back, or start anew")


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the plan of a checkpoint and that of this run, one sentence each."""
    found = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if canonical_json(old) == canonical_json(new):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{line}" for line in difference(old, new)]
        else:
            found.append(f"{key} was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _folders(run: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step, oldest first."""
    where = run / FOLDER
    if not where.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in where.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)
