"""Files written by earlier releases: each is still read as what it was, and written again byte for byte.

`golden/v1.safetensors` was written by format version 1, `golden/v2.safetensors` by version 2 with `dtype="int8"`.  They are never regenerated: a change that breaks this test orphans
the modules people have.  Their method has no patches, so that only the file format is tested here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from intarsia.methods import Method
from intarsia.modules import Card, Cost, DataSource, Metric, Module, compact, dumps, load, read_header
from tests.modules.make import base

GOLDEN = Path(__file__).parent / "golden"


def version_1() -> Module:
    """What the file holds."""
    return Module(
        name="ŋ'ombe",
        method=Method("golden", source="arXiv 2106.09685", settings={"rank": 2, "alpha": 0.1, "at": ["q", "v"]}),
        tensors={
            "0.attn.q/lora.down": torch.arange(8.0).reshape(2, 4) / 7,
            "0.attn.q/lora.up": torch.arange(6.0).reshape(3, 2).bfloat16() / 3,
            "head/head.index": torch.tensor([2**40, -1]),
            "tied/shared.mask": torch.tensor([True, False, True]),
        },
        base=base("aa" * 16),
        labels=("no", "yes"),
        roles={"language": "swh", "task": "topic"},
        requires=("ab" * 32,),
        context={"prefix": "query: ", "max_length": 128, "rate": 1e-07},
        card=Card(
            title="Golden", languages=("swh", "kab-Latn"), data=(DataSource("SIB-200", rows=701),), recipe={"lr": 5e-4, "seeds": [1, 2]},
            metrics=(Metric("accuracy", "test", "swh", 0.81, 0.76, 0.86, 204, (1,)),), cost=Cost(seconds=62.0, trainable=14), parents=("cd" * 32,),
        ),
    )  # fmt: skip


def test_version_1_is_read_and_written_as_ever() -> None:
    loaded, made = load(GOLDEN / "v1.safetensors"), version_1()
    assert loaded.digest == made.digest == DIGEST
    assert loaded.card == made.card and loaded.roles == made.roles and loaded.context == made.context
    assert all(torch.equal(loaded.tensors[k], t) for k, t in made.tensors.items())
    assert dumps(loaded) == dumps(made) == (GOLDEN / "v1.safetensors").read_bytes()


def version_2() -> Module:
    """What the file of version 2 holds, before rounding: tensors in every code."""
    return replace(version_1(), tensors={
        **version_1().tensors,
        "0.ffn.up/diff.index": torch.arange(400) ** 2 % 70_001 + torch.arange(400) * 70_001,
        "0.ffn.up/diff.mask": torch.arange(3000).reshape(30, 100) % 7 == 0,
        "0.ffn.up/diff.values": torch.arange(400.0) / 9 - 20,
        "1.attn.q/lora.up": torch.arange(-200.0, 200.0).reshape(20, 20) / 11,
    })  # fmt: skip


def test_version_2_is_read_and_written_as_ever() -> None:
    loaded, made = load(GOLDEN / "v2.safetensors"), compact(version_2(), "int8")
    assert read_header(GOLDEN / "v2.safetensors").version == 2 and len(read_header(GOLDEN / "v2.safetensors").coding) == 4
    assert loaded.digest == made.digest == DIGEST_2
    assert loaded.card == made.card
    assert dumps(loaded, dtype="int8") == dumps(version_2(), dtype="int8") == (GOLDEN / "v2.safetensors").read_bytes()


DIGEST_2 = "daf99be94df43bbde8fbe70bbc2834ee7415d59433d1f2bbf5c0f7b3dc5ac931"
DIGEST = "75bae746547bd2edb1385123e51ba66c908eb00b9c023a31b11a170f65d72295"
