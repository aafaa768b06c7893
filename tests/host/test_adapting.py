"""Weights found without training: search, entropy, one gradient; prototypes from data; and reports of what a router does."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import CompositionError, SpecError, UsageError
from intarsia.host import Host
from intarsia.host.adapting import Emea, entropy, few_shot, inferred, least_entropy, search, tables
from intarsia.host.prototypes import arrow, centroids, closest, gaussians, phatgoose, routers
from intarsia.host.report import picture, report, watching
from intarsia.methods import build
from intarsia.patches import Head
from tests import zoo
from tests.host.kit import disturb, small

MEMBERS = ("a", "b", "c")
MIX = "fuse(a, b, c; router=r)"


@functools.cache
def shared() -> tuple[Host, dict[str, Tensor]]:
    """Three languages and a task with a head above them."""
    model, inputs = zoo.make("bert", headless=True)
    host = Host(model)
    for seed, name in enumerate(MEMBERS):
        host.add(name, build("pfeiffer", reduction=4), seed=seed)
        disturb(host, name, seed, 0.3)
    host.add("task", small("lora").with_head(Head(("x", "y", "z"), dropout=0.0, standardise=False)))
    disturb(host, "task", 5, 0.5)
    return host, inputs


def fresh(kind: str = "soup", **settings: Any) -> tuple[Host, dict[str, Tensor]]:
    host, inputs = shared()
    if "r" in host.names:
        host.remove("r")
    host.router("r", kind, MEMBERS, **settings)
    return host, inputs


def state(host: Host) -> dict[str, Any]:
    weights = {k: v.detach().clone() for k, v in host.model.state_dict().items()}
    return {"flags": [p.requires_grad for p in host.model.parameters()], "modes": [m.training for m in host.model.modules()],
            "grads": [p.grad is None for p in host.model.parameters()], "weights": weights}  # fmt: skip


def same(a: dict[str, Any], b: dict[str, Any], but: str = "nothing") -> bool:
    kept = all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items() if but not in k)
    return kept and all(a[k] == b[k] for k in ("flags", "modes", "grads"))


def test_entropy_is_over_real_tokens() -> None:
    logits = torch.tensor([[[0.0, 0.0], [50.0, 0.0]]])
    assert float(entropy(logits, torch.tensor([[1, 1]]))) == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert float(entropy(logits, torch.tensor([[1, 0]]))) == pytest.approx(math.log(2), abs=1e-6)


def test_emea() -> None:
    host, inputs = fresh(squash="softmax", start=0.5)
    assert [p.tolist() for p in tables(host, "r")] == [[0.5] * 3] * 2, "one number per member and layer"
    before = state(host)
    answer = Emea(host, "r", f"{MIX} >> task", rate=1.0, steps=8)
    output, seen = answer.answered(inputs)
    assert len(seen) == 9 and seen[-1] < seen[0] and seen == sorted(seen, reverse=True), seen
    assert same(before, state(host)), "nothing is left of it"
    again, _ = answer.answered(inputs)
    assert torch.equal(output["logits"], again["logits"]), "and so it is the same again"
    with torch.inference_mode():
        assert torch.equal(answer(inputs)["logits"], output["logits"]), "inside an evaluation too"
    plain = Emea(host, "r", f"{MIX} >> task", steps=0)(inputs)["logits"]
    with host.using("average(a, b, c) >> task") as model, torch.no_grad():
        torch.testing.assert_close(plain, model(**inputs)["logits"], rtol=1e-5, atol=1e-5)
    with pytest.raises((RuntimeError, ValueError)):
        Emea(host, "r", f"{MIX} >> task")({"input_ids": inputs["input_ids"][None, None]})
    assert same(before, state(host)), "after a failure too"
    with pytest.raises(UsageError, match="no logits"):
        Emea(host, "r", MIX)(inputs)


def test_one_member_has_nothing_to_choose() -> None:
    host, inputs = shared()
    if "r" in host.names:
        host.remove("r")
    host.router("r", "soup", ["a"], squash="softmax")
    output = Emea(host, "r", "fuse(a; router=r) >> task", steps=3)(inputs)["logits"]
    with host.using("a >> task") as model, torch.no_grad():
        torch.testing.assert_close(output, model(**inputs)["logits"])


def test_least_entropy() -> None:
    host, inputs = fresh(squash="clamp", scope="site", start=0.3)
    before = state(host)
    losses = least_entropy(host, "r", [(f"{MIX} >> task", "task", [inputs]), (f"{MIX} >> task", None, [inputs, inputs])], steps=6, rate=0.05)
    assert len(losses) == 6 and losses[-1] < losses[0]
    after = state(host)
    assert same(before, after, but="m_r") and not same(before, after), "only the router's weights have moved"


def test_inferred_is_the_gradient() -> None:
    host, inputs = fresh(scope="shared", start=1 / 3)
    found = inferred(host, "r", f"{MIX} >> task", inputs)
    (table,) = tables(host, "r")

    def at(i: int, step: float) -> float:
        with torch.no_grad():
            table[i] += step
            with host.using(f"{MIX} >> task") as model:
                value = float(entropy(model(**inputs)["logits"].double()))
            table[i] -= step
        return value

    by_hand = torch.tensor([-(at(i, 1e-2) - at(i, -1e-2)) / 2e-2 for i in range(3)])
    torch.testing.assert_close(found, by_hand, rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("optimiser", ["cma", "scipy"])
def test_search_finds_weights(optimiser: str) -> None:
    pytest.importorskip(optimiser)
    host, _ = fresh(scope="shared", start=0.0)
    (table,) = tables(host, "r")
    before = state(host)
    target = torch.tensor([0.7, -0.4, 1.2])
    asked = []

    def score() -> float:
        asked.append(table.detach().clone())
        return float((table.detach() - target).square().sum())

    best = search(host, "r", score, steps=150, l1=0.0, optimiser=optimiser)  # type: ignore[arg-type]
    assert len(asked) <= 150 and best < 0.02 and float((table.detach() - target).abs().max()) < 0.15
    assert all(float(t.abs().max()) <= 1.5 for t in asked), "within bounds"
    assert min(float((t - target).square().sum()) for t in asked) == pytest.approx(best, abs=1e-9), "the best one stays"
    assert same(before, state(host), but="m_r")


def test_search_by_few_examples() -> None:
    host, inputs = fresh(scope="shared", start=0.0)
    batch = {**inputs, "labels": torch.tensor([0, 2])}
    loss = lambda output, b: torch.nn.functional.cross_entropy(output["logits"], b["labels"])  # noqa: E731
    score = few_shot(host, f"{MIX} >> task", [batch], loss=loss)
    start = score()
    best = search(host, "r", score, steps=24, seed=1)
    assert best <= start and score() + 0.05 * float(tables(host, "r")[0].detach().abs().mean()) == pytest.approx(best, abs=1e-5)
    with pytest.raises(UsageError, match="no batches"):
        few_shot(host, MIX, [])
    host.remove("r").router("r", "experts", MEMBERS)
    with pytest.raises(SpecError, match="no table of weights"):
        search(host, "r", score)


@functools.cache
def texts() -> dict[str, list[dict[str, Tensor]]]:
    """Examples of three domains: low, middle and high token ids."""
    draw = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(5 + 30 * i, 35 + 30 * i, (6, 7), generator=draw) for i, name in enumerate(MEMBERS)}
    return {name: [{"input_ids": v[:3], "attention_mask": torch.ones(3, 7, dtype=torch.long)}, {"input_ids": v[3:], "attention_mask": torch.ones(3, 7, dtype=torch.long)}] for name, v in ids.items()}


@pytest.mark.parametrize("make", [gaussians, centroids])
def test_routers_from_data_know_their_domains(make: Any) -> None:
    host, _ = shared()
    if "r" in host.names:
        host.remove("r")
    make(host, "r", texts(), **({"temperature": 1.0} if make is gaussians else {"temperature": 0.02}))
    batches = [b for found in texts().values() for b in found]
    domains = [name for name in MEMBERS for _ in range(6)]
    found = report(host, "r", MIX, batches, by={"domain": domains})
    for value, share in found.by_value["domain"].items():
        assert MEMBERS[int(share.argmax())] == value, (value, share)
    assert found.information["domain"]["0.ffn"] > 0.2 and all(v <= math.log(3) + 1e-6 for v in found.information["domain"].values())
    assert closest(host, texts(), texts()["b"], 2)[0] == "b"
    with pytest.raises(UsageError, match="no rows"):
        make(host, "unfinished", {**texts(), "b": []})
    assert "unfinished" not in host.names
    assert set(closest(host, texts(), texts()["c"], 3)) == set(MEMBERS)


def test_arrow_routes_and_a_new_expert_adds_a_row() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, name in enumerate((*MEMBERS, "d")):
        host.add(name, small("lora"), seed=seed)
        disturb(host, name, seed)
    arrow(host, "r", MEMBERS, top=2)
    arrow(host, "s", (*MEMBERS, "d"), top=2)
    for (_, small_), (_, large) in zip(routers(host, "r"), routers(host, "s")):
        assert torch.equal(large.scorer.prototypes[:3], small_.scorer.prototypes)  # type: ignore[union-attr, index]
        torch.testing.assert_close(small_.scorer.prototypes.norm(dim=1), torch.ones(3))  # type: ignore[union-attr, operator]
    with watching(host) as notes, host.using(MIX) as m, torch.no_grad():
        m(**inputs)
    assert len(notes) == 4 and all(n.weights.shape == (*inputs["input_ids"].shape, 3) and int((n.weights > 0).sum(-1).max()) == 2 for n in notes)
    host.add("p", build("pfeiffer", reduction=4))
    with pytest.raises(CompositionError, match="has no prototype"):
        arrow(host, "t", ("a", "p"))
    assert "t" not in host.names


def test_phatgoose_compares_gates() -> None:
    host, inputs = shared()
    for name in [n for n in host.names if n in ("r", "ga", "gb", "p")]:
        host.remove(name)
    host.router("ga", "gate", ["a"]).router("gb", "gate", ["b"])
    disturb(host, "ga", 1)
    disturb(host, "gb", 2)
    phatgoose(host, "p", {"a": "ga", "b": "gb"}, top=1)
    for site, form in routers(host, "p"):
        own = [next(f for s, f in routers(host, g) if s.name == site.name).scorer.gate[0] for g in ("ga", "gb")]  # type: ignore[union-attr, index]
        assert torch.equal(form.scorer.gate, torch.stack(own))  # type: ignore[arg-type]
    with host.using("fuse(a, b; router=p) >> task") as model, torch.no_grad():
        assert torch.isfinite(model(**inputs)["logits"]).all()
    with pytest.raises(CompositionError, match="'gb' is no gate of 'a'"):
        phatgoose(host, "q", {"a": "gb"})


def test_report() -> None:
    host, inputs = fresh("fixed", weights=(0.5, 0.25, 0.25))
    found = report(host, "r", f"{MIX} >> task", [inputs, inputs], by={"lang": ["x", "y", "x", "y"]})
    assert found.overall() == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25}) and found.tokens == 4
    assert found.entropy["0.ffn"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4)) and found.most["1.ffn"] == pytest.approx(math.log(3))
    assert found.information["lang"]["0.ffn"] == pytest.approx(0.0, abs=1e-9), "the same for all languages"
    host.remove("r").router("r", "fixed", MEMBERS, keys=("x", "y", "z"), context="lang")
    languages = ["x", "y", "x", "y"]
    found = report(host, "r", MIX, [inputs, inputs], by={"lang": languages}, context={"lang": languages})
    assert found.information["lang"]["0.ffn"] == pytest.approx(math.log(2)) and found.by_value["lang"]["y"].tolist() == [0.0, 1.0, 0.0]
    assert found.entropy["0.ffn"] == pytest.approx(0.0, abs=1e-6) and found.decided["0.ffn"] == 1.0
    assert picture(found).startswith(b"\x89PNG") and len(found.lines()) == 4 and found.to_dict()["sites"]["1.ffn"]["usage"]["a"] == pytest.approx(0.5)
    host.remove("r").router("r", "experts", MEMBERS, top=None)
    padded = {**inputs, "attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7])}
    assert report(host, "r", MIX, [padded]).tokens == 11, "padding is left out"
    rows = report(host, "r", MIX, [padded], by={"n": ["1", "2"]})
    both = torch.stack([share * n for share, n in zip(rows.by_value["n"].values(), (4, 7))]).sum(0) / 11
    torch.testing.assert_close(both, torch.tensor(list(rows.overall().values()), dtype=torch.float64))
    with pytest.raises(UsageError, match="1 values for 2 rows"):
        report(host, "r", MIX, [padded], by={"n": ["1"]})
    with pytest.raises(UsageError, match="'a' is no router"):
        report(host, "a", "a", [padded])
    with pytest.raises(UsageError, match="not asked"):
        report(host, "r", "a", [padded])
