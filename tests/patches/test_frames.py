"""Singular vectors, cores between frames, products that start in the weight, patterns, renormed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from intarsia.errors import SpecError
from intarsia.patches import (
    Add,
    Affine,
    Core,
    Dense,
    Diag,
    Free,
    Linear,
    LowRank,
    Pattern,
    Place,
    Principal,
    Renorm,
    Seeded,
    Singular,
    Sketch,
)
from intarsia.patches.factors import check_law
from intarsia.patches.place import Peer
from intarsia.patches.spectrum import leading, thin
from intarsia.sites.address import Site


def weight(out: int = 7, inner: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))


def place(w: Tensor, seed: int = 0, **more: Any) -> Place:
    site = Site("0.attn.q", "x", features=w.shape[0])
    return Place(site, w.shape[1], w.shape[1], torch.Generator().manual_seed(seed), weight=lambda: w, **more)


def shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


SPECS = [
    Core(3, Free(), Diag()),
    Core(3, Singular("down"), Dense(), "tiny"),
    Core(None, Singular("none"), Pattern("band", 1)),
    Core(None, Singular("up"), Pattern("random", 1, gate=True)),
    Core(4, Seeded(3), Diag(0.1), gain="zeros"),
    Core(2, Seeded(3), Sketch(1)),
    Principal(2),
    Principal(2, "minor", 2.0),
    Principal(2, "qr"),
    Sketch(3),
    Sketch(3, draw="tiled"),
]


@pytest.mark.parametrize("shape", [(7, 5), (4, 8), (6, 6)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s).__name__}-{SPECS.index(s)}")
def test_law(spec: Any, shape: tuple[int, int]) -> None:
    factor = spec.build(shape, place(weight(*shape)))
    start = factor.materialise()
    assert start.abs().max() < 1e-4, "at or near zero at the start"
    shaken(factor)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))
    assert factor.materialise().shape == shape and not torch.allclose(factor.materialise(), start, atol=1e-3)
    assert check_law(factor, x)
    exported = factor.export()
    if exported is not None:
        plain = exported[0].build(shape, place(weight(*shape)))
        plain.load_state_dict({k: v.detach() for k, v in exported[1].items()})
        assert torch.allclose(plain.materialise(), factor.materialise(), atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_leading_is_the_head_of_thin(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    (u, s, vt), (lu, ls, lvt) = thin(w), leading(w, 3)
    assert torch.allclose(u * s @ vt, w, atol=1e-6)
    for whole, part in ((u[:, :3], lu), (s[:3], ls), (vt[:3], lvt)):
        assert torch.allclose(whole, part, atol=1e-5), "same signs too"
    assert torch.all(lu.gather(0, lu.abs().argmax(0)[None]) > 0)


def test_leading_of_a_deficient_weight() -> None:
    w = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 5))
    u, s, vt = leading(w, 3)
    assert torch.allclose(u.T @ u, torch.eye(3), atol=1e-5) and torch.allclose(u * s @ vt, w, atol=1e-5)
    with pytest.raises(SpecError, match="above the smaller side"):
        leading(w, 5)


def test_pissa_takes_the_major_part() -> None:
    """The residual W - s B0 A0 has the next singular value as its norm; the rebased change is zero to the bit."""
    w = weight(12, 8)
    for scale in (1.0, 4.0):
        factor = Principal(3, "major", scale).build((12, 8), place(w))
        x = torch.randn(4, 8)
        assert not factor(x).any() and not factor.materialise().any()
        residual = w - scale * factor.up0 @ factor.down0
        assert torch.allclose(torch.linalg.matrix_norm(residual, 2), torch.linalg.svdvals(w)[3], atol=1e-5)
        assert torch.allclose(factor.up0.norm(dim=0), factor.down0.norm(dim=1), atol=1e-5), "roots on both sides"
        assert {n for n, _ in factor.named_parameters()} == {"up", "down"}
    minor = Principal(3, "minor").build((12, 8), place(w))
    assert torch.allclose(torch.linalg.matrix_norm(minor.up0 @ minor.down0, 2), torch.linalg.svdvals(w)[5], atol=1e-5)


def test_vera_cuts_one_pair_to_every_site() -> None:
    shared: dict = {}
    shapes = [(6, 4), (3, 8)]
    peers = tuple(Peer(Site(f"{i}.attn.q", "x", features=s[0]), s) for i, s in enumerate(shapes))
    first, second = (
        Core(5, Seeded(1), Diag(0.1), gain="zeros").build(s, place(weight(*s), shared=shared, peers=peers)) for s in shapes
    )
    assert first.frame is second.frame and first.frame.up.shape == (6, 5) and first.frame.down.shape == (5, 8)
    assert torch.equal(second.frame.sides(3, 8)[0], first.frame.up[:3])
    assert sum(p.numel() for p in first.parameters()) == 5 + 6
    assert not list(next(iter(shared.values())).state_dict())


def test_svft_sits_on_the_singular_values() -> None:
    w = weight(6, 6)
    factor = Core(None, Singular("none"), Diag()).build((6, 6), place(w))
    with torch.no_grad():
        factor.core.value.copy_(-torch.linalg.svdvals(w))
    assert torch.allclose(w + factor.materialise(), torch.zeros(6, 6), atol=1e-5)


def test_patterns() -> None:
    assert Pattern("band", 2).entries(768) == 768 * 5 - 6
    band = Pattern("band", 1).build((5, 5), place(weight(5, 5)), "ones").materialise()
    assert torch.equal(band, torch.ones(5, 5).tril(1).triu(-1))
    random = Pattern("random", 1).build((5, 5), place(weight(5, 5)), "ones").materialise()
    assert random.count_nonzero() == Pattern("band", 1).entries(5) and not torch.equal(random, band)
    w = weight(5, 5)
    aligned = Core(None, Singular("none"), Pattern("aligned", 1)).build((5, 5), place(w))
    u, _, vt = thin(w)
    scores = (u.T @ vt.T).abs()
    chosen = torch.zeros(5, 5, dtype=torch.bool)
    chosen[tuple(aligned.core.index.long())] = True
    assert scores[chosen].min() >= scores[~chosen].max()
    assert "core.index" in aligned.state_dict(), "what cannot be found again from the specification alone is stored"
    with pytest.raises(SpecError, match="compares inputs with outputs"):
        Core(None, Singular("none"), Pattern("aligned", 1)).build((4, 8), place(weight(4, 8)))
    with pytest.raises(SpecError, match="square"):
        Diag().build((4, 8), place(w))


class SeenStub:
    """A linear layer's surroundings."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        self.input, self.weight, self.bias = x, w, b


