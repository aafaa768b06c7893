"""Exchanging one design element of an adapter method (He et al. 2021), and methods put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intarsia.errors import CompositionError, SiteError, SpecError
from intarsia.host import Host
from intarsia.methods import METHODS, Method, Patch, Policy, build, dropped_layers
from intarsia.patches import Add, Attend, Bottleneck, Concat, Gated, Kron, LowRank, Scaled
from tests import zoo
from tests.host import kit

SHARED = ("insertion", "at", "scale", "layers")


def with_tensors(host: Host, name: str, other: str) -> None:
    """Give a module the tensors of another, which has as many of the same shapes."""
    mine, theirs = host.parameters(name), host.parameters(other)
    with torch.no_grad():
        for a, b in zip(mine.values(), theirs.values(), strict=True):
            a.copy_(b)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_pfeiffer_made_parallel_is_the_parallel_adapter(family: str) -> None:
    model, inputs = zoo.make(family)
    host = Host(model)
    host.add("p", build("pfeiffer", insertion="parallel", scale=4, reduction=4))
    host.add("q", build("parallel", reduction=4))
    kit.disturb(host, "q")
    with_tensors(host, "p", "q")
    with host.using("p"):
        p = kit.run(model, inputs)
    with host.using("q"):
        q = kit.run(model, inputs)
    assert torch.equal(p, q) and not torch.allclose(p, kit.reference(family), atol=1e-3)


TRANSFERS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "parallel made sequential is Houlsby's after the FFN": (
        ("parallel", {"insertion": "sequential", "scale": 1, "width": 4}),
        ("houlsby", {"at": "ffn", "activation": "relu", "width": 4, "norms": False}),
    ),
    "parallel at the heads is the multi-head adapter": (("parallel", {"at": "attn.heads", "scale": 1, "width": 4}), ("mh_parallel", {"width": 4})),
    "Houlsby made parallel and scaled, at the FFN": (
        ("houlsby", {"insertion": "parallel", "at": "ffn", "activation": "relu", "width": 4, "norms": False, "scale": 4}),
        ("parallel", {"width": 4}),
    ),
    "a scaled LoRA is one of another alpha": (("lora", {"rank": 2, "alpha": 8}), ("lora", {"rank": 2, "alpha": 8.0})),
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", list(TRANSFERS))
def test_elements_exchanged_give_the_other_method(family: str, name: str) -> None:
    """What two papers differ in is one element: with it exchanged and the same tensors, their outputs are the same bits."""
    model, inputs = zoo.make(family)
    host = Host(model)
    found = []
    for key, (method, settings) in zip("ab", TRANSFERS[name]):
        host.add(key, build(method, **settings))
    kit.disturb(host, "a")
    with_tensors(host, "b", "a")
    for key in "ab":
        with host.using(key):
            found.append(kit.run(model, inputs))
    assert torch.equal(*found) and not torch.allclose(found[0], kit.reference(family), atol=1e-3)


def test_every_element_is_a_setting_of_the_command_line() -> None:
    """As text, as `--set` gives it."""
    from intarsia.cli.options import parse_settings

    words = ["insertion=parallel", "scale=4", "at=attn", "norm=out", "layers=-1:", "learn_scale=true"]
    settings = parse_settings(words, METHODS["pfeiffer"])
    assert build("pfeiffer", **settings).patches == build(
        "pfeiffer", insertion="parallel", scale=4, at="attn", norm="out", layers="-1:", learn_scale=True
    ).patches


@pytest.mark.parametrize(
    ("change", "same"),
    [({"at": "attn"}, False), ({"insertion": "parallel"}, False), ({"scale": 2.0}, False), ({"residual": "none"}, False),
     ({"norm": "out"}, False), ({"scale": 1}, True)],
)  # fmt: skip
def test_each_element_matters(change: dict[str, Any], same: bool) -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    found = []
    for name, settings in (("a", {}), ("b", change)):
        host.add(name, build("pfeiffer", reduction=4, **settings))
        kit.disturb(host, name)
        with host.using(name):
            found.append(kit.run(model, inputs))
    assert torch.allclose(*found, atol=1e-4) == same


def test_a_trained_scale_starts_where_the_fixed_one_is() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    host.add("fixed", build("houlsby", width=4, scale=3.0, norms=False))
    host.add("learnt", build("houlsby", width=4, scale=3.0, learn_scale=True, norms=False))
    fixed = host.parameters("fixed")
    with torch.no_grad():
        for name, value in host.parameters("learnt").items():
            if not name.endswith(".scale"):
                value.copy_(fixed[name.replace(".inner.", ".")])
    with host.using("fixed"):
        expected = kit.run(model, inputs)
    with host.using("learnt"):
        assert torch.allclose(kit.answer(model(**inputs)), expected, atol=1e-5)
        kit.answer(model(**inputs)).pow(2).mean().backward()
    assert all(p.grad is not None for p in host.parameters("learnt").values())


def test_every_adapter_row_takes_the_shared_settings() -> None:
    for name in ("houlsby", "pfeiffer", "parallel", "phm_adapter", "compacter", "compacter_pp", "adapter_lowrank"):
        assert set(SHARED) <= set(METHODS[name].defaults), name
        for insertion in ("sequential", "parallel"):
            patch = build(name, insertion=insertion, at="ffn", scale=2).patches[0]
            form = patch.form
            assert isinstance(form, Bottleneck) and (form.read == "reads") == (insertion == "parallel")
            assert patch.op == Add(2.0) and patch.at == "ffn"


def test_defaults_are_what_they_were() -> None:
    """The exchangeable settings leave the papers' methods as they are."""
    assert build("houlsby").patches[0] == Patch("adapter", "attn, ffn", Bottleneck(64, activation="gelu", init="houlsby"))
    assert build("pfeiffer").patches == (Patch("adapter", "ffn", Bottleneck(read="normed")),)
    form = Bottleneck(reduction=2.0, read="reads", init="kaiming", zero_up=True)
    assert build("parallel").patches == (Patch("adapter", "ffn", form, Add(4.0)),)


