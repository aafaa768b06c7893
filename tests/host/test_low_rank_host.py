"""Low-rank, subspace and orthogonal methods on a live model: checkpointing, copies, generation, stacks, tied parts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing

from intarsia.host import Host
from intarsia.methods import build
from tests import zoo
from tests.host import kit
from tests.host.test_checkpointing import gradients
from tests.host.test_distributed import launch

METHODS = ("dora", "pissa", "vera", "said", "oft", "boft", "hira", "road", "svft")


@pytest.mark.parametrize(("family", "method"), [("bert", m) for m in METHODS] + [("t5", "dora"), ("t5", "said"), ("gpt2", "oft")])
def test_checkpointing(family: str, method: str) -> None:
    plain = gradients(family, method, "plain")
    for how in ("checkpointed", "switched"):
        assert torch.allclose(gradients(family, method, how), plain, atol=1e-6, rtol=1e-4), how


@pytest.mark.parametrize("method", METHODS)
def test_copies(method: str) -> None:
    """A deep or pickled copy computes with its own tensors, tied and frozen ones among them."""
    model, inputs, host = kit.woven("bert", method)
    with host.using("a"):
        expected = kit.run(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = Host.of(twin)
        with torch.no_grad():
            for parameter in host.parameters("a").values():
                parameter.add_(1.0)
        with other.using("a"):
            assert torch.equal(kit.run(twin, inputs), expected)
        with torch.no_grad():
            for parameter in host.parameters("a").values():
                parameter.sub_(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_the_module_and_with_it_folded(method: str) -> None:
    model, inputs, host = kit.woven("llama", method)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with host.using("a"):
        active = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **options, num_beams=3)
    plain = host.fold("a")
    assert torch.equal(plain.generate(**inputs, **options), active)
    assert torch.equal(plain.generate(**inputs, **options, num_beams=3), beams)


@pytest.mark.parametrize("stack", ["dora >> lora", "lora >> dora", "oft >> hira", "hira >> oft", "road >> dora", "dora - lora", "full >> dora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_stacks_fold(family: str, stack: str) -> None:
    """Methods that look at the base's weight see the base, whatever stands before them; and folding says the same."""
    model, inputs = zoo.make(family)
    host = Host(model)
    for seed, name in enumerate(("dora", "lora", "oft", "hira", "road", "full")):
        host.add(name, kit.small(name, family), seed=seed)
        kit.disturb(host, name, seed, 0.02 if name == "full" else 0.1)
    with host.using(stack):
        active = kit.run(model, inputs)
    assert torch.allclose(kit.run(host.fold(stack), inputs), active, atol=1e-4)


def test_order_of_rotations_matters() -> None:
    model, inputs, host = kit.woven("bert", "oft")
    results = []
    for text in ("a >> b", "b >> a"):
        with host.using(text):
            results.append(kit.run(model, inputs))
    assert not torch.allclose(*results, atol=1e-4)


def test_seen_weight_is_cut_and_turned() -> None:
    """GPT-2 stores (in, out) and fuses q, k, v; GPT-NeoX interleaves heads: the rows' norms are those of the role."""
    for family in ("gpt2", "gpt_neox", "llama"):
        model, inputs = zoo.make(family)
        host = Host(model).add("a", build("dora", rank=2, at="attn.v"))
        folded = host.fold("a")
        assert all(torch.allclose(v, folded.state_dict()[k], atol=1e-6) for k, v in zoo.make(family)[0].state_dict().items())
        form = host.deltas("a")[0][1][0].form
        with torch.no_grad():
            form.magnitude.mul_(2.0)
        with host.using("a"):
            doubled = kit.run(model, inputs)
        assert torch.allclose(kit.run(host.fold("a"), inputs), doubled, atol=1e-5)


@pytest.mark.slow
def test_ddp_and_fsdp2() -> None:
    methods = (*METHODS, "lora_fa", "c3a", "fourierft", "gralora")
    assert len(launch("bert,llama", ",".join(methods))) == 2 * len(methods)


@pytest.mark.slow
@pytest.mark.parametrize("method", (*METHODS, "lora_fa", "lokr", "c3a", "fourierft", "hra", "gralora"))
def test_one_graph(method: str) -> None:
    for family in ("bert", "llama"):
        model, inputs, host = kit.woven(family, method)
        options = {} if family == "bert" else {"use_cache": False}
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run = host.compile(backend=counter, fullgraph=True)
        with host.using("a"):
            wanted = kit.run(model, inputs)
        for _ in range(2):
            assert torch.allclose(kit.answer(run("a", **inputs, **options)), wanted, atol=1e-4)
        assert counter.frame_count == 1


def test_two_modules_do_not_share_their_frozen_parts() -> None:
    model, _inputs, host = kit.woven("bert", "vera")
    frames = [{id(d.form.factor.frame) for _, deltas in host.deltas(n) for d in deltas} for n in "ab"]
    assert all(len(f) == 1 for f in frames) and frames[0] != frames[1]
    host.remove("a")
    assert not any(n.endswith("m_a") for n, _ in model.named_modules())
