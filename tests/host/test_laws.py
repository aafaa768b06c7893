"""The laws of the ground floor over the whole cross product methods x families."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import CompositionError, SiteError, SpecError
from intarsia.host import Host
from intarsia.modules import load, save
from tests import zoo
from tests.host import kit

#: the ground floor runs everywhere in the fast suite, the other methods on one family per kind; `-m slow` runs the rest
GROUND_FLOOR = ("full", "head", "freeze_k", "ln", "bitfit", "lora", "ia3", "houlsby", "pfeiffer", "parallel", "prompt", "prefix")
KINDS = ("bert", "gpt2", "llama", "t5")
PAIRS = [
    pytest.param(f, m, marks=() if m in GROUND_FLOOR or f in KINDS else pytest.mark.slow)
    for f in zoo.FAMILIES
    for m in kit.METHOD_NAMES
]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_laws(family: str, method: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, inputs = zoo.make(family)
    bare = kit.reference(family)
    before = kit.state(model)
    spec = kit.small(method, family)
    host = Host(model)
    if kit.lacks(family, method):
        with pytest.raises((SiteError, SpecError)):
            host.add("a", spec)
        assert host.names == ()
        host.close()
        assert kit.same_state(before, kit.state(model)), "a refused method leaves nothing behind"
        return

    host.add("a", spec)
    assert torch.equal(kit.run(model, inputs), bare), "what is not active has no effect"
    with host.using("a"):
        fresh = kit.run(model, inputs)
    if method in kit.EXACT:
        assert torch.equal(fresh, bare), "a fresh module is the base, exactly"
    elif method in kit.NEAR:
        assert 0 < (fresh - bare).abs().max() < 0.2 * bare.abs().max(), "a fresh adapter is near the base"
    assert host.count(spec) == sum(p.numel() for p in host.parameters("a").values())

    kit.disturb(host, "a")
    host.add("b", spec, seed=1)
    kit.disturb(host, "b", 1)
    with host.using("a"):
        a = kit.run(model, inputs)
    with host.using("b"):
        b = kit.run(model, inputs)
    assert a.shape != bare.shape or not torch.allclose(a, bare, atol=1e-4), "an active module has an effect"
    assert not torch.allclose(a, b, atol=1e-4)
    assert torch.equal(kit.run(model, inputs), bare)

    # one algebra
    parts = ("0.3*a + 0.7*a", "average(a, a, a)", "0.5*a + 0.5*b")
    for text in ("a >> base", "base >> a", "1.0*a", *(() if spec.masks else parts[:2])):
        with host.using(text):
            assert torch.allclose(kit.run(model, inputs), a, atol=1e-4), text
    if spec.masks:
        for text in parts:
            with pytest.raises(CompositionError, match="decides which weights count"), host.using(text):
                pytest.fail("a part of a mask is refused")

    # rows
    try:
        with host.using(["b", "a"]):
            rows = kit.run(model, inputs)
        assert torch.allclose(rows[0], b[0], atol=1e-4) and torch.allclose(rows[1], a[1], atol=1e-4)
        if method not in kit.TOKENS and not (method == "head" and "ForSequence" not in type(model).__name__):
            with host.using(["base", "a"]):
                rows = kit.run(model, inputs)
            if method != "head":
                assert torch.allclose(rows[0], bare[0], atol=1e-4) and torch.allclose(rows[1], a[1], atol=1e-4)
    except CompositionError as refusal:
        assert "row" in str(refusal)
        assert family.startswith("deberta") or method in (*kit.EVERYWHERE, *kit.TOKENS), f"{family} {method}: {refusal}"

    # gradients reach all and only the module's tensors
    with host.using("a"):
        kit.answer(model(**inputs)).float().pow(2).mean().backward()
    mine = host.parameters("a")
    idle = {n for n, p in mine.items() if p.grad is None}
    assert not idle, f"no gradient: {sorted(idle)[:5]}"
    ours = {id(p) for p in mine.values()}
    assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in ours]

    # folding
    if method in kit.FOLDABLE and not (method == "bitfit" and family in kit.BIAS_FREE):
        assert host.why_not_foldable("a") is None
        plain = host.fold("a")
        assert plain.state_dict().keys() == before["weights"].keys()
        assert torch.allclose(kit.run(plain, inputs), a, atol=1e-4), "the folded copy equals the active module"
        if not spec.masks:
            assert torch.allclose(kit.run(host.fold("0.5*a + 0.5*b"), inputs), _with(host, "0.5*a + 0.5*b", inputs), atol=1e-4)
    elif method != "head":
        assert host.why_not_foldable("a")
        with pytest.raises(CompositionError):
            host.fold("a")

    # as a file, on another copy of the base, under another name
    module = host.extract("a")
    save(module, tmp_path / "a.safetensors")
    other, _ = zoo.make(family)
    guest = Host(other).insert(load(tmp_path / "a.safetensors"), name="again")
    with guest.using("again"):
        assert torch.equal(kit.run(other, inputs), a), "stored, loaded, the same to the bit"
    assert guest.extract("again").digest == module.digest
    flat = host.extract("a", flatten=True)
    guest.insert(flat, name="flat")
    with guest.using("flat"):
        assert torch.allclose(kit.run(other, inputs), a, atol=1e-5 * max(1.0, float(a.abs().max()))), "flattened, the same"

    # leaving
    host.remove("b")
    with host.using("a"):
        assert torch.equal(kit.run(model, inputs), a)
    model.zero_grad()
    host.close()
    assert kit.same_state(before, kit.state(model)), "closing restores every bit"
    assert torch.equal(kit.run(model, inputs), bare)


def _with(host: Host, text: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with host.using(text):
        return kit.run(host.model, inputs)
