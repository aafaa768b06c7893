"""Writing AdapterHub's folders: samples return tensor by tensor and field by field; modules of ours return with their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from intarsia.errors import ModuleError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.sites import resolve
from intarsia.store.convert import read_adapterhub, write_adapterhub
from tests import zoo
from tests.host.kit import disturb, run
from tests.store.test_adapterhub_read import ARCHITECTURES, cached, case, read

CASES = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_gated", "seq_bn_leaveout_rfmap", "lora", "lora_all", "ia3")
#: fields that say how a training began or went, which a module does not keep
_TRAINING = ("init_weights",)


def write(module: Module, model: Any, folder: Path) -> Any:
    return write_adapterhub(module, folder, sites=resolve(model), model_type=model.config.model_type)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_samples_return(name: str, architecture: str, tmp_path: Path) -> None:
    if architecture == "llama" and name in ("lora_all", "ia3"):
        pytest.skip("adapters swaps the feed-forward layers of LLaMA")
    folder = case(architecture, name)
    module, _ = read(folder, architecture)
    assert write(module, cached(architecture), tmp_path / "out").complete
    theirs, ours = (load_file(p / "adapter.safetensors") for p in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    theirs, ours = (json.loads((p / "adapter_config.json").read_text()) for p in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert {k: theirs[k] for k in ("hidden_size", "model_type", "name", "model_class")} == {k: ours[k] for k in ("hidden_size", "model_type", "name", "model_class")}
    for key, value in theirs["config"].items():
        if key not in _TRAINING and not (key == "reduction_factor" and isinstance(value, dict)):
            assert ours["config"][key] == value, key
    assert read(tmp_path / "out", architecture)[0] == module


SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pfeiffer", {"reduction": 4}), ("pfeiffer", {"width": 5, "norm": "in", "activation": "gelu"}), ("houlsby", {"width": 4, "norms": False}),
    ("houlsby", {"width": 4, "norms": False, "norm": "both", "residual": "inside"}), ("lora", {"rank": 3, "alpha": 5.0}),
    ("lora", {"rank": 2, "at": "attn.{q,k,v}", "layers": "1"}), ("pfeiffer", {"layers": "0", "learn_scale": True}),
)  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_ours_there_and_back(method: str, settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    model, inputs = zoo.make(family)
    settings = {**settings, "at": "attn.{q,v}"} if method == "lora" and "at" not in settings else settings
    host = Host(model).add("m", build(method, **settings))
    disturb(host, "m", 2)
    write(host.extract("m"), model, tmp_path / "out")
    back, report = read_adapterhub(tmp_path / "out", sites=host.sites, base=host.fingerprint)
    assert report.complete
    host.insert(back, name="back")
    with host.using("m"):
        want = run(model, inputs)
    with host.using("back"):
        torch.testing.assert_close(run(model, inputs), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("method", "settings", "message"), [
    ("houlsby", {}, "no bottleneck here"), ("ia3", {}, "only one method"), ("compacter", {"width": 8}, "shared"), ("lora", {"at": "attn.o"}, "only q, k and v"),
    ("dora", {}, "no bottleneck here"), ("houlsby", {"at": "attn.q", "norms": False}, "no bottleneck here"), ("prefix", {}, "shared"),
])  # fmt: skip
def test_what_has_no_form_is_refused_and_nothing_is_written(method: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = zoo.make("bert")
    host = Host(model).add("m", build(method, **settings))
    with pytest.raises(ModuleError, match=message):
        write(host.extract("m"), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["bert", "xlmr", "gpt2", "llama"])
def test_a_plain_prefix_returns(architecture: str, tmp_path: Path) -> None:
    """There is no safetensors sample: ours, back with its outputs, and every field of the pickled sample's configuration."""
    model = cached(architecture)
    host = Host(model).add("m", build("prefix", length=4, reparameterise=None))
    try:
        disturb(host, "m", 2)
        module = host.extract("m")
        write(module, model, tmp_path / "out")
    finally:
        host.close()
    again = read(tmp_path / "out", architecture)[0]
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in module.tensors.items())
    theirs, ours = (json.loads((p / "adapter_config.json").read_text()) for p in (case(architecture, "prefix_tuning_flat"), tmp_path / "out"))
    assert theirs["config"] == ours["config"]


def test_a_parallel_adapter_of_a_pre_norm_model_reads_something_else(tmp_path: Path) -> None:
    model, _ = zoo.make("llama")
    host = Host(model).add("m", build("parallel", reduction=4))
    with pytest.raises(ModuleError, match="reads 'reads'"):
        write(host.extract("m"), model, tmp_path / "out")


def test_names_that_would_break_keys(tmp_path: Path) -> None:
    model, _ = zoo.make("bert")
    module = Host(model).add("m", build("pfeiffer")).extract("m").rename("a.b")
    with pytest.raises(ModuleError, match="every key"):
        write(module, model, tmp_path / "out")