@pytest.mark.parametrize("factor", [LowRank(2), Core(2, Free("unit"), Diag(0.3))])
def test_dora_is_its_formula(factor: Any) -> None:
    w, b, x = weight(7, 5), torch.randn(7), torch.randn(3, 5)
    form = Renorm(factor, 1.5).build(place(w))
    assert torch.allclose(form.magnitude, w.norm(dim=1))
    if isinstance(factor, LowRank):
        assert not form(x @ w.T + b, SeenStub(x, w, b)).any(), "exactly the base at the start"
    shaken(form)
    v = w + 1.5 * form.factor.materialise()
    assert torch.allclose(form.factor.row_squares(w, 1.5, w.square().sum(1)), v.square().sum(1), rtol=1e-5)
    changed = (form.magnitude / v.norm(dim=1))[:, None] * v
    h = x @ w.T + b
    assert torch.allclose(h + form(h, SeenStub(x, w, b)), x @ changed.T + b, atol=1e-5)
    fold = Add().fold(Linear(w, b), form, "out")
    assert isinstance(fold, Linear) and torch.allclose(w + fold.weight, changed, atol=1e-5) and not fold.bias.any()


def test_dora_norm_is_a_constant_for_the_gradient() -> None:
    w, x = weight(7, 5).double(), torch.randn(3, 5).double()
    gradients = {}
    for detach in (True, False):
        form = shaken(Renorm(LowRank(2), 1.5, detach=detach).build(place(w, dtype=torch.float64)))
        form(x @ w.T, SeenStub(x, w, None)).square().sum().backward()
        gradients[detach] = form.factor.down.grad.clone()
        form.zero_grad()
        v = w + 1.5 * form.factor.materialise()
        norm = v.norm(dim=1).detach() if detach else v.norm(dim=1)
        (x @ ((form.magnitude / norm)[:, None] * v - w).T).square().sum().backward()
        assert torch.allclose(gradients[detach], form.factor.down.grad), detach
    assert not torch.allclose(gradients[True], gradients[False])


def test_dora_forms_no_dense_product() -> None:
    w, x = weight(11, 13), torch.randn(3, 13)
    form = shaken(Renorm(LowRank(2)).build(place(w)))
    shapes: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.data_ptr() != w.data_ptr():
                shapes.append(tuple(out.shape))
            return out

    h = x @ w.T
    with Watch(), torch.no_grad():
        form(h, SeenStub(x, w, None))
    assert shapes and (11, 13) not in shapes and (13, 11) not in shapes
    del shapes[:]
    with Watch(), torch.no_grad():
        form.factor.materialise()
    assert (11, 13) in shapes, "the watch sees it where it happens"


def test_frozen_in_factor_keeps_little_for_backward() -> None:
    """LoRA-FA's point: with a frozen A the layer keeps A x (r numbers per token), not x."""

    def kept(spec: Any) -> int:
        factor = spec.build((7, 64), place(weight(7, 64)))
        x = torch.randn(50, 64)
        sizes: list[int] = []
        own = {p.data_ptr() for p in (*factor.parameters(), *factor.buffers())}

        def pack(t: Tensor) -> Tensor:
            sizes.append(0 if t.data_ptr() in own else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            factor(x)
        return sum(sizes)

    assert kept(Sketch(2)) == 50 * 2
    assert kept(LowRank(2)) >= 50 * 64


def test_needs_a_weight() -> None:
    bare = Place(Site("0.attn.q", "x", features=4), 4, 4, torch.Generator())
    for spec in (Affine(Principal(2)), Affine(Core(2, Singular())), Renorm()):
        with pytest.raises(SpecError, match="starts from the base's weight and found no weight"):
            spec.build(bare)
    quantised = place(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(SpecError, match=r"found a weight of torch\.int8"):
        Affine(Principal(2)).build(quantised)


def test_counting_computes_nothing() -> None:
    w = torch.empty(10**5, 10**5, device="meta")
    where = place(w, device=torch.device("meta"))
    for spec in (Affine(Principal(4)), Affine(Core(4, Singular())), Renorm(), Affine(Core(None, Singular("none"), Diag()))):
        assert sum(p.numel() for p in spec.build(where).parameters()) > 0
