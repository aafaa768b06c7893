"""Every activation site is what its name says: checked by arithmetic on a real forward pass of every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.sites import Site, SiteMap, anatomy_of, resolve
from intarsia.sites.trace import trace
from tests import zoo
from tests.sites.observe import Observer, first, last

SUBLAYERS = ("attn", "xattn", "ffn")


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def observed(request: pytest.FixtureRequest) -> tuple[str, Observer]:
    name: str = request.param
    model, batch = zoo.make(name)
    observer = Observer(model, resolve(model))
    observer.run(batch)
    return name, observer


def close(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.numel() == b.numel() and torch.allclose(a.reshape(-1), b.reshape(-1), atol=1e-5, rtol=1e-4)


def sublayers(sites: SiteMap, stack: str, layer: int) -> list[Site]:
    prefix = f"{stack}." if stack else ""
    return [sites[name] for word in SUBLAYERS if (name := f"{prefix}{layer}.{word}") in sites]


def blocks(sites: SiteMap) -> list[tuple[str, int]]:
    return [(stack, layer) for stack, count in sites.layers.items() for layer in range(count)]


def test_features_are_the_last_dimension(observed: tuple[str, Observer]) -> None:
    _, observer = observed
    for site in observer.sites.values():
        if site.port in ("out", "in"):
            assert site.name in observer.firings, f"{site.name} is never reached"
            assert {firing.value.shape[-1] for firing in observer.firings[site.name]} == {site.features}, site.name


def test_sites_are_reached_once_per_execution_of_their_block(observed: tuple[str, Observer]) -> None:
    _, observer = observed
    for site in observer.sites.values():
        if site.layer is None or site.port not in ("out", "in"):
            continue
        block = observer.sites[f"{site.stack}.{site.layer}" if site.stack else str(site.layer)]
        times, executions = len(observer.firings[site.name]), len(observer.firings[block.name])
        assert times == executions * (2 if site.reused else 1), site.name


def test_the_sublayers_sum_to_the_block(observed: tuple[str, Observer]) -> None:
    """residual + h is the next residual (pre-norm), or what the norm reads, whose output is the next residual (post-norm)."""
    name, observer = observed
    sites, anatomy = observer.sites, anatomy_of(observer.model)
    for stack, layer in blocks(sites):
        block = last(observer, f"{stack}.{layer}" if stack else str(layer)).value
        chain = sublayers(sites, stack, layer)
        fired = [last(observer, site) for site in chain]
        assert all(f.residual is not None for f in fired)
        if anatomy.stacks[stack].parallel:
            assert close(fired[0].residual, fired[1].residual)
            assert close(fired[0].residual + fired[0].value + fired[1].value, block)  # type: ignore[operator]
            continue
        nexts = [*(f.residual for f in fired[1:]), block]
        for site, f, following in zip(chain, fired, nexts, strict=True):
            total = f.residual.reshape(f.value.shape) + f.value  # type: ignore[union-attr]
            if name == "xmod" and site.name.endswith("ffn"):
                assert any(close(total, x) for x in observer.inputs[site.norm or ""])  # an adapter stands in between
            elif site.norm is not None:
                assert close(total, observer.inputs[site.norm][-1]), site.name
                assert close(observer.outputs[site.norm][-1], following), site.name
            else:
                assert close(total, following), site.name


def test_reads_is_what_the_sublayer_reads(observed: tuple[str, Observer]) -> None:
    _, observer = observed
    for stack, layer in blocks(observer.sites):
        order = anatomy_of(observer.model).stacks[stack].order
        for site in sublayers(observer.sites, stack, layer):
            f = last(observer, site)
            expected = last(observer, f"{site.name}.norm").value if order in ("pre", "sandwich") else f.residual
            assert close(f.reads, expected), site.name
            for word in ("heads", "mem"):
                if f"{site.name}.{word}" in observer.sites:
                    assert observer.sites[f"{site.name}.{word}"].reads == site.reads


def test_projections_lead_to_each_other(observed: tuple[str, Observer]) -> None:
    """`act` is made of `gate` and `up`; `down`, or a norm or dropout after it, gives the sub-layer's output."""
    _, observer = observed
    for site in observer.sites.values():
        if site.name.endswith(".ffn.act") and site.name.replace("act", "gate") in observer.sites:
            gate, up = (last(observer, site.name.replace("act", word)).value for word in ("gate", "up"))
            act = last(observer, site).value
            shape = act.shape
            activation = next(f for f in (torch.nn.functional.silu, torch.nn.functional.gelu, _gelu_tanh) if close(f(gate.reshape(shape)) * up.reshape(shape), act))
            assert activation is not None


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def test_the_stem_is_the_input_of_the_first_block(observed: tuple[str, Observer]) -> None:
    _, observer = observed
    for stack in observer.sites.layers:
        prefix = f"{stack}." if stack else ""
        stem, block = observer.sites[f"{prefix}stem"], observer.sites[f"{prefix}0"]
        assert len(observer.firings[stem.name]) == 1
        assert close(last(observer, stem).value, observer.inputs[block.path][0])


