"""Random subspaces and the fast Hadamard transform: norms, adjoints, budgets, replication switches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.errors import SpecError
from intarsia.patches import Bottleneck, Fourier, Matrix, Place, Projection
from intarsia.patches.hadamard import hadamard, transform
from intarsia.patches.place import Peer
from intarsia.sites.address import Site


def weight_site(name: str, shape: tuple[int, ...]) -> Site:
    return Site(f"{name}.weight", name, "weight", param="weight", shape=shape)


def module(spec: Projection, shapes: list[tuple[int, ...]]) -> tuple[list, Tensor]:
    """Factors of several tensors, and their one vector."""
    peers = tuple(Peer(weight_site(f"{i}.x", s), s) for i, s in enumerate(shapes))
    shared: dict = {}
    factors = [
        Matrix(spec).build(Place(p.site, 1, 1, torch.Generator().manual_seed(0), peers=peers, shared=shared)).factor for p in peers
    ]
    assert len({id(f.theta) for f in factors}) == 1
    return factors, factors[0].theta.value


@pytest.mark.parametrize("n", [1, 2, 64, 128, 1024, 8192])
def test_hadamard(n: int) -> None:
    x = torch.randint(-9, 9, (3, n), generator=torch.Generator().manual_seed(n)).float()
    assert torch.equal(transform(transform(x)), n * x), "twice is n times, exactly"
    if n <= 128:
        h = transform(torch.eye(n))
        assert torch.equal(h, h.T) and torch.equal(h.abs(), torch.ones(n, n)) and torch.equal(h @ h, n * torch.eye(n))
    y = x.clone().requires_grad_()
    g = torch.randint(-9, 9, (3, n)).float()
    (hadamard(y) * g).sum().backward()
    assert torch.equal(y.grad, transform(g)), "the true adjoint"
    with pytest.raises(SpecError, match="power of two"):
        transform(torch.ones(3 * n if n > 1 else 3))


@pytest.mark.parametrize(("size", "d"), [(768, 200), (3072, 256), (589_824, 256), (50, 200)])
def test_fastfood_keeps_norms(size: int, d: int) -> None:
    """Norms within 5 / sqrt(D); columns near orthonormal (over many seeds the worst of all pairs is 4.2 to 6.5 / sqrt(D))."""
    (factor,), theta = module(Projection(d + 1, "fastfood", seed=3, scaled=True), [(size,)])
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(4 if size > 10**5 else 20):
        x = torch.randn(d, generator=generator)
        with torch.no_grad():
            theta.copy_(x)
        ratios.append(float(factor.materialise().detach().norm() / x.norm()))
    assert all(abs(r - 1) <= 5 / math.sqrt(size) for r in ratios), ratios
    if size <= 3072:
        with torch.no_grad():
            columns = torch.stack([factor.project(e) for e in torch.eye(d)], 1)
        gram = columns.T @ columns
        if size >= d:
            assert (gram - torch.diag(gram.diag())).abs().max() <= 7 / math.sqrt(size)
            assert (gram.diag() - 1).abs().max() <= 5 / math.sqrt(size)


@pytest.mark.parametrize("kind", ["fastfood", "sparse", "dense"])
def test_unit_columns_over_the_whole_module_and_the_adjoint(kind: str) -> None:
    """Law of Li et al.: columns of the stacked P have norm 1 (Fastfood: nearly); the gradient is P^T g."""
    shapes: list[tuple[int, ...]] = [(40, 30), (30,), (3, 20, 10)]
    d, total = 24, 40 * 30 + 30 + 600
    factors, theta = module(Projection(d, kind, seed=1), shapes)
    assert theta.shape == (d,) and not theta.any()
    assert all(not f.materialise().any() and f.materialise().shape == s for f, s in zip(factors, shapes))
    columns = []
    for e in torch.eye(d):
        with torch.no_grad():
            theta.copy_(e)
        columns.append(torch.cat([f.materialise().flatten() for f in factors]).detach())
    p = torch.stack(columns, 1)
    assert p.shape == (total, d)
    assert torch.allclose(p.norm(dim=0), torch.ones(d), atol=0.15 if kind == "fastfood" else 1e-5)
    if kind == "sparse":
        density = p.count_nonzero() / p.numel()
        assert abs(density * math.sqrt(total) - 1) < 0.05 and len(p[:, 0][p[:, 0] != 0].abs().unique()) == 1
    x, y = torch.randn(d), torch.randn(total)
    with torch.no_grad():
        theta.copy_(x)
    value = torch.cat([f.materialise().flatten() for f in factors])
    assert torch.allclose(value, p @ x, atol=1e-5), "linear"
    (value * y).sum().backward()
    assert torch.allclose(theta.grad, p.T @ y, atol=1e-4), "adjoint"


def test_said_counts_its_factors_within_the_dimension() -> None:
    factors, theta = module(Projection(20, scaled=True), [(4, 3), (5,), (6,)])
    assert len(theta) == 17 and all(f.weight.shape == (1,) and f.weight == 1 for f in factors)
    with pytest.raises(SpecError, match="one factor for each of 3 tensors"):
        module(Projection(3, scaled=True), [(4, 3), (5,), (6,)])


def test_official_quirks_are_switches() -> None:
    """The released gradient is the true one over the padded size; small tensors see only the head of theta."""
    gradients = []
    for official in (False, True):
        (factor,), theta = module(Projection(9, scaled=True, official=official), [(40,)])
        (factor.materialise() * torch.arange(40.0)).sum().backward()
        gradients.append(theta.grad)
    assert torch.allclose(gradients[0], 64 * gradients[1], atol=1e-4)
    for official, seen in ((False, 20), (True, 4)):
        (factor,), theta = module(Projection(21, scaled=True, official=official), [(4,)])
        (factor.materialise() * torch.arange(1.0, 5)).sum().backward()
        assert (theta.grad != 0).sum() <= seen and (theta.grad[:seen] != 0).any()
        assert bool((theta.grad[4:] != 0).any()) is not official


def test_limits() -> None:
    with pytest.raises(SpecError, match="beyond the limit"):
        module(Projection(10**6, "dense"), [(10**4,)])
    with pytest.raises(SpecError, match="concerns the projection"):
        Projection(5, "dense", official=True)
    with pytest.raises(SpecError, match="do not fit a spectrum"):
        Fourier(100).build((4, 5), Place(Site("a", "a", features=4), 5, 5, torch.Generator()))


def test_fourier() -> None:
    where = Place(Site("a", "a", features=12), 10, 10, torch.Generator().manual_seed(0))
    factor = Fourier(9, 777).build((12, 10), where)
    assert factor.value.std() > 0.2, "N(0, 1), as released"
    assert not Fourier(9, start="zeros").build((12, 10), where).materialise().any()
    spectrum = torch.zeros(12, 10)
    spectrum.view(-1)[factor.index] = factor.value.detach()
    u, v = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    direct = torch.zeros(12, 10)
    for i, j in spectrum.nonzero().tolist():
        direct += spectrum[i, j] * torch.cos(2 * torch.pi * (i * u / 12 + j * v / 10)) / 120
    assert torch.allclose(factor.materialise(), direct, atol=1e-6)
    assert factor.materialise().norm() <= factor.value.norm() / math.sqrt(120) + 1e-6
    again = Fourier(9, 777).build((12, 10), Place(Site("b", "b", features=12), 10, 10, torch.Generator()))
    assert torch.equal(again.index, factor.index), "the same positions for every matrix of a shape"
    torch_order = torch.randperm(120, generator=torch.Generator().manual_seed(777))[:9]
    assert torch.equal(Fourier(9, 777, stream="torch").build((12, 10), where).index, torch_order)


@pytest.mark.parametrize("kind", ["fastfood", "sparse", "dense"])
def test_inside_another_form(kind: str) -> None:
    """An adapter in a random subspace: both matrices from one vector, by different maps, and it learns."""
    site, shared = Site("0.ffn", "x", features=12), {}
    spec = Bottleneck(4, factor=Projection(6, kind), init="unit")  # type: ignore[arg-type]
    form = spec.build(Place(site, 12, 12, torch.Generator().manual_seed(0), peers=(Peer(site, (12, 12)),), shared=shared))
    down, up = form.down.materialise(), form.up.materialise()
    assert down.shape == (4, 12) and up.shape == (12, 4) and not torch.allclose(down.flatten(), up.flatten())
    (theta,) = shared.values()
    ratio = float(down.detach().norm() / theta.value.detach().norm())
    assert 0.4 < ratio < 1.6, "norms are kept, tensor by tensor"
    form(torch.randn(2, 12), None).square().sum().backward()
    assert theta.value.grad.abs().sum() > 0
    with pytest.raises(SpecError, match="use scaled=False"):
        Bottleneck(4, factor=Projection(6, scaled=True)).build(Place(site, 12, 12, torch.Generator(), peers=(Peer(site, (12, 12)),)))
