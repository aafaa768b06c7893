"""Laws of forms, ops and factors alone, and their specifications as data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from intarsia._codec import decode, encode
from intarsia.errors import SpecError
from intarsia.methods import METHODS, Method, Patch, build, union
from intarsia.patches import Add, Affine, Attend, Bottleneck, Const, Dense, Head, LowRank, Matrix, Mul, Place, Tokens
from intarsia.patches.factors import check_law
from intarsia.patches.heads import pool
from intarsia.patches.init import INITS
from intarsia.sites.address import Site


def place(features: int = 6, reads: int = 4, seed: int = 0) -> Place:
    return Place(Site("0.attn.q", "x", features=features), reads, 8, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", [Dense(), LowRank(1), LowRank(3)])
@given(out=st.integers(1, 7), inner=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_factor_law(spec: Dense | LowRank, out: int, inner: int, seed: int) -> None:
    factor = spec.build((out, inner), place(seed=seed), "unit")
    x = torch.randn(2, 3, inner, generator=torch.Generator().manual_seed(seed))
    assert factor.materialise().shape == (out, inner)
    assert check_law(factor, x)


def test_factors_start_at_zero_where_they_say() -> None:
    assert not LowRank(2).build((6, 4), place()).materialise().any()
    assert not Dense().build((6, 4), place()).materialise().any()


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = LowRank(2).build((6, 4), place(seed=5)).down
    state = torch.get_rng_state()
    second = LowRank(2).build((6, 4), place(seed=5)).down
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state()), "the global stream is left alone"
    assert not torch.equal(first, LowRank(2).build((6, 4), place(seed=6)).down)


@pytest.mark.parametrize("name", list(INITS))
def test_inits_are_finite_and_seeded(name: str) -> None:
    values = []
    for _ in range(2):
        value = torch.empty(5, 7)
        INITS[name](value, torch.Generator().manual_seed(3))
        values.append(value)
    assert torch.equal(*values) and values[0].isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        LowRank(4),
        Affine(LowRank(2), 0.1),
        Bottleneck(5, activation="gelu", read="normed"),
        Const("ones"),
        Matrix(),
        Attend(3, None),
        Tokens(4, "start", "ids", ids=(5, 6)),
        Head(("a", "b"), "first"),
        Add(2.5),
        Mul(),
    ],
)
def test_specifications_are_data(spec: object) -> None:
    assert decode(encode(spec)) == spec


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_are_data(name: str) -> None:
    method = build(name)
    assert decode(encode(method)) == method
    assert method.source and METHODS[name].summary and METHODS[name].equation


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: LowRank(0), "rank must be at least 1"),
        (lambda: Bottleneck(0), "width must be at least 1"),
        (lambda: Bottleneck(activation="rleu"), "did you mean 'relu'"),
        (lambda: Attend(0), "length must be at least 1"),
        (lambda: Tokens(init="ids"), "needs the token ids"),
        (lambda: Head(()), "at least one label"),
        (lambda: Head(("a", "a")), "must differ"),
        (lambda: build("lorra"), "did you mean 'lora'"),
        (lambda: build("lora", rnak=3), "did you mean 'rank'"),
        (lambda: Method("m", (Patch("p", "ffn", Const()), Patch("p", "attn", Const()))), "same name"),
        (lambda: build("head").with_head(Head(("a",))).with_head(Head(("b",))), "already has a head"),
    ],
)
def test_refusals(make, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SpecError, match=complaint):
        make()


def test_union_keeps_every_patch() -> None:
    both = union("both", build("lora"), build("ia3"), build("pfeiffer"))
    assert [p.name for p in both.patches] == ["lora", "scale", "scale_ffn", "adapter"]
    twice = union("twice", build("lora"), build("lora", at="ffn.up"))
    assert [p.name for p in twice.patches] == ["lora", "lora_2"]
    assert [p.name for p in union("thrice", *[build("lora")] * 3).patches] == ["lora", "lora_2", "lora_3"]


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["mean", "first", "last"]), st.sampled_from(["left", "right"]))
@settings(max_examples=40, deadline=None)
def test_pooling_ignores_padding(batch: int, length: int, how: str, side: str) -> None:
    states = torch.randn(batch, length, 3)
    pad = torch.full((batch, 2, 3), 99.0)
    ones, zeros = torch.ones(batch, length, dtype=torch.bool), torch.zeros(batch, 2, dtype=torch.bool)
    parts = [(pad, states), (zeros, ones)] if side == "left" else [(states, pad), (ones, zeros)]
    padded, mask = (torch.cat(p, 1) for p in parts)
    assert torch.allclose(pool(padded, mask, how), pool(states, ones, how), atol=1e-5)
    assert torch.allclose(pool(states, ones, how), pool(states, None, how), atol=1e-5)


def test_calibrated_head_folds_exactly() -> None:
    spec = Head(("a", "b"), dropout=0.0)
    form = spec.build(place(features=2, reads=4))
    features = torch.randn(50, 4) * torch.tensor([1.0, 0.1, 5.0, 1e-9]) + 3
    form.calibrate(features)
    exported = form.export()
    assert exported is not None
    plain_spec, tensors = exported
    plain = plain_spec.build(place(features=2, reads=4))
    plain.load_state_dict(tensors)

    class Seen:
        input = torch.randn(3, 5, 4) + 3
        mask = None

    assert torch.allclose(form(None, Seen()), plain(None, Seen()), atol=1e-4)  # type: ignore[arg-type]
    assert form(None, Seen()).isfinite().all(), "a constant feature does not blow up"  # type: ignore[arg-type]


def test_meta_places_allocate_nothing() -> None:
    where = Place(Site("0.attn.q", "x", features=10**6), 10**6, 8, torch.Generator(), device=torch.device("meta"))
    assert LowRank(8).build((10**6, 10**6), where).down.device.type == "meta"
    assert isinstance(where.parameter(10**9, 10), nn.Parameter)
