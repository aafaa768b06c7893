"""What a run writes down: `metrics.jsonl` line by line, `run.json` as a whole.

`run.json` says what was run, with which versions, on which machine, from which data, and what came out; its `status` is
`running`, `interrupted`, `failed` or `finished`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from intarsia.modules import write_atomic
from intarsia.train.checkpoint import read_json, save_json

METRICS = "metrics.jsonl"
RUN = "run.json"
_PACKAGES = ("intarsia", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Where the run takes place."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """`cpu, 2 threads` or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _processor() -> str:
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Record:
    """The written record of one run.

    Args:
        folder: the run directory; None keeps everything in memory.
        facts: first contents of `run.json`.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = dict(facts)
        self.history: list[dict[str, Any]] = []

    def write(self, **facts: Any) -> None:
        """Update `run.json`."""
        self.facts.update(facts)
        if self.folder is not None:
            save_json(self.folder / RUN, self.facts)

    def line(self, entry: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl`."""
        self.history.append(dict(entry))
        if self.folder is not None:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(_json_line(entry))

    def rewind(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Begin `metrics.jsonl` anew with the lines up to the checkpoint that the run goes on from."""
        self.history = [dict(entry) for entry in history]
        if self.folder is not None:
            data = "".join(_json_line(entry) for entry in self.history).encode("utf-8")
            write_atomic(self.folder / METRICS, [data], len(data))


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def read_run(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a run directory, None if there is none."""
    path = folder / RUN
    if not path.is_file():
        return None
    facts: dict[str, Any] = read_json(path)
    return facts


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut off by a kill is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    found = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
