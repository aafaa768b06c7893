"""Masks do not combine at their weights, and combine elsewhere."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import CompositionError, ModuleError
from intarsia.host import Host
from intarsia.methods import METHODS, build
from intarsia.modules.arithmetic import average, negate, scale
from tests import zoo
from tests.host import kit


@pytest.fixture(scope="module", params=["supermask", "lottery"])
def masked(request: pytest.FixtureRequest) -> tuple[Host, dict[str, torch.Tensor]]:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, (name, method) in enumerate((("m", request.param), ("n", request.param), ("lora", "lora"), ("shira", "shira"), ("adapter", "pfeiffer"))):
        host.add(name, kit.small(method), seed=seed)
        kit.disturb(host, name, seed)
    host.add("low", build(request.param, at="ffn.down.weight"))
    kit.disturb(host, "low")
    return host, inputs


@pytest.mark.parametrize("text", ["m >> n", "m >> shira", "shira >> m", "0.5*m", "-m", "average(m, n)", "m + shira", "average(m, m)", "(0.3*shira + adapter) >> m", "m - n", "low >> m", "fuse(m, n; router=adapter)"])
def test_a_mask_meets_no_other_change_of_its_weights(masked: tuple[Host, dict[str, torch.Tensor]], text: str) -> None:
    host, _ = masked
    with pytest.raises(CompositionError, match=r"decides which weights count|no router"), host.using(text):
        pytest.fail("refused before anything runs")


@pytest.mark.parametrize("kind", ["soup", "fixed"])
def test_nor_by_a_routers_weights(masked: tuple[Host, dict[str, torch.Tensor]], kind: str) -> None:
    host, _ = masked
    host.router("r", kind, ["m", "shira"])
    try:
        with pytest.raises(CompositionError, match="decides which weights count"), host.using("fuse(m, shira; router=r)"):
            pytest.fail("refused before anything runs")
    finally:
        host.remove("r")


@pytest.mark.parametrize("text", ["m >> adapter", "adapter >> m", "m + adapter", "0.5*adapter + m", "1.0*m", "base >> m", "low >> lora", "0.5*lora + low"])
def test_it_combines_elsewhere(masked: tuple[Host, dict[str, torch.Tensor]], text: str) -> None:
    host, inputs = masked
    with host.using(text):
        assert kit.run(host.model, inputs).isfinite().all()


def test_rows_have_masks_of_their_own(masked: tuple[Host, dict[str, torch.Tensor]]) -> None:
    host, inputs = masked
    single = {}
    for name in ("m", "shira"):
        with host.using(name):
            single[name] = kit.run(host.model, inputs)
    with host.using(["m", "shira"]):
        rows = kit.run(host.model, inputs)
    assert torch.allclose(rows[0], single["m"][0], atol=1e-5) and torch.allclose(rows[1], single["shira"][1], atol=1e-5)


def test_nor_as_values(masked: tuple[Host, dict[str, torch.Tensor]]) -> None:
    host, _ = masked
    m, n = host.extract("m"), host.extract("n")
    for change in (lambda: average([m, n]), lambda: scale(m, 0.5), lambda: negate(m)):
        with pytest.raises(ModuleError):
            change()


def test_which_methods_are_masks() -> None:
    assert {name for name, row in METHODS.items() if row.build().masks} == {"supermask", "lottery"}
