"""Reading AdapterHub's folders: the reference outputs beside the samples are ours, and what is not read is refused by name."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from intarsia.errors import ModuleError, StoreError
from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import Report, read_adapterhub
from tests.shared import shared

ARCHITECTURES = ("bert", "xlmr", "gpt2", "llama", "t5")
CASES = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_gated", "seq_bn_leaveout_rfmap", "seq_bn_residual_after_ln", "lora", "lora_all",
         "lora_gated", "ia3", "compacter", "compacterpp", "compacter_own_rule", "loreft", "noreft")  # fmt: skip
#: only pickles exist, because saving safetensors fails there; the test re-saves them, as the refusal tells the user to
PICKLED = ("prefix_tuning_flat", "prefix_tuning", "mam", "double_seq_bn_ln")


@cache
def cached(architecture: str) -> PreTrainedModel:
    return AutoModel.from_pretrained(shared(f"fixtures/adapterhub/{architecture}/base"), attn_implementation="eager").eval()


def case(architecture: str, name: str) -> Path:
    return shared(f"fixtures/adapterhub/{architecture}/{name}")


def read(folder: Path, architecture: str) -> tuple[Module, Report]:
    model = cached(architecture)
    return read_adapterhub(folder, sites=resolve(model), base=fingerprint(model))


def differences(folder: Path, module: Module, architecture: str) -> tuple[float, float]:
    """Largest difference from the reference, and from the base; real tokens only."""
    given = load_file(shared(f"fixtures/adapterhub/{architecture}/inputs.safetensors"))
    want = load_file(case(architecture, folder.name) / "reference.safetensors")["last_hidden_state"]
    if architecture == "t5" and folder.name in ("compacter", "compacterpp"):  # saved from the class with heads, which scales what they read
        want = want * want.shape[-1] ** 0.5
    host = Host(cached(architecture)).insert(loads(dumps(module)))
    try:
        with torch.no_grad(), host.using(module.name):
            got = host.model(**given).last_hidden_state
        with torch.no_grad(), host.using(None):
            base = host.model(**given).last_hidden_state
    finally:
        host.close()
    real = torch.ones(want.shape[:2], dtype=torch.bool) if architecture == "t5" else given["attention_mask"].bool()
    return float((got - want)[real].abs().max()), float((base - want)[real].abs().max())


def copied(tmp_path: Path, architecture: str, name: str) -> Path:
    folder = tmp_path / name
    shutil.copytree(case(architecture, name), folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_reference(name: str, architecture: str) -> None:
    if name in ("loreft", "noreft") and architecture == "t5":
        pytest.skip("test_edits_of_a_decoder")
    folder = case(architecture, name)
    module, report = read(folder, architecture)
    assert report.complete and report.carried == len(load_file(folder / "adapter.safetensors"))
    error, effect = differences(folder, module, architecture)
    assert effect > 1e-2, "the sample does nothing"
    assert error < 2e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PICKLED)
def test_pickles_are_refused_and_read_when_saved_again(name: str, architecture: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="pickle"):
        read(case(architecture, name), architecture)
    folder = copied(tmp_path, architecture, name)
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    if name in ("prefix_tuning_flat", "prefix_tuning", "mam") and architecture == "t5":
        with pytest.raises(ModuleError, match="relative positions"):
            read(folder, architecture)
        return
    module, report = read(folder, architecture)
    assert report.carried == len(tensors)
    error, effect = differences(folder, module, architecture)
    assert effect > 1e-2 and error < 2e-5


@pytest.mark.parametrize(("name", "message"), [
    ("seq_bn_inv", "invertible"), ("dora", "another formula"), ("vera", "VeRA is not read"),
    ("prompt_tuning", "'prompt_tuning' is not read"),
])  # fmt: skip
def test_what_has_no_equal_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises((ModuleError, StoreError), match=message):
        read(case("bert", name), "bert")


def test_edits_of_a_decoder() -> None:
    """adapters edits what a decoder has generated, edits here are of the prompt: the encoder and the start token agree."""
    module, report = read(case("t5", "loreft"), "t5")
    assert any("only those of its prompt" in note for note in report.notes)
    given, want = (load_file(shared("fixtures/adapterhub/t5/" + name)) for name in ("inputs.safetensors", "loreft/reference.safetensors"))
    host = Host(cached("t5")).insert(module)
    try:
        with torch.no_grad(), host.using(module.name):
            got = host.model(**given)
    finally:
        host.close()
    torch.testing.assert_close(got.encoder_last_hidden_state, want["encoder_last_hidden_state"], atol=2e-5, rtol=0)
    torch.testing.assert_close(got.last_hidden_state[:, 0], want["last_hidden_state"][:, 0], atol=2e-5, rtol=0)


def test_an_edit_without_constraint_says_what_the_file_does_not() -> None:
    assert any("DiReFT" in note for note in read(case("bert", "direft"), "bert")[1].notes)
    assert not any("DiReFT" in note for note in read(case("bert", "loreft"), "bert")[1].notes)


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_a_network_behind_a_prefix_is_kept(tmp_path: Path) -> None:
    """The same tensors, and the same outputs when it is made plain."""
    folder = copied(tmp_path, "bert", "prefix_tuning")
    module, _ = read_adapterhub(folder, sites=resolve(cached("bert")), base=fingerprint(cached("bert")), allow_pickle=True)
    assert module.tensors["tied/prefix.attn.embedding"].shape == (4, 32) and module.tensors["1.attn.mem/prefix.weight"].shape == (64, 12)
    host = Host(cached("bert")).insert(module)
    try:
        flat = host.extract(module.name, flatten=True)
    finally:
        host.close()
    assert not any(key.startswith("tied") for key in flat.tensors)
    assert max(differences(folder, found, "bert")[0] for found in (module, flat)) < 2e-5


@pytest.mark.parametrize("architecture", ["bert", "xlmr", "gpt2", "llama"])
def test_a_tagging_head_comes_along(architecture: str) -> None:
    folder = case(architecture, "head_tagging")
    module, report = read(folder, architecture)
    assert report.complete and module.labels == tuple(f"LABEL_{i}" for i in range(5))
    given, want = load_file(folder / "inputs.safetensors"), load_file(folder / "reference.safetensors")["logits"]
    host = Host(cached(architecture)).insert(loads(dumps(module)))
    try:
        with torch.no_grad(), host.using(module.name):
            got = host.model(**given).logits
    finally:
        host.close()
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "message"), [("head_classification", "classification with 2 layers"), ("head_masked_lm", "masked_lm"), ("head_qa", "question_answering")])
def test_other_heads_are_left_out_and_said(name: str, message: str) -> None:
    _, report = read(case("bert", name), "bert")
    assert len(report.left_out) == 1 and message in report.left_out[0]


def edited(tmp_path: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None, **top: Any) -> Path:
    folder = copied(tmp_path, "bert", "seq_bn")
    found = json.loads((folder / "adapter_config.json").read_text())
    found = {**found, **top, "config": {**found["config"], **(config or {})}}
    (folder / "adapter_config.json").write_text(json.dumps(found))
    if tensors is not None:
        save_file({**load_file(folder / "adapter.safetensors"), **tensors}, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(("config", "message"), [
    ({"a_new_field": 1}, "no field 'a_new_field'"), ({"residual_before_ln": "post_add"}, "post_add"), ({"non_linearity": "gleu"}, "'gleu'"),
    ({"scaling": "channel"}, "channel"), ({"architecture": "mtl_lora"}, "mtl_lora"), ({"ln_after": True}, "adapter_norm_after"),
])  # fmt: skip
def test_fields_are_not_ignored(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, config), "bert")


def test_tensors_are_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="1 tensors that its configuration does not explain"):
        read(edited(tmp_path, tensors={"encoder.layer.0.output.adapters.other.x": torch.ones(1)}), "bert")


def test_layers_that_the_model_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=r"7\.ffn"):
        read(edited(tmp_path, tensors={"encoder.layer.7.output.adapters.seq_bn.adapter_up.bias": torch.ones(32)}), "bert")


def test_old_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="save it again"):
        read(edited(tmp_path, version="3.2.1"), "bert")
