"""Rotations: orthogonal, the identity at the start, the same applied as materialised; and factors made of factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import SpecError
from intarsia.patches import (
    Affine,
    Blocks,
    Butterfly,
    Cayley,
    Circulant,
    Gain,
    Hadamard,
    Householder,
    Kron,
    Linear,
    LowRank,
    Matrix,
    Mul,
    Pairs,
    Place,
    Rot,
    Rows,
    Sum,
    WhyNot,
)
from intarsia.patches.factors import check_law
from intarsia.patches.orthogonal import cayley, skew
from intarsia.sites.address import Site

SQUARE = [Cayley(4), Cayley(8, share=True), Cayley(2), Butterfly(4, 1), Butterfly(2, 4), Butterfly(4, 3), Householder(4)]
ANY = [
    Sum((LowRank(1), LowRank(2))),
    Hadamard((LowRank(1), LowRank(2)), ("unit", "unit")),
    Hadamard((LowRank(1), Kron(2, None, False), LowRank(1))),
    Blocks(2, 4, LowRank(1)),
    Blocks(2, 2, Hadamard((LowRank(1), LowRank(1)))),
    Circulant(4),
    Rows(),
]


def place(n: int = 16, port: Any = "out") -> Place:
    site = Site("0.attn.q", "x", port, features=n, param="weight", shape=(n, n))
    return Place(site, n, n, torch.Generator().manual_seed(0))


def shaken(module: torch.nn.Module, seed: int = 0, size: float = 0.5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return module


@pytest.mark.parametrize("spec", SQUARE, ids=str)
def test_orthogonal(spec: Any) -> None:
    factor = spec.build((16, 16), place())
    exact = not isinstance(spec, Householder)
    start = factor.materialise()
    assert torch.equal(start, torch.eye(16)) if exact else torch.allclose(start, torch.eye(16), atol=1e-6)
    shaken(factor)
    factor.double()
    r = factor.materialise()
    assert torch.allclose(r @ r.T, torch.eye(16).double(), atol=1e-6 if exact else 1e-12)
    assert not torch.allclose(r, torch.eye(16).double(), atol=0.05)
    w = torch.randn(9, 16).double()
    turned = factor(w)
    assert torch.allclose(turned @ turned.T, w @ w.T, atol=1e-5), "norms of the rows and angles between them stay"
    assert check_law(factor, w)


@given(b=st.integers(2, 8), size=st.floats(0.01, 3.0), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_cayley_is_exact(b: int, size: float, seed: int) -> None:
    entries = torch.randn(3, b * (b - 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    q = skew(entries, b)
    assert torch.equal(q, -q.transpose(1, 2))
    eye = torch.eye(b, dtype=torch.float64)
    r = cayley(q)
    assert torch.allclose(r @ r.transpose(1, 2), eye.expand_as(r), atol=1e-12)
    assert torch.allclose(r @ (eye + q), eye - q, atol=1e-9), "its definition; the sides commute"


def test_truncated_series() -> None:
    entries = torch.randn(1, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for norm in (0.01, 0.1, 0.5):
        q = skew(entries, 8)
        q = q * (norm / torch.linalg.matrix_norm(q))
        r = cayley(q, 5)
        expected = torch.eye(8) - 2 * q + 2 * q @ q - 2 * q @ q @ q + q @ q @ q @ q
        assert torch.allclose(r, expected)
        errors.append(float((r @ r.transpose(1, 2) - torch.eye(8)).abs().max()))
    assert errors[0] < 1e-6 and errors[2] > 1e-4, f"orthogonal for small Q only: {errors}"


def test_butterfly_reaches_everything() -> None:
    """m factors of blocks b connect b 2^(m-1) inputs; one factor is block-diagonal like OFT's."""
    for factors, reach in ((1, 4), (2, 8), (3, 16)):
        r = shaken(Butterfly(4, factors).build((16, 16), place())).materialise()
        expected = torch.block_diag(*[torch.ones(reach, reach) for _ in range(16 // reach)])
        assert torch.equal((r.abs() > 1e-9).float(), expected)
    one, block = Butterfly(4, 1).build((16, 16), place()), Cayley(4).build((16, 16), place())
    with torch.no_grad():
        block.angles.copy_(shaken(one).angles[0])
    assert torch.allclose(one.materialise(), block.materialise(), atol=1e-6)
    assert not list(one.buffers()), "no permutation matrices"


def test_pairs() -> None:
    factor = Pairs(4).build((8, 8), place(8))
    assert torch.equal(factor.materialise(), torch.eye(8))
    shaken(factor)
    with torch.no_grad():
        factor.length.fill_(1.0)
    m = factor.materialise()
    assert torch.allclose(m @ m.T, torch.eye(8), atol=1e-6) and check_law(factor, torch.randn(3, 8))
    assert m.count_nonzero() == 16 and m[0, 2] != 0 and m[0, 1] == 0, "feature i with i + group / 2"


@pytest.mark.parametrize("spec", ANY, ids=lambda s: f"{type(s).__name__}-{ANY.index(s)}")
@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 8)])
def test_combined(spec: Any, shape: tuple[int, int]) -> None:
    factor = shaken(spec.build(shape, place()))
    assert factor.materialise().shape == shape
    assert check_law(factor, torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(0)))


