"""Comparison of modules: on the change of the weights, whatever factors it is written in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from intarsia.errors import StoreError
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.modules.arithmetic import average, negate, scale, subtract
from intarsia.modules.merging import magnitude
from intarsia.store.diff import Comparison, compare, picture
from tests.modules import make
from tests.store.small import lora, module


def changes(found: Module) -> dict[str, torch.Tensor]:
    """B A by site, by hand."""
    sites = {key.split("/")[0] for key in found.tensors}
    op = found.method.patches[0].op
    return {s: getattr(op, "scale", 1.0) * found.tensors[f"{s}/lora.factor.up"] @ found.tensors[f"{s}/lora.factor.down"] for s in sites}


def test_the_numbers_are_those_of_the_changes() -> None:
    a, b = lora(0, "a"), lora(1, "b", rank=3)
    ours, theirs = changes(a), changes(b)
    found = compare(a, b)
    assert found.names == ("a", "b") and found.unlike == "" and len(found.places) == 4
    for place in found.places:
        x, y = (each[place.place.split(" ")[0]].double() for each in (ours, theirs))
        assert place.what == "change" and place.entries == 16
        assert place.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-5)
        assert place.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)
        assert place.overlap == 1.0 and place.conflict == pytest.approx(float(((x * y) < 0).double().mean()))
    x, y = (torch.cat([each[s].double().flatten() for s in sorted(ours)]) for each in (ours, theirs))
    assert found.whole.cosine == pytest.approx(float((x @ y) / x.norm() / y.norm()), abs=1e-5)
    assert [layer.layer for layer in found.layers] == ["0.attn.q", "0.attn.v", "1.attn.q", "1.attn.v"]


def test_factors_do_not_count() -> None:
    """The same product of other factors is the same change; modules that differ in every tensor can be equal."""
    a = lora(0, "a")
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    other = Module("b", a.method, {k: (t @ turn if k.endswith("up") else turn.T @ t) for k, t in a.tensors.items()}, a.base, roles=a.roles, context=a.context)
    for place in compare(a, other).places:
        assert place.cosine == pytest.approx(1.0, abs=1e-6) and place.conflict == 0.0


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
def test_scaled_and_negated(factor: float) -> None:
    a = lora(0, "a")
    whole = compare(a, scale(a, factor, name="b")).whole
    assert whole.cosine == pytest.approx(math.copysign(1.0, factor), abs=1e-6) and whole.conflict == (0.0 if factor > 0 else 1.0)
    assert whole.norms[1] == pytest.approx(abs(factor) * (whole.norms[0] or 0.0), rel=1e-5)


def test_symmetric_but_for_the_norms() -> None:
    a, b = lora(0, "a"), magnitude(lora(1, "b"), 0.3)
    for one, other in zip(compare(a, b).places, compare(b, a).places):
        assert (one.place, one.overlap, one.conflict, one.norms) == (other.place, other.overlap, other.conflict, other.norms[::-1])
        assert one.cosine == pytest.approx(other.cosine, abs=1e-9)


def test_support() -> None:
    """A pruned module lies within its parent; a layer that one of them lacks overlaps in nothing."""
    a = lora(0, "a", layers=(0,))
    pruned = magnitude(a, 0.25, scope="tensor")
    for place in compare(a, pruned).places:
        assert place.overlap == pytest.approx(0.25) and place.conflict == 0.0
    apart = compare(a, lora(0, "b", layers=(1,)))
    assert apart.whole.overlap == 0.0 and apart.whole.conflict is None and apart.whole.cosine == 0.0
    assert [place.norms[0] is None for place in apart.places] == [False, False, True, True]
    zero = subtract(a, a, name="zero")
    assert compare(zero, a).whole.cosine is None


def test_merged_and_mixed_ranks() -> None:
    a, b = lora(0, "a"), lora(1, "b", rank=4)
    both = average([a, b], name="both")
    assert compare(both, negate(both, name="n")).whole.cosine == pytest.approx(-1.0, abs=1e-6)
    assert 0 < (compare(both, a).whole.cosine or 0) < 1


def test_what_is_no_change_of_weights_is_compared_as_stored() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {f"0.ffn.out/adapter.{leaf}": torch.randn(4, 2, generator=g) for leaf in ("down.value", "up.value")}
    a = module(name="a", method=build("pfeiffer", reduction=2), tensors=tensors, labels=None)
    b = module(name="b", method=a.method, tensors={k: -t for k, t in tensors.items()}, labels=None)
    for other, cosine in ((a, 1.0), (b, -1.0)):
        whole = compare(a, other).whole
        assert whole.what == "stored tensors" and whole.cosine == pytest.approx(cosine, abs=1e-6)
    mixed = compare(a, lora(0))
    assert {place.what for place in mixed.places} == {"stored tensors"} and mixed.whole.overlap == 0.0


def test_a_share_of_the_weight_and_an_addition_to_it_are_different_places() -> None:
    method = build("hira", rank=2)
    tensors = {key.replace("/lora.", f"/{method.patches[0].name}."): tensor for key, tensor in lora(0).tensors.items()}
    found = compare(lora(0, "a"), module(name="b", method=method, tensors=tensors, labels=None))
    assert {place.what for place in found.places} == {"change", "relative change"}
    assert len(found.places) == 8 and found.whole.overlap == 0.0 and found.whole.what == "change, relative change"


def test_other_bases_are_said() -> None:
    assert "different bases" in compare(lora(0), lora(1, base=make.base("bb"))).unlike
    assert "settings" in compare(lora(0), lora(1, context={})).unlike


def drawn(path: Path) -> Comparison:
    found = compare(lora(0, "a", layers=tuple(range(12))), lora(1, "b", layers=tuple(range(2, 12))))
    picture(found, path)
    return found


def test_layers_stand_in_the_order_of_the_model_and_are_drawn(tmp_path: Path) -> None:
    from matplotlib.image import imread

    found = drawn(tmp_path / "diff.png")
    assert [layer.layer for layer in found.layers] == [f"{n}.attn.{site}" for n in range(12) for site in "qv"]
    pixels = imread(tmp_path / "diff.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600 and float(pixels[..., :3].std()) > 0.05
    with pytest.raises(StoreError, match=r"expected \.png"):
        drawn(tmp_path / "diff.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["diff.png"]
