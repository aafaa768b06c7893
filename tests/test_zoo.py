"""The zoo keeps its promises: every family, cheap, reproducible, nothing degenerate."""

from __future__ import annotations

import time

import pytest
import torch

from tests import zoo


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_two_builds_are_equal_and_run(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (a, batch), (b, _) = zoo.make(name), zoo.make(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with torch.no_grad():
        logits = a(**batch).logits
        assert torch.isfinite(logits).all() and torch.equal(logits, b(**batch).logits)
        assert not torch.allclose(logits, zoo.make(name, seed=1)[0](**batch).logits)
        zoo.make(name, headless=True)[0](**batch)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_no_parameter_is_constant(name: str) -> None:
    for path, parameter in zoo.make(name)[0].named_parameters():
        assert parameter.std() > 0.01, path
    plain = zoo.make(name, perturb=False)[0]
    assert any(parameter.std() == 0 for parameter in plain.parameters())


def test_names() -> None:
    kinds = (zoo.ENCODERS, zoo.CAUSAL, zoo.SEQ2SEQ, zoo.SPEECH)
    assert sorted(name for kind in kinds for name in kind) == sorted(zoo.FAMILIES)
    assert set(zoo.GENERATING) == {*zoo.CAUSAL, *zoo.SEQ2SEQ, *zoo.SPEECH} and set(zoo.TEXT) == set(zoo.FAMILIES) - set(zoo.SPEECH)
    assert zoo.make("bert", num_hidden_layers=3)[0].config.num_hidden_layers == 3


def test_building_is_cheap() -> None:
    for name in zoo.FAMILIES:
        zoo.make(name)
    begun = time.process_time()
    for name in zoo.FAMILIES:
        zoo.make(name)
    assert (time.process_time() - begun) / len(zoo.FAMILIES) < 0.05
