"""AdapterFusion: against a slow reference and its released initial values, trained alone, the same in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.errors import CompositionError, SpecError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import load, save
from intarsia.patches import Head
from intarsia.train import Recipe, train
from tests import zoo
from tests.host.kit import answer, disturb, small
from tests.train.make import NO_DROPOUT, Classify, table

MEMBERS = ("a", "b", "c")
FUSED = "fuse(a, b, c; router=f)"


def host(family: str = "bert", kinds: tuple[str, ...] = ("pfeiffer", "pfeiffer", "pfeiffer"), **settings: object) -> tuple[Host, dict[str, Tensor]]:
    """Three members away from their start, and a fresh fusion over them."""
    model, inputs = zoo.make(family)
    carrier = Host(model)
    for seed, (name, kind) in enumerate(zip(MEMBERS, kinds)):
        carrier.add(name, small(kind, family), seed=seed)
        disturb(carrier, name, seed)
    carrier.router("f", "fusion", MEMBERS, **settings)
    return carrier, inputs


def run(carrier: Host, expression: str, inputs: dict[str, Tensor]) -> Tensor:
    with carrier.using(expression) as model, torch.no_grad():
        return answer(model(**inputs))


def test_as_the_released_code_says() -> None:
    carrier, _ = host()
    tensors = carrier.tensors("f")
    assert {k: tuple(v.shape) for k, v in tensors.items() if k.startswith("0.")} == {
        "0.ffn/router.value": (32, 32), "0.ffn/router.scorer.query": (32, 32), "0.ffn/router.scorer.query_bias": (32,),
        "0.ffn/router.scorer.key": (32, 32), "0.ffn/router.scorer.key_bias": (32,),
    }  # fmt: skip
    assert sum(t.numel() for t in tensors.values()) == 2 * (3 * 32 * 32 + 2 * 32), "3 d^2 + 2 d per site, whatever the number of members"
    value = tensors["1.ffn/router.value"].detach()
    assert torch.equal(value.diagonal(), torch.ones(32)) and float(value[0, 1]) == pytest.approx(1e-6)
    assert 0.015 < float(tensors["0.ffn/router.scorer.query"].detach().std()) < 0.025 and not tensors["0.ffn/router.scorer.key_bias"].any()
    with torch.no_grad():
        tensors["0.ffn/router.value"].mul_(2.0)
    by_hand = sum(float((torch.eye(32) - tensors[f"{layer}.ffn/router.value"].detach()).square().sum()) for layer in (0, 1))
    assert float(carrier.penalty("f")) == pytest.approx(0.01 * by_hand, rel=1e-5)  # type: ignore[arg-type]


def test_equals_the_released_arithmetic() -> None:
    """BertFusion of the released code, from what one site saw: q = Q LN(f + x) + a, k = K u + b, softmax(q . k) (V u)."""
    carrier, inputs = host(dropout=0.0)
    disturb(carrier, "f", 5)
    (site, (delta,)) = carrier.deltas("f")[1]
    caught: list[tuple[Tensor, list[Tensor], Tensor, Tensor]] = []
    original = delta.form.mix

    def spy(h: Tensor, changes: list[Tensor], seen: object, top: int | None) -> Tensor:
        found = original(h, changes, seen, top)
        caught.append((h, changes, seen.normed(h), found))  # type: ignore[attr-defined]
        return found

    delta.form.mix = spy
    run(carrier, FUSED, inputs)
    (_, changes, query, found), t = caught[0], {k.rsplit(".", 1)[1]: v for k, v in carrier.tensors("f").items() if k.startswith(site.name)}
    up = torch.stack(changes, 2)  # [B, T, n, d]
    q, k, v = query @ t["query"].T + t["query_bias"], up @ t["key"].T + t["key_bias"], up @ t["value"].T
    probabilities = torch.softmax((q.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2), -1)
    torch.testing.assert_close(found, (probabilities.unsqueeze(2) @ v).squeeze(2), rtol=1e-4, atol=1e-5)
    assert float(probabilities.std()) > 1e-3, "otherwise this says nothing of the attention"


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("kinds", [("pfeiffer", "houlsby", "parallel"), ("lora", "ia3", "pfeiffer"), ("loreft", "lora", "dora")], ids="+".join)
def test_over_any_method_that_changes_activations(family: str, kinds: tuple[str, ...]) -> None:
    kinds = tuple("lora" if k == "dora" and family == "gpt2" else k for k in kinds)
    model, inputs = zoo.make(family)
    carrier = Host(model)
    for seed, (name, kind) in enumerate(zip(MEMBERS, kinds)):
        method = build("houlsby", width=4, norms=False) if kind == "houlsby" else small(kind, family)
        carrier.add(name, method, seed=seed)
        disturb(carrier, name, seed)
    ports = {site.port for name in MEMBERS for site, _ in carrier.deltas(name)}
    if not ports <= {"out", "in"}:
        with pytest.raises(SpecError, match="attention looks at activations"):
            carrier.router("f", "fusion", MEMBERS)
        return
    carrier.router("f", "fusion", MEMBERS)
    disturb(carrier, "f", 7)
    mixed = run(carrier, FUSED, inputs)
    assert torch.isfinite(mixed).all() and not torch.allclose(mixed, run(carrier, "base", inputs))
    rows = [FUSED, "a"]
    with carrier.using(rows) as model, torch.no_grad():
        torch.testing.assert_close(answer(model(**inputs)), torch.cat([run(carrier, e, {k: v[i : i + 1] for k, v in inputs.items()}) for i, e in enumerate(rows)]), rtol=1e-3, atol=1e-4)


def test_equal_members_are_the_member() -> None:
    model, inputs = zoo.make("bert")
    carrier = Host(model)
    for name in MEMBERS:
        carrier.add(name, small("pfeiffer"), seed=3)
        disturb(carrier, name, 3)
    carrier.router("f", "fusion", MEMBERS, value=False)
    disturb(carrier, "f", 1)
    torch.testing.assert_close(run(carrier, FUSED, inputs), run(carrier, "a", inputs), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    carrier, _ = host()
    carrier.add("p", small("prefix")).add("l", small("lora")).add("bias", small("bitfit"))
    for expression, sentence in (
        ("f", "is a router"),
        ("a >> f", "is a router"),
        ("fuse(a, c, b; router=f)", "made for the members a, b, c in this order, and here are a, c, b"),
        ("fuse(a, b, l; router=f)", "made for the members"),
        ("fuse(a, b, c; router=l)", "is no router, so it gives no weights; routers here: f"),
        ("fuse(a, b, c; router=g)", "no module 'g'"),
        ("fuse(a, b, c; router=f, space=phi)", "looks at what its members change"),
    ):
        with pytest.raises(CompositionError, match=sentence):
            carrier.call(expression)
    carrier.add("g", build_over(("a", "p"), "ffn")).add("k", build_over(("a", "l"), "ffn")).add("w", build_over(("a", "bias"), "ffn"))
    with pytest.raises(CompositionError, match="prefixes or prompts, which stand one after the other"):
        carrier.call("fuse(a, p; router=g)")
    with pytest.raises(CompositionError, match=r"'l' changes 0.attn.q \(port out\), and router 'k' has no weights there"):
        carrier.call("fuse(a, l; router=k)")
    with pytest.raises(CompositionError, match="'bias' changes"):
        carrier.call("fuse(a, bias; router=w)")
    assert carrier.why_not_foldable(FUSED) is not None


def build_over(parts: tuple[str, ...], at: str) -> object:
    from intarsia.methods import ROUTERS

    return ROUTERS["fusion"].build(parts=parts, where={"out": at})


def trained() -> tuple[Host, Classify]:
    """A host whose fusion was trained with a head, and the members as they were before."""
    model, _ = zoo.make("bert", headless=True, **NO_DROPOUT["bert"])
    carrier = Host(model)
    for seed, name in enumerate(MEMBERS):
        carrier.add(name, small("pfeiffer").with_head(Head(("x", "y"), dropout=0.0)), seed=seed)
        disturb(carrier, name, seed)
    task = Classify()
    carrier.router("f", "fusion", MEMBERS, head=task.head)
    return carrier, task


def test_trains_alone_and_is_the_same_in_a_new_process(tmp_path: Path) -> None:
    carrier, task = trained()
    before = {name: carrier.extract(name).digest for name in MEMBERS}
    start = {k: v.detach().clone() for k, v in carrier.tensors("f").items()}
    recipe = Recipe(epochs=3, batch_size=8, learning_rate=1e-2)
    result = train(carrier, "f", task, table(40), table(20, seed=1), recipe=recipe, expression=FUSED)  # type: ignore[arg-type]
    assert {name: carrier.extract(name).digest for name in MEMBERS} == before, "members are as they were, bit by bit"
    moved = [k for k, v in carrier.tensors("f").items() if not torch.equal(v, start[k])]
    assert set(moved) == set(start), "every tensor of router and head was trained"
    assert set(before.values()) <= set(result.module.requires)
    for name in MEMBERS:
        save(carrier.extract(name), tmp_path / f"{name}.safetensors")
    save(result.module, tmp_path / "f.safetensors")
    inputs = {"input_ids": torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    want = run(carrier, FUSED, inputs)
    assert want.shape == (3, 3), "the router's head answers, though the members have heads"
    torch.save({"inputs": inputs, "want": want}, tmp_path / "want.pt")
    program = f"""
import torch
from intarsia.host import Host
from intarsia.modules import load
from tests import zoo
from tests.train.make import NO_DROPOUT
model, _ = zoo.make("bert", headless=True, **NO_DROPOUT["bert"])
host = Host(model)
for name in ("a", "b", "c", "f"):
    host.insert(load({str(tmp_path)!r} + f"/{{name}}.safetensors"))
kept = torch.load({str(tmp_path / "want.pt")!r})
with host.using({FUSED!r}) as m, torch.no_grad():
    assert torch.equal(m(**kept["inputs"])["logits"], kept["want"])
print("equal", host.extract("f").digest)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["equal", load(tmp_path / "f.safetensors").digest]
