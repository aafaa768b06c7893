"""Kronecker factors: equal to torch.kron, the papers' counts, one shared rule."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import SpecError
from intarsia.patches import Bottleneck, Kron, KronPair, Place
from intarsia.patches.factors import check_law
from intarsia.patches.kron import near_square
from intarsia.sites.address import Site


def place(seed: int = 0, shared: dict | None = None, device: str = "cpu") -> Place:
    return Place(
        Site("0.ffn", "x", features=12), 12, 12, torch.Generator().manual_seed(seed),
        shared={} if shared is None else shared, device=torch.device(device),
    )  # fmt: skip


@pytest.mark.parametrize("spec", [Kron(2, 1), Kron(4, None), Kron(2, 3, False), Kron(1, None, False), KronPair(1), KronPair(None, 3)])
@pytest.mark.parametrize("shape", [(8, 12), (12, 4), (4, 4)])
def test_law_and_definition(spec: Kron | KronPair, shape: tuple[int, int]) -> None:
    factor = spec.build(shape, place(1), "unit")
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(2))
    assert factor.materialise().shape == shape
    assert check_law(factor, x)
    terms = [torch.kron(a, b) for a, b in zip(factor.rule.left, factor.right())]
    assert torch.allclose(factor.materialise(), sum(terms), atol=1e-6)


def test_published_counts() -> None:
    """Compacter on 768/24 with n = 4: 2,376 per adapter with its biases, and one n^3; PHM: 2(n^3 + dm/n) + d + m."""
    shared: dict = {}
    where = Place(Site("0.ffn", "x", features=768), 768, 768, torch.Generator(), shared=shared)
    form = Bottleneck(24, factor=Kron(4, 1), init="phm").build(where)
    assert sum(p.numel() for p in form.parameters()) == 2376
    assert [tuple(p.shape) for part in shared.values() for p in part.parameters()] == [(4, 4, 4)]
    phm = Bottleneck(24, factor=Kron(12, None, False), init="phm").build(where)
    assert sum(p.numel() for p in phm.parameters()) == 2 * (12**3 + 768 * 24 // 12) + 768 + 24


def test_one_rule_for_the_module() -> None:
    shared: dict = {}
    first, second = (Kron(2, 1).build((4, 6), place(seed, shared), "unit") for seed in (0, 1))
    assert first.rule is second.rule and not torch.equal(first.up, second.up)
    assert "rule" not in dict(first.named_children()), "tied parts belong to the root"
    alone = Kron(2, 1, share=False).build((4, 6), place(0, shared), "unit")
    assert alone.rule is not first.rule and "rule" in dict(alone.named_children())


def test_rank_is_at_most_n_squared_times_r() -> None:
    w = Kron(2, 1, False, left_init="unit").build((16, 16), place(3), "unit").materialise()
    assert int(torch.linalg.matrix_rank(w)) == 2 * 2  # n terms of rank n * r each


def test_starts_where_it_says() -> None:
    assert not Kron(2, 1).build((4, 4), place()).materialise().any()
    assert not KronPair(1).build((4, 4), place()).materialise().any()
    small = Kron(4, 1).build((768, 24), place(), "phm").materialise()
    assert 0 < small.abs().max() < 1e-3, "near zero by the small rule"
    assert Kron(2, 1).build((10**4, 10**4), place(device="meta")).up.device.type == "meta"


@pytest.mark.parametrize(("size", "limit", "expected"), [(768, None, (24, 32)), (64, 4, (4, 16)), (7, None, (1, 7)), (12, 5, (3, 4))])
def test_near_square(size: int, limit: int | None, expected: tuple[int, int]) -> None:
    assert near_square(size, limit) == expected


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Kron(0), "n >= 1"),
        (lambda: Kron(4, 0), "rank >= 1"),
        (lambda: Kron(5).build((10, 12), place()), "divisible by n=5, found 12"),
        (lambda: Kron(2).build((4,), place()), "needs a matrix"),
    ],
)
def test_refusals(make, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SpecError, match=complaint):
        make()