def test_inputs_and_outputs_of_modules_are_told_apart() -> None:
    both = build("parallel", at="ffn, attn.{heads,q}").patches
    assert [(p.name, p.at, p.port) for p in both] == [("adapter", "ffn, attn.q", "out"), ("adapter_in", "attn.heads", "in")]
    assert [p.port for p in build("mh_parallel").patches] == ["in"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_multi_head_adapter_enters_before_the_output_projection(family: str) -> None:
    """Without a non-linearity of its own the adapter at the heads is an adapter at the output, mapped by W_o."""
    model, inputs = zoo.make(family)
    host = Host(model)
    host.add("heads", build("mh_parallel", width=4))
    kit.disturb(host, "heads")
    shapes = {n.split(".")[-2]: tuple(p.shape) for n, p in host.parameters("heads").items() if n.endswith(".value")}
    assert shapes["down"] == (4, 32) and shapes["up"][1] == 4
    with host.using("heads"):
        changed = kit.run(model, inputs)
    assert not torch.allclose(changed, kit.reference(family), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"insertion": "serial"}, "insertion is one of sequential, parallel, found 'serial'"),
        ({"norm": "both", "residual": "red"}, "did you mean 'read'"),
        ({"residual": "read", "scale": 4}, "use one or the other"),
        ({"residual": "inside"}, "set norm='out'"),
        ({"insertoin": "parallel"}, "did you mean 'insertion'"),
    ],
)
def test_refusals(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        build("pfeiffer", **settings)


def test_what_has_no_place_is_refused_before_anything_is_attached() -> None:
    model, _ = zoo.make("bert")
    host = Host(model)
    with pytest.raises(SpecError, match="there is no 'reads' to look at here"):
        host.add("a", build("pfeiffer", insertion="parallel", at="embed"))
    with pytest.raises(SpecError, match="rank 40 does not fit"):
        host.add("a", build("loreft", rank=40))
    with pytest.raises(SiteError):
        host.add("a", build("mh_parallel", at="xattn.heads"))
    assert host.names == ()


# -- free combinations -----------------------------------------------------------------------------------------------

COMBINATIONS: dict[str, tuple[Patch, ...]] = {
    "kronecker prefix": (Patch("p", "attn.mem", Attend(4, None, factor=Kron(2)), Concat(), port="mem"),),
    "gated low-rank prefix, zero-gated": (
        Patch("p", "attn.mem", Gated(Attend(4, None, factor=LowRank(2), mix="zero_gate"), "reads"), Concat(), port="mem"),
    ),
    "scaled Kronecker adapter beside the attention, at its heads": (
        Patch("a", "attn.heads", Scaled(Bottleneck(4, read="reads", factor=Kron(2, None, False)), 2.0), port="in"),
    ),
    "gated adapter, normed, at the feed-forward's activation": (
        Patch("a", "ffn.act", Gated(Bottleneck(4, norm="both"), "self"), port="in"),
    ),
    "edit of every position at the queries": (Patch("e", "attn.q", build("loreft", rank=2).patches[0].form),),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_free_combinations_obey_the_laws(family: str, name: str) -> None:
    model, inputs = zoo.make(family)
    bare = kit.reference(family)
    before = kit.state(model)
    host = Host(model)
    for seed, module in enumerate("ab"):
        host.add(module, Method("free", COMBINATIONS[name]), seed=seed)
        kit.disturb(host, module, seed)
    single = {}
    for module in "ab":
        with host.using(module):
            single[module] = kit.run(model, inputs)
    assert not torch.allclose(single["a"], bare, atol=1e-4)
    with host.using(["b", "a"]):
        rows = kit.run(model, inputs)
    assert torch.allclose(rows[0], single["b"][0], atol=1e-4) and torch.allclose(rows[1], single["a"][1], atol=1e-4)
    with host.using("0.3*a + 0.7*a"):
        assert torch.allclose(kit.run(model, inputs), single["a"], atol=1e-4)
    with host.using("a"):
        kit.answer(model(**inputs)).pow(2).mean().backward()
    assert all(p.grad is not None for p in host.parameters("a").values())
    host.insert(host.extract("a", flatten=True), name="flat")
    with host.using("flat"):
        assert torch.allclose(kit.run(model, inputs), single["a"], atol=1e-5)
    host.close()
    model.zero_grad()
    assert kit.same_state(before, kit.state(model))


# -- AdapterDrop's draws ---------------------------------------------------------------------------------------------


def test_dropped_layers_are_drawn_anew_and_repeatably() -> None:
    policy = build("adapterdrop", robust=True, lowest=11).policy
    drawn = [dropped_layers(policy, 3, step)["drop_layers"] for step in range(400)]
    assert drawn == [dropped_layers(policy, 3, step)["drop_layers"] for step in range(400)]
    assert set(drawn) == set(range(12))
    assert drawn != [dropped_layers(policy, 4, step)["drop_layers"] for step in range(400)]
    assert dropped_layers(Policy(), 3, 0) == {}


# -- starts from real activations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reparameterise", [None, 8])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_a_prefix_starts_from_the_keys_and_values_of_a_text(family: str, reparameterise: int | None) -> None:
    """The prefix holds what the base computes for the text: a decoder that then reads on as if the text had come before."""
    model, _ = zoo.make(family)
    model.train()
    host = Host(model)
    modes = [m.training for m in model.modules()]
    text = (7, 8, 9)
    host.add("p", build("prefix", length=3, reparameterise=reparameterise, init="activations", ids=text))
    assert [m.training for m in model.modules()][: len(modes)] == modes
    module = host.extract("p", flatten=True)
    if family != "llama":
        assert len(module.tensors) and all(t.isfinite().all() for t in module.tensors.values())
        return
    model.eval()
    continuation = torch.tensor([[11, 12, 13, 14]])
    positions = torch.arange(3, 7)[None]
    with torch.no_grad():
        whole = model(torch.tensor([[*text, 11, 12, 13, 14]])).logits[:, 3:]
        with host.using("p"):
            prefixed = model(continuation, position_ids=positions).logits
    assert torch.allclose(prefixed, whole, atol=1e-4)


def test_a_text_shorter_than_the_prefix_is_repeated_and_a_wrong_one_refused() -> None:
    model, _ = zoo.make("gpt2")
    host = Host(model)
    host.add("p", build("prefix", length=4, reparameterise=None, init="activations", ids=(7, 8)))
    host.add("q", build("prefix", length=4, reparameterise=None, init="activations", ids=(7, 8, 7, 8)))
    assert all(torch.equal(t, host.tensors("q")[n]) for n, t in host.tensors("p").items())
    with pytest.raises(SiteError, match="token id 97 is outside the vocabulary of 97"):
        host.add("r", build("prefix", length=2, init="activations", ids=(97,)))
    assert host.names == ("p", "q")
    whisper, _ = zoo.make("whisper")
    with pytest.raises(SiteError, match="not token ids"):
        Host(whisper).add("p", build("prefix", length=2, init="activations", ids=(7,)))


def test_zero_gated_prefixes_do_not_mix_with_shared_ones() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    host.add("own", build("llama_adapter", length=3)).add("shared", build("p_tuning_v2", length=3))
    kit.disturb(host, "own")
    with host.using("own >> shared"):
        both = kit.run(model, inputs)
    with host.using("shared"):
        assert not torch.allclose(both, kit.run(model, inputs), atol=1e-4)
    with host.using("0.5*own + 0.5*shared"), pytest.raises(CompositionError, match="cannot be mixed"):
        kit.run(model, inputs)
    with host.using(["own", "shared"]):
        rows = kit.run(model, inputs)
    with host.using("own"):
        assert torch.allclose(kit.run(model, inputs)[0], rows[0], atol=1e-5)


# -- PERFECT on a model ----------------------------------------------------------------------------------------------


def test_perfect_reads_its_masks_on_a_model() -> None:
    model, _ = zoo.make("bert", headless=True)
    host = Host(model)
    host.add("p", build("perfect", labels=("x", "y"), masks=2, mask_token=4, reduction=8))
    assert host.labels("p") == ("x", "y") and set(host.tagged("p")) == {"", "norm", "head"}
    ids = zoo.token_ids()
    ids[0, 1:3] = 4
    ids[1, -2:] = 4
    with host.using("p"):
        scores = kit.run(model, {"input_ids": ids})
        assert scores.shape == (2, 2, 2)
        assert torch.allclose(kit.run(model, {"input_ids": ids.flip(0)}), scores.flip(0), atol=1e-5)
    host.add("q", build("perfect", labels=("x", "y"), masks=2, mask_token=4, reduction=8), seed=1)
    with host.using("q"):
        other = kit.run(model, {"input_ids": ids})
    with host.using(["q", "p"]):
        rows = kit.run(model, {"input_ids": ids})
    assert torch.allclose(rows[0], other[0], atol=1e-5) and torch.allclose(rows[1], scores[1], atol=1e-5)
    (form,) = [d.form for _, deltas in host.deltas("p") for d in deltas if d.name == "head"]
    form.fit_prototypes(torch.randn(6, 2, 32), torch.tensor([0, 1, 0, 1, 0, 1]))  # type: ignore[operator]
    module = host.extract("p")
    assert any(name.endswith("head.prototypes") for name in module.tensors)
    with host.using("p"):
        expected = kit.run(model, {"input_ids": ids})
    host.insert(module, name="again")
    with host.using("again"):
        assert torch.equal(kit.run(model, {"input_ids": ids}), expected)


# -- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", ["loreft", "noreft", "direft", "mam", "unipelt", "prefix", "p_tuning", "p_tuning_v2", "prompt", "lst"])
def test_methods_that_do_not_start_at_the_base(family: str, name: str) -> None:
    model, inputs = zoo.make(family)
    host = Host(model).add("a", kit.small(name))
    with host.using("a"):
        fresh = kit.run(model, inputs)
    bare = kit.reference(family)
    assert fresh.shape != bare.shape or (fresh - bare).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("loreft", {"rank": 2, "first": 2, "last": 2, "init": "identity"}), ("noreft", {"rank": 2, "init": "identity", "tied": False}),
     ("prefix", {"length": 3, "reparameterise": 8, "mix": "zero_gate"}), ("pfeiffer", {"init": "zeros"})],
)  # fmt: skip
def test_settings_that_start_exactly_at_the_base(family: str, name: str, settings: dict[str, Any]) -> None:
    model, inputs = zoo.make(family)
    host = Host(model).add("a", build(name, **settings))
    with host.using("a"):
        assert torch.equal(kit.run(model, inputs), kit.reference(family))


def test_a_fresh_generated_adapter_is_near_nothing() -> None:
    """Its inner norm's gain starts at N(0, 1e-2 |z|): the adapter writes about a twentieth of a unit."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", build("hyperformer", width=4))
    change: list[torch.Tensor] = []
    for _, deltas in host.deltas("a"):
        for delta in deltas:
            if delta.name == "adapter":
                delta.form.register_forward_hook(lambda m, i, o: change.append(o))
    with host.using("a"):
        kit.run(model, inputs)
    assert len(change) == 4 and all(0.01 < float(c.std()) < 0.2 for c in change)
