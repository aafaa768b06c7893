"""Deep copies and pickles carry their own modules and never share tensors with the original."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from intarsia.host import Host
from tests import zoo
from tests.host import kit

FAMILIES = ("bert", "llama-tied", "t5", "gpt2", "bart")
METHODS = ("lora", "pfeiffer", "prefix", "prompt", "ln", "full", "head")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_deepcopy(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    host.rest("a")
    a = kit.run(model, inputs)
    with host.using("b"):
        b = kit.run(model, inputs)
    twin = copy.deepcopy(model)
    kit.disturb(host, "a", seed=7, size=1.0)
    assert not torch.allclose(kit.run(model, inputs), a, atol=1e-3)
    assert torch.equal(kit.run(twin, inputs), a), "the copy has tensors of its own"
    with host.using("b"):
        assert torch.equal(kit.run(twin, inputs), a), "a call on one model is no call on another"
    guest = Host.of(twin)
    assert guest.names == ("a", "b")
    with guest.using("b"):
        assert torch.equal(kit.run(twin, inputs), b)
    guest.close()
    bare, _ = zoo.make(family)
    assert twin.state_dict().keys() == bare.state_dict().keys()
    assert torch.equal(kit.run(twin, inputs), kit.run(bare, inputs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_pickle(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    host.rest("a")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(kit.run(twin, inputs), kit.run(model, inputs))
    with Host.of(twin).using("b"), host.using("b"):
        assert torch.equal(kit.run(twin, inputs), kit.run(model, inputs))


def test_tied_weights_stay_tied() -> None:
    model, _, host = kit.woven("llama-tied", "full")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    host.close()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_base_checkpoint_of_a_woven_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Base keys keep their names, so a base checkpoint loads into a woven model and changes no module."""
    model, inputs, host = kit.woven("bert", "lora")
    bare, _ = zoo.make("bert", seed=3)
    missing, unexpected = model.load_state_dict(bare.state_dict(), strict=False)
    assert not unexpected and all("intarsia" in key for key in missing)
    assert torch.equal(kit.run(model, inputs), kit.run(bare, inputs))
    host.close()