def test_combinators_are_their_definitions() -> None:
    total = shaken(Sum((LowRank(1), LowRank(2))).build((4, 6), place()))
    product = shaken(Hadamard((LowRank(1), LowRank(2))).build((4, 6), place()))
    a, b = (p.materialise() for p in total.parts)
    assert torch.allclose(total.materialise(), a + b, atol=1e-6)
    a, b = (p.materialise() for p in product.parts)
    assert torch.allclose(product.materialise(), a * b)
    grid = shaken(Blocks(2, 3, LowRank(1)).build((4, 6), place()))
    assert torch.allclose(grid.materialise()[2:, 2:4], grid.parts[4].materialise()), "row 1, column 1"
    assert torch.linalg.matrix_rank(grid.materialise()) > 2
    kernel = shaken(Circulant(4).build((4, 4), place())).kernel[0, 0] / 4
    assert torch.allclose(Circulant(4).build((4, 4), place()).materialise()[0], Circulant(4).build((4, 4), place()).kernel[0, 0] / 4)
    assert kernel.shape == (4,)


def test_circulant_rows_shift() -> None:
    w = Circulant(4).build((4, 4), place()).materialise()
    assert all(torch.equal(w[i + 1], w[i].roll(1)) for i in range(3))


@pytest.mark.parametrize("port", ["out", "in", "weight"])
def test_rotation_of_each_port_folds(port: str) -> None:
    """h' = F h is F W x + F b (out), W F x + b (in), or rows of W mapped (weight)."""
    w, b, x = torch.randn(16, 16), torch.randn(16), torch.randn(5, 16)
    form = shaken(Affine(Cayley(4), read="self").build(place(16, port)))
    fold = Rot().fold(Linear(w, None if port == "weight" else b), form, port)
    assert isinstance(fold, Linear)
    folded = x @ (w + fold.weight).T + b + (0 if fold.bias is None else fold.bias)
    h = {"out": x @ w.T + b, "in": x, "weight": w}[port]
    turned = h + Rot().change(h, form(h, None))
    active = turned if port == "out" else turned @ w.T + b if port == "in" else x @ turned.T + b
    assert torch.allclose(folded, active, atol=1e-4)


@pytest.mark.parametrize("op", [Gain(0.5), Mul()])
def test_rescaling_folds(op: Any) -> None:
    w = torch.randn(16, 16)
    form = shaken(Matrix(LowRank(2)).build(place(16, "weight")))
    fold = op.fold(Linear(w, None), form, "weight")
    assert isinstance(fold, Linear) and torch.allclose(fold.weight, op.change(w, form(w, None)), atol=1e-6)
    if isinstance(op, Gain):
        assert torch.allclose(w + fold.weight, w * (1 + 0.5 * form.constant()), atol=1e-6), "HiRA's formula"


def test_what_has_no_fold_says_why() -> None:
    form = Affine(LowRank(2)).build(place(16))
    assert isinstance(Rot().fold(Linear(None, None), form, "out"), WhyNot)
    assert isinstance(Gain().fold(Linear(torch.ones(16, 16), None), form, "out"), WhyNot)


@pytest.mark.parametrize(
    ("spec", "shape", "complaint"),
    [
        (Cayley(5), (16, 16), "blocks of 5 do not divide a width of 16"),
        (Cayley(4), (8, 16), "is square"),
        (Butterfly(4, 4), (16, 16), "divisible by 32, found 16"),
        (Butterfly(3, 1), (9, 9), "even"),
        (Householder(3), (16, 16), "even, found 3"),
        (Pairs(6), (16, 16), "groups of 6"),
        (Circulant(3), (16, 16), "do not tile"),
        (Blocks(3, 2), (16, 16), "does not tile"),
    ],
)
def test_refusals(spec: Any, shape: tuple[int, int], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        spec.build(shape, place())


def test_a_parameter_has_no_input() -> None:
    with pytest.raises(SpecError, match="no input to read"):
        Affine(LowRank(2)).build(place(16, "weight"))
