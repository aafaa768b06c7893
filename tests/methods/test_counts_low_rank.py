"""Exact trainable counts of low-rank, subspace and orthogonal methods: closed formulas and published numbers."""

from __future__ import annotations

import pytest

from intarsia.methods import build
from tests.methods.test_counts import host

LLAMA = "attn.{q,k,v}, ffn.{up,down}"
D, L = 768, 12
CASES = [
    ("bert-base", "rslora", {"rank": 8}, 294_912),
    ("bert-base", "lora_plus", {"rank": 8}, 294_912),
    ("bert-base", "pissa", {"rank": 8, "at": "attn.{q,v}"}, 294_912),
    ("bert-base", "lora_fa", {"rank": 8}, 147_456),
    ("bert-base", "miss", {"rank": 8}, 147_456),
    ("bert-base", "dora", {"rank": 8}, 313_344),
    ("bert-base", "adalora", {"rank": 12, "at": "attn.{q,v}"}, 442_656),
    ("bert-base", "vera", {"rank": 256}, 24_576),
    ("bert-base", "vera", {"rank": 1024}, 43_008),
    ("bert-base", "lora_xs", {"rank": 16}, 6_144),
    ("bert-base", "lora_xs", {"rank": 25}, 15_000),
    ("bert-base", "svft", {}, 18_432),
    ("bert-base", "svft", {"gate": True}, 18_432 + 24),
    ("bert-base", "svft", {"width": 2}, 92_016),
    ("bert-base", "svft", {"width": 2, "pattern": "random"}, 92_016),
    ("bert-base", "fourierft", {"count": 1000}, 24_000),
    ("bert-base", "oft", {"block": 32}, 285_696),
    ("bert-base", "oft", {"block": 32, "share": True}, 24 * 32 * 31 // 2),
    # the released code stores b * b numbers per block (165,888 and 313,344); b (b - 1) / 2 of them count
    ("bert-base", "boft", {"block": 8, "factors": 1}, 165_888 - 24 * 96 * 8 * 9 // 2),
    ("bert-base", "boft", {"block": 8, "factors": 2}, 313_344 - 24 * 2 * 96 * 8 * 9 // 2),
    ("bert-base", "hra", {"count": 8}, 24 * 8 * D),
    ("bert-base", "road", {}, 24 * D),
    ("bert-base", "hira", {"rank": 32}, 24 * 32 * 2 * D),
    ("bert-base", "loha", {"rank": 8}, 2 * 294_912),
    ("bert-base", "lokr", {"rank": 8}, 24 * (24 * 24 + 8 * (32 + 32))),
    ("bert-base", "gralora", {"rank": 32}, 24 * 32 * 2 * D),
    ("bert-base", "c3a", {"block": 256}, 24 * D * D // 256),
    ("bert-base", "intrinsic", {"dimension": 1234}, 1234),
    ("roberta-large", "vera", {"rank": 256}, 61_440),
    ("roberta-large", "fourierft", {}, 48_000),
    ("t5-base", "said", {"dimension": 20_000}, 20_000),
    ("llama-7b", "dora", {"rank": 32, "at": LLAMA}, 56_975_360),
    ("llama-3.2-3b", "dora", {"rank": 32}, 9_289_728),
    ("llama-3.2-3b", "lora_fa", {"rank": 32}, 3_670_016),
    ("llama-3.2-3b", "vera", {"rank": 256}, 129_024),
    ("llama-3.2-3b", "fourierft", {}, 56_000),
    ("llama-3.2-3b", "adalora", {"rank": 64, "at": "attn.{q,v}"}, 18_353_664),
    ("gpt2", "dora", {"rank": 4}, L * 2 * (4 * 2 * D + D)),
    ("gpt2", "oft", {"block": 32}, 285_696),
]


@pytest.mark.parametrize(("shape", "method", "settings", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_count(shape: str, method: str, settings: dict[str, object], expected: int) -> None:
    assert host(shape).count(build(method, **settings)) == expected
