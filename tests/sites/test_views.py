"""Parts of fused projections: the slices are what an unfused model would compute, and what the model really uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from intarsia.sites import Site, SiteMap, View, resolve
from intarsia.sites.trace import trace
from tests import zoo
from tests.sites.observe import Observer, last, part

FUSED_ATTENTION = ["gpt2", "gpt_neox", "gpt_neox-sequential", "phi3", "modernbert", "bloom"]
FUSED_FEED_FORWARD = ["phi3", "modernbert"]


def observe(name: str) -> Observer:
    model, batch = zoo.make(name)
    observer = Observer(model, resolve(model))
    observer.run(batch)
    return observer


def sliced(observer: Observer, site: Site) -> Tensor:
    """What a linear made of the site's rows of weight and bias computes from the fused projection's input."""
    weight, bias = (observer.sites.get(f"{site.name}.{param}") if f"{site.name}.{param}" in observer.sites else None for param in ("weight", "bias"))
    assert weight is not None and weight.view == site.view
    module = observer.model.get_submodule(site.path)
    matrix = module.weight.t() if weight.transposed else module.weight
    rows = part(matrix, site.view, dim=0)  # type: ignore[arg-type]
    offset = None if bias is None else part(module.bias, bias.view)  # type: ignore[arg-type]
    return F.linear(observer.inputs[site.path][-1], rows, offset)


@pytest.mark.parametrize("name", sorted({*FUSED_ATTENTION, *FUSED_FEED_FORWARD}))
def test_slicing_the_weight_equals_slicing_the_output(name: str) -> None:
    observer = observe(name)
    views = [site for site in observer.sites.values() if site.view is not None and site.port == "out"]
    assert views
    for site in views:
        with torch.no_grad():
            assert torch.allclose(sliced(observer, site), last(observer, site).value, atol=1e-6), site.name


@pytest.mark.parametrize("name", sorted({*FUSED_ATTENTION, *FUSED_FEED_FORWARD}))
def test_parts_are_a_partition_of_the_whole(name: str) -> None:
    sites = resolve(zoo.make(name)[0])
    for whole, words in (("attn.qkv", "qkv"), ("ffn.gate_up", ("gate", "up"))):
        if f"0.{whole}" not in sites:
            continue
        features = sites[f"0.{whole}"].features
        seen = torch.zeros(features)
        for word in words:
            view = sites[f"0.{whole.split('.')[0]}.{word}"].view
            assert view is not None
            seen += part_mask(view, features)
        assert torch.equal(seen, torch.ones(features))


def part_mask(view: View, features: int) -> Tensor:
    mask = torch.zeros(view.groups, features // view.groups)
    mask[:, view.start : view.start + view.width] = 1
    return mask.flatten()


@pytest.mark.parametrize("name", [name for name in FUSED_ATTENTION if name != "bloom"])
def test_values_are_those_attended_to(name: str) -> None:
    """`v` is the tensor the attention function gets; `q` and `k` are, up to the rotation of their positions."""
    model, batch = zoo.make(name)
    observer = Observer(model, resolve(model))
    observer.run(batch)
    for core in trace(model, batch).cores:
        (memory,) = [site for site in observer.sites.values() if site.port == "mem" and site.path == core.path]
        for word, heads in (("q", core.q), ("k", core.k), ("v", core.v)):
            value = last(observer, memory.name.replace("mem", word)).value
            value = value.view(*value.shape[:2], -1, heads.shape[-1]).transpose(1, 2)
            assert torch.allclose(value.norm(dim=-1), heads.norm(dim=-1), atol=1e-5), (core.path, word)
            assert word != "v" or torch.equal(value, heads)


def test_values_of_bloom() -> None:
    """Its attention is closed, but the first token attends to itself alone: the result there is its values."""
    observer = observe("bloom")
    for layer in (0, 1):
        values, heads = last(observer, f"{layer}.attn.v").value, last(observer, f"{layer}.attn.heads").value
        assert torch.allclose(values[:, 0], heads[:, 0], atol=1e-6)
        fused = last(observer, f"{layer}.attn.qkv").value.view(2, 7, 4, 3, 8)
        for index, word in enumerate("qkv"):
            assert torch.equal(last(observer, f"{layer}.attn.{word}").value, fused[..., index, :].reshape(2, 7, 32))


@pytest.mark.parametrize("name", FUSED_FEED_FORWARD)
def test_the_gate_is_the_half_that_is_activated(name: str) -> None:
    observer = observe(name)
    activation = {"phi3": F.silu, "modernbert": F.gelu}[name]
    gate, up, act = (last(observer, f"1.ffn.{word}").value for word in ("gate", "up", "act"))
    assert torch.allclose(activation(gate) * up, act, atol=1e-6)
    assert not torch.allclose(activation(up) * gate, act, atol=1e-3)


def test_grouped_queries_share_keys() -> None:
    sites: SiteMap = resolve(zoo.make("phi3")[0])
    assert [sites[f"0.attn.{word}"].view for word in "qkv"] == [View(1, 0, 32), View(1, 32, 16), View(1, 48, 16)]
    assert resolve(zoo.make("gpt_neox")[0])["0.attn.k"].view == View(4, 8, 8)


def test_a_whole_is_selected_once_for_full_fine_tuning() -> None:
    sites = resolve(zoo.make("gpt2")[0])
    whole = [site for site in sites.parameters() if site.name.startswith("0.attn.")]
    assert [site.name for site in whole] == [
        "0.attn.norm.weight", "0.attn.norm.bias", "0.attn.qkv.weight", "0.attn.qkv.bias", "0.attn.o.weight", "0.attn.o.bias",
    ]  # fmt: skip
