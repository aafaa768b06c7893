"""Random states: saved with a checkpoint, restored exactly, and given back to the caller.

States are tensors and plain numbers, so that a file of them loads with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators (and of every GPU)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def restore(saved: dict[str, Any]) -> None:
    """Set what `state` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"][: torch.cuda.device_count()])


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever is drawn in this block, afterwards all generators are as before."""
    before = state()
    try:
        yield
    finally:
        restore(before)


def seed_of(*words: object) -> int:
    """A 63-bit seed from any words, the same on every platform."""
    text = "\0".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(*words: object) -> None:
    """Seed every generator from words."""
    seed = seed_of(*words)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
