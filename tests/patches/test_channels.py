"""S2FT's channels: coupled choices, and that the permutation of the paper changes nothing."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import SpecError
from intarsia.host import Host
from intarsia.host.parts import weight_of
from intarsia.methods import build
from intarsia.patches import Columns
from intarsia.patches.channels import ColumnsFactor
from intarsia.patches.place import Place
from intarsia.sites.address import Site
from tests import zoo
from tests.host import kit


def factors(host: Host, name: str = "m") -> dict[str, ColumnsFactor]:
    return {key: form.factor for key, form in host.forms(name).items() if isinstance(getattr(form, "factor", None), ColumnsFactor)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_sub_layer_chooses_the_same_heads_and_channels(family: str) -> None:
    model, _ = zoo.make(family)
    host = Host(model).add("m", build("s2ft", share=0.5, inputs=True))
    found = factors(host)
    sites = host.sites
    seen = 0
    for key, factor in found.items():
        site = key.split("/")[0]
        sub, word, _ = site.rsplit(".", 2)
        if word in ("gate", "up"):
            assert factor.rows and factor.index.tolist() == found[f"{sub}.down.weight/delta"].index.tolist()
        elif word == "v":
            count, size = sites[f"{sub}.heads"].heads
            columns = found[f"{sub}.o.weight/delta"]
            shared = columns.length // size // count  # query heads per key/value head
            units = sorted({i // size for i in factor.index.tolist()})
            assert len(factor.index) == len(units) * size == max(1, count // 2) * size
            assert sorted({i // size // shared for i in columns.index.tolist()}) == units
            assert len(columns.index) == len(units) * size * shared
        else:
            continue
        seen += 1
    assert seen


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_permutation_of_the_paper_changes_nothing(family: str) -> None:
    """Feed-forward channels in another order, and the module's positions with them: the same outputs to rounding."""
    model, inputs = zoo.make(family)
    host = Host(model).add("m", build("s2ft", share=0.3, inputs=True, at="ffn.down.weight"))
    kit.disturb(host, "m")
    with host.using("m"):
        expected = kit.run(model, inputs)
    module = host.extract("m")
    other, _ = zoo.make(family)
    moved = Host(other)
    tensors = dict(module.tensors)
    draw = torch.Generator().manual_seed(0)
    for name, site in list(moved.sites.items()):
        if not name.endswith(".ffn.down.weight"):
            continue
        sub = name.rsplit(".", 2)[0]
        order = torch.randperm(site.shape[1], generator=draw)
        back = order.argsort()
        for role in ("gate", "up", "down"):
            for leaf in ("weight", "bias"):
                part = moved.sites.get(f"{sub}.{role}.{leaf}")
                if part is None or (role, leaf) == ("down", "bias"):
                    continue
                value = other.get_submodule(part.path)._parameters[leaf]
                assert value is not None
                value.data.copy_(value[:, order] if role == "down" else value[order])
            for patch in ("delta", "rows"):
                key = f"{sub}.{role}.weight/{patch}.factor.index"
                if key in tensors:
                    tensors[key] = back[tensors[key].long()].int()
    assert torch.allclose(kit.run(other, inputs), kit.reference(family), atol=1e-5)
    moved.add("m", build("s2ft", share=0.3, inputs=True, at="ffn.down.weight"))
    with torch.no_grad():
        for key, tensor in moved.tensors("m").items():
            tensor.copy_(tensors[key])
    with moved.using("m"):
        assert torch.allclose(kit.run(other, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
def test_applied_and_written_out_are_the_same(rows: bool) -> None:
    factor = ColumnsFactor(6, torch.tensor([1, 4], dtype=torch.int32), torch.nn.Parameter(torch.randn((2, 5) if rows else (5, 2))), rows)
    x = torch.randn(3, 5 if rows else 6)
    torch.testing.assert_close(factor(x), x @ factor.materialise().T)
    assert factor.materialise().shape == ((6, 5) if rows else (5, 6))


def test_counts() -> None:
    """On BERT-base: two heads' and 61 channels' columns in each of twelve layers; with inputs also their rows."""
    from tests.methods.test_counts import host

    assert host("bert-base").count(build("s2ft", share=0.2)) == 12 * (2 * 64 * 768 + 614 * 768)
    assert host("bert-base").count(build("s2ft", share=0.2, inputs=True)) == 2 * 12 * (2 * 64 * 768 + 614 * 768)


def test_heads_of_unknown_size_are_refused() -> None:
    place = Place(Site("0.attn.o.weight", "x", "weight"), 8, 8, torch.Generator())
    with pytest.raises(SpecError, match="heads=false"):
        Columns(0.5, heads=True).build((8, 8), place)
    with pytest.raises(SpecError, match="blocks of 3"):
        Columns(0.5, block=3).build((8, 8), place)


def test_values_change_what_they_should() -> None:
    model, _ = zoo.make("llama")
    host = Host(model).add("m", build("s2ft", share=0.3))
    kit.disturb(host, "m")
    plain = host.fold("m")
    for key, factor in factors(host).items():
        site = host.sites[key.split("/")[0]]
        before, after = weight_of(site, model.get_submodule(site.path)), weight_of(site, plain.get_submodule(site.path))
        assert before is not None and after is not None
        columns = (before != after).any(0).nonzero()[:, 0]
        assert columns.tolist() == sorted(factor.index.tolist())
