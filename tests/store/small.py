"""Small modules for the tests of the store."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from intarsia.methods import build
from intarsia.modules import Module
from intarsia.store.store import Store
from tests.modules import make


def module(seed: int = 0, **changes: Any) -> Module:
    """A small module that requires nothing."""
    return make.module(seed, **{"requires": (), **changes})


def lora(seed: int, name: str = "lora", *, rank: int = 2, layers: tuple[int, ...] = (0, 1), **changes: Any) -> Module:
    """A LoRA on query and value of some layers, without a head, that arithmetic can read."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for site in ("q", "v"):
            tensors[f"{layer}.attn.{site}/lora.factor.up"] = torch.randn(4, rank, generator=g)
            tensors[f"{layer}.attn.{site}/lora.factor.down"] = torch.randn(rank, 4, generator=g)
    fields: dict[str, Any] = {"name": name, "method": build("lora", rank=rank), "tensors": tensors, "labels": None, **changes}
    return module(**fields)


def age(store: Store, seconds: float = 9000.0) -> None:
    """Make every file older than the grace period."""
    for blob in (store.path / "blobs").iterdir():
        os.utime(blob, (time.time() - seconds,) * 2)
