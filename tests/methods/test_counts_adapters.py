"""Trainable counts of soft prompts and the adapter family against the closed formulas and published numbers."""

from __future__ import annotations

from typing import Any

import pytest

from intarsia.methods import build
from intarsia.patches import Head, MultiMaskLabels
from tests.methods.test_counts import host

D, L = 768, 12
SITE = 2 * 768 * 24 + 24 + 768
T5_NORMS = 47_616
EIGHT = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

CASES: list[tuple[str, str, dict[str, Any], int]] = [
    # soft prompts
    ("bert-base", "p_tuning", {"length": 20}, 8_271_360 + 20 * D),
    ("bert-base", "p_tuning_v2", {"length": 20}, 368_640),
    ("bert-base", "llama_adapter", {"length": 10, "layers": "2:"}, 10 * (2 * 10 * D + 1)),
    ("bert-base", "prefix", {"length": 30, "reparameterise": None, "mix": "zero_gate"}, 552_960 + L),
    ("llama-3.2-3b", "p_tuning_v2", {"length": 200}, 11_468_800),
    # adapters on bert-base
    ("bert-base", "mam", {"length": 30, "reparameterise": 800, "width": 384}, 22_493_984),
    ("bert-base", "mam", {"length": 30, "reparameterise": None, "width": 384}, 7_644_672),
    ("bert-base", "mam", {"length": 16, "reparameterise": None, "width": 16}, 589_824 + L * (16 + D)),  # and biases
    ("bert-base", "adapterdrop", {"lowest": 5}, 521_808),
    ("bert-base", "adapterdrop", {"lowest": 5, "robust": True}, 894_528),
    ("bert-base", "compacter", {"norms": False}, 57_088),
    ("bert-base", "compacter_pp", {"norms": False}, 28_576),
    ("bert-base", "mh_parallel", {"width": 30}, L * (2 * 30 * D + 30 + D)),
    ("bert-base", "unipelt", {}, 11_083_376),
    ("bert-base", "unipelt", {"reparameterise": None}, 1_410_672),
    ("bert-base", "unipelt", {"reparameterise": None, "lora": False}, 1_078_848 + 2 * L * (D + 1)),
    ("bert-base", "loreft", {"rank": 4, "first": 7, "last": 7}, 73_776),
    ("bert-base", "loreft", {"rank": 1, "first": 3, "last": 3, "tied": False}, 36_888),
    ("bert-base", "noreft", {"rank": 4}, 73_776),
    ("bert-base", "direft", {"rank": 4}, 73_776),
    ("llama-7b", "loreft", {"rank": 8}, 2_097_408),
    ("bert-base", "pfeiffer", {"learn_scale": True}, 894_528 + L),
    ("bert-base", "pfeiffer", {"norm": "both"}, 894_528 + L * 4 * D),
    ("bert-base", "pfeiffer", {"insertion": "parallel", "scale": 4}, 894_528),
    # T5-base, as in Compacter's and HyperFormer's code
    ("t5-base", "houlsby", {"width": 24, "layers": "5:"}, 28 * SITE + T5_NORMS),
    ("t5-base", "pfeiffer", {"width": 24, "at": "attn"}, 24 * SITE),
    ("t5-base", "adapter_lowrank", {}, 161_664),
    ("t5-base", "phm_adapter", {}, 398_976),
    ("t5-base", "compacter", {}, 161_728),
    ("t5-base", "compacter_pp", {}, 104_704),
    ("t5-base", "hyperformer", {"tasks": EIGHT}, 122_327_168),
    ("t5-base", "hyperformer_pp", {"tasks": EIGHT}, 5_211_056),
    ("t5-base", "adapterdrop", {"base": "houlsby", "width": 24, "lowest": 5}, 1_101_984),
    ("t5-base", "lst", {}, 3_878_712),
    # RoBERTa-large
    ("roberta-large", "perfect", {}, 3_272_192),
    ("roberta-large", "perfect", {"labels": ("bad", "good"), "masks": 2}, 3_272_192 + 1024 * 2 * 2),
]


@pytest.mark.parametrize(("shape", "method", "settings", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_count(shape: str, method: str, settings: dict[str, Any], expected: int) -> None:
    assert host(shape).count(build(method, **settings)) == expected


def test_published_shares() -> None:
    """The percentages of the papers' tables, of T5-base's 222,882,048."""
    total = 222_882_048
    for method, settings, percent in (
        ("compacter", {}, 0.073),
        ("compacter_pp", {}, 0.047),
        ("phm_adapter", {}, 0.179),
        ("adapter_lowrank", {}, 0.073),
    ):
        assert round(100 * host("t5-base").count(build(method, **settings)) / total, 3) == percent
    hyper = host("t5-base").count(build("hyperformer_pp", tasks=EIGHT))
    assert round(100 * hyper / 8 / total, 2) == 0.29


def test_a_generated_method_grows_by_one_embedding_per_task() -> None:
    for name in ("hyperformer", "hyperformer_pp"):
        two, three = (host("t5-base").count(build(name, tasks=EIGHT[:n])) for n in (2, 3))
        assert three - two == 64


def test_heads_of_perfect() -> None:
    spec = MultiMaskLabels(("a", "b", "c"), masks=3)
    base = host("roberta-large").count(build("perfect"))
    assert host("roberta-large").count(build("perfect").with_head(spec)) == base + 1024 * 9
    assert host("roberta-large").count(build("perfect").with_head(Head(("a", "b")))) == base + 2 * 1024 + 2
