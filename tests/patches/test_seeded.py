"""What a seed stands for: the same numbers in another process, in another order, for ever."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.patches import Core, Diag, Fourier, Pattern, Place, Projection, Seeded, Sketch
from intarsia.patches.factors import Factor
from intarsia.patches.place import Peer
from intarsia.patches.seeded import DRAWS, Stream
from intarsia.sites.address import Site

SPECS = {
    "sketch": Sketch(3, 5),
    "vera": Core(4, Seeded(5), Diag(0.1), gain="zeros"),
    "pattern": Core(4, Seeded(5), Pattern("random", 1, 5)),
    "fourier": Fourier(6, 5),
    "fourier-torch": Fourier(6, 5, stream="torch"),
    "fastfood": Projection(5, "fastfood", 5),
    "sparse": Projection(5, "sparse", 5),
    "dense": Projection(5, "dense", 5),
}


def build(name: str, seed: int = 0) -> tuple[Factor, dict]:
    """A factor [8, 12] at a site among two, its trained tensors all one."""
    site, shared = Site("0.attn.q", "x", features=8), {}
    peers = (Peer(site, (8, 12)), Peer(Site("1.attn.q", "y", features=16), (16, 4)))
    place = Place(site, 12, 8, torch.Generator().manual_seed(seed), peers=peers, shared=shared)
    factor = SPECS[name].build((8, 12), place, "ones")
    with torch.no_grad():
        for part in (factor, *shared.values()):
            for parameter in part.parameters():
                parameter.fill_(1.0)
    return factor, shared


def digest(name: str) -> str:
    return hashlib.sha256(build(name)[0].materialise().detach().numpy().tobytes()).hexdigest()


def test_the_algorithm_stays_what_it_is() -> None:
    """Golden values of `philox-1`: if they change, every stored module that has a seed changes."""
    assert Stream(1, "a", "b").words(3).tolist() == [5359781946660201716, 16925593436130687583, 17848834159724482095]
    assert Stream(7).permutation(8).tolist() == [2, 0, 1, 6, 3, 4, 5, 7]
    assert Stream(7).signs(8).tolist() == [-1, -1, -1, 1, 1, 1, -1, 1]
    assert Stream(7).distinct(4, 1000).tolist() == [144, 151, 440, 973]
    expected = [0.6501659627335737, 0.04068981208965261, -0.04258642137744372]
    assert torch.allclose(Stream(7).normal(3), torch.tensor(expected, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("name", list(SPECS))
def test_nothing_frozen_is_stored_and_no_generator_is_used(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    (first, shared), (second, _) = build(name, 1), build(name, 2)
    assert torch.equal(first.materialise(), second.materialise()), "the module's own stream has no part in it"
    assert torch.equal(torch.get_rng_state(), before)
    stored = {k: v for part in (first, *shared.values()) for k, v in part.state_dict(keep_vars=True).items()}
    assert stored and all(isinstance(v, torch.nn.Parameter) for v in stored.values()), stored.keys()


def test_the_same_in_another_process() -> None:
    code = (
        "import torch; torch.manual_seed(99); torch.rand(5)\n"
        "from tests.patches.test_seeded import SPECS, digest\n"
        "print(' '.join(digest(n) for n in reversed(SPECS)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [digest(n) for n in reversed(SPECS)]


@given(count=st.integers(1, 60), extra=st.integers(0, 200), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_distinct_are_distinct(count: int, extra: int, seed: int) -> None:
    found = Stream(seed).distinct(count, count + extra).tolist()
    assert len(set(found)) == count == len(found) and found == sorted(found) and found[0] >= 0 and found[-1] < count + extra


@pytest.mark.parametrize("name", list(DRAWS))
def test_draws(name: str) -> None:
    value = DRAWS[name]((64, 128), Stream(0, name))
    assert value.shape == (64, 128) and value.dtype == torch.float32
    expected = {"unit": 1.0, "kaiming": (1 / 3 / 128) ** 0.5, "he": (2 / 128) ** 0.5, "tiled": (1 / 64 * 63 / 64) ** 0.5}[name]
    assert abs(float(value.std()) / expected - 1) < 0.05


def test_names_separate_streams() -> None:
    assert not torch.equal(Stream(0, "a").uniform(4), Stream(0, "b").uniform(4))
    assert not torch.equal(Stream(0, "a").uniform(4), Stream(1, "a").uniform(4))
    assert not torch.equal(Stream(0, "ab", "c").uniform(4), Stream(0, "a", "bc").uniform(4))