def test_final_norm_reads_the_last_block(observed: tuple[str, Observer]) -> None:
    _, observer = observed
    for stack, count in observer.sites.layers.items():
        prefix = f"{stack}." if stack else ""
        if f"{prefix}final.norm" in observer.sites:
            norm = observer.sites[f"{prefix}final.norm"]
            assert close(observer.inputs[norm.path][-1], last(observer, f"{prefix}{count - 1}").value)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_memory_is_what_the_interface_is_given(name: str) -> None:
    """`mem` sites stand exactly for the attentions that go through the interface, with the right heads."""
    model, batch = zoo.make(name)
    sites = resolve(model)
    memories = {site.path: site for site in sites.values() if site.port == "mem"}
    cores = {core.path: core for core in trace(model, batch).cores}
    assert set(memories) == set(cores)
    for path, site in memories.items():
        _, heads, _, size = cores[path].k.shape
        assert site.heads == (heads, size) and site.features == size
    assert bool(memories) != ("attn.mem" in sites.missing)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_logits(name: str) -> None:
    model, batch = zoo.make(name)
    site = resolve(model)["logits"]
    with torch.no_grad():
        assert model(**batch).logits.shape[-1] == site.features
    assert (site.path, site.port) == ("", "logits")
    headless, _ = zoo.make(name, headless=True)
    assert resolve(headless)["logits"].features == 0


@pytest.mark.parametrize("name", zoo.TEXT)
def test_the_sequence_can_be_given_as_embeddings(name: str) -> None:
    model, batch = zoo.make(name)
    (site,) = [site for site in resolve(model).values() if site.port == "seq"]
    stack = model.get_submodule(site.path)
    embeddings = torch.randn(2, 9, site.features)
    with torch.no_grad():
        states = first(stack(inputs_embeds=embeddings)) if site.stack else first(stack(inputs_embeds=embeddings, **_decoder(batch)))
    assert states is not None and states.shape[:2] == (2, 9)


def _decoder(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name.startswith("decoder")}


def test_the_sequence_passes_through_the_module(observed: tuple[str, Observer]) -> None:
    """A hook there would see the call (OPT's language model calls the decoder past its base)."""
    _, observer = observed
    for site in observer.sites.values():
        if site.port in ("seq", "mem"):
            assert len(observer.outputs[site.path]) >= 1, site.name


@pytest.mark.parametrize("name", zoo.SPEECH)
def test_sound_is_no_sequence_of_embeddings(name: str) -> None:
    sites = resolve(zoo.make(name)[0])
    assert not [site for site in sites.values() if site.port == "seq"]
    assert "frames of sound" in sites.missing["seq"]


def test_deberta_v3_reads_where_only_tokens_pass() -> None:
    """Its q and k also project the table of relative positions, so they must not serve as the residual's tap."""
    sites = resolve(zoo.make("deberta-v3")[0])
    assert sites["0.attn.q"].reused and sites["0.attn.k"].reused and not sites["0.attn.v"].reused
    assert sites["0.attn"].residual == sites["0.attn"].reads == sites["0.attn.v"].path
    assert not resolve(zoo.make("deberta-v2")[0])["0.attn.q"].reused
