"""Small modules for the tests of this room, and tools to damage their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from intarsia.methods import build
from intarsia.modules import DTYPES, Card, Module
from intarsia.sites.fingerprint import Fingerprint

BLANK = "0" * 64


def base(weights: str = "aa", **changes: Any) -> Fingerprint:
    fields = {"architecture": "bert", "layers": (2,), "width": 4, "vocabulary": 99, "shapes": "5a", "tokenizer": "7c", "dtype": "float32"}
    return Fingerprint(**{"weights": weights, **fields, **changes})


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "1.attn.q/lora.up": torch.randn(6, 2, generator=g),
        "0.attn.q/lora.down": torch.randn(2, 4, generator=g),
        "head/head.bias": torch.randn(3, generator=g).bfloat16(),
        "tied/shared.mask": torch.tensor([True, False, True]),
    }


def module(seed: int = 0, **changes: Any) -> Module:
    fields: dict[str, Any] = {
        "name": "swh",
        "method": build("lora", rank=2),
        "tensors": tensors(seed),
        "base": base(),
        "labels": ("no", "yes", "ŋ'ombe"),
        "roles": {"language": "swh", "task": "topic"},
        "requires": ("ab" * 32,),
        "card": Card(title="Swahili topics", languages=("swh",), recipe={"lr": 5e-4, "seeds": (1, 2)}),
        "context": {"prefix": "query: ", "max_length": 128},
    }
    return Module(**{**fields, **changes})


def one_of_each(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tensor of every dtype, with a scalar and an empty one among them."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        made[f"{i}.ffn/x.{name}"] = (torch.randn(3, 5, generator=g) * 50).to(dtype)
    made["stem/x.scalar"] = torch.tensor(-0.0)
    made["stem/x.empty"] = torch.empty(0, 4)
    return made


def sparse(seed: int = 0) -> dict[str, torch.Tensor]:
    """A mask, indices in two types and shapes, values, and matrices."""
    g = torch.Generator().manual_seed(seed)
    return {
        "0.ffn.up/diff.mask": torch.rand(40, 77, generator=g) < 0.1,
        "0.ffn.up/diff.index": torch.randperm(90_000, generator=g)[:700].sort().values,
        "1.ffn.up/diff.index": torch.stack([torch.randperm(2**20, generator=g)[:90].sort().values for _ in range(3)]).int(),
        "0.ffn.up/diff.values": torch.randn(700, generator=g),
        "0.attn.q/lora.up": torch.randn(48, 8, generator=g),
        "0.attn.q/lora.down": torch.randn(8, 48, generator=g).bfloat16(),
        "stem/x.order": torch.randperm(500, generator=g),
    }


def container(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with an arbitrary header."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def forked(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own (a fork, which need not import anything again), as JSON can hold it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    assert text, "the forked process failed; see its traceback on stderr"
    return json.loads(text)


def forge(file: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A module file after editing its parsed header, with a checksum that is right again."""
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    edit(header)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "checksum" in metadata:
        metadata["checksum"] = BLANK
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    blank = len(text).to_bytes(8, "little") + text
    checksum = hashlib.sha256(blank).hexdigest()
    return blank.replace(f'"checksum":"{BLANK}"'.encode(), f'"checksum":"{checksum}"'.encode()) + data
