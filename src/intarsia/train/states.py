"""`States`: hidden states of many texts in one flat table, in memory or in a memory-mapped file.

Kept as float32 (exact), bfloat16 (half) or int8 with one scale per token (a quarter).  What is not here: whose states they are
and when they may be used (`trunk.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kept = Literal["fp32", "bf16", "int8"]
_TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "fp32": (torch.float32, np.float32),
    "bf16": (torch.bfloat16, np.int16),
    "int8": (torch.int8, np.int8),
}


def bytes_per_token(width: int, kept: Kept) -> int:
    """What one token takes."""
    return width * _TYPES[kept][0].itemsize + (4 if kept == "int8" else 0)


class States:
    """A table of `tokens` rows.

    Args:
        tokens: number of rows.
        width: of a state.
        kept: how numbers are kept.
        path: a file for them; None keeps them in memory.  A complete file at this place is used as it is.
    """

    def __init__(self, tokens: int, width: int, kept: Kept, path: Path | None = None) -> None:
        dtype, same = _TYPES[kept]
        self.kept = kept
        self.path = path
        self.complete = False
        self.scales: Tensor | None = None
        if path is None:
            self.values = torch.empty(tokens, width, dtype=dtype)
            if kept == "int8":
                self.scales = torch.empty(tokens)
            return
        size = tokens * bytes_per_token(width, kept)
        self.complete = path.is_file() and path.stat().st_size == size
        if not self.complete:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._part, "wb") as file:
                file.truncate(size)
        raw = np.memmap(path if self.complete else self._part, dtype=np.uint8, mode="r+", shape=(size,))
        cut = tokens * width * dtype.itemsize
        self.values = torch.from_numpy(raw[:cut].view(same)).view(dtype).view(tokens, width)
        if kept == "int8":
            self.scales = torch.from_numpy(raw[cut:].view(np.float32))
        self._raw = raw

    @property
    def _part(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".part")

    def put(self, rows: Tensor, states: Tensor) -> None:
        """Keep states [n, d] as the given rows [n]."""
        states = states.float().cpu()
        if self.scales is not None:
            scale = states.abs().amax(-1).clamp_min(1e-12) / 127
            self.scales[rows] = scale
            states = (states / scale[:, None]).round()
        self.values[rows] = states.to(self.values.dtype)

    def get(self, rows: Tensor) -> Tensor:
        """States [n, d] of the given rows [n], in float32."""
        found = self.values[rows].float()
        return found if self.scales is None else found * self.scales[rows][:, None]

    def finish(self) -> None:
        """All rows are in: a file gets its name."""
        if self.path is not None and not self.complete:
            self._raw.flush()
            os.replace(self._part, self.path)
        self.complete = True

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self._part.unlink(missing_ok=True)
