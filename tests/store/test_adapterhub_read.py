"""Reading AdapterHub's folders: the reference outputs beside the samples are ours, and what is not read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaModel

from intarsia.errors import ModuleError, StoreError
from intarsia.host import Host
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import read_adapterhub
from tests.shared import shared
from tests.store.adapterhub import CASES, FAST, case, copied_to, error, outputs, read, unpickled

MATRIX = [pytest.param(a, kind, marks=() if a == "bert" or (a, kind) in FAST else pytest.mark.slow) for a, kind in CASES]


@pytest.mark.parametrize(("architecture", "name"), MATRIX)
def test_outputs_are_the_reference(name: str, architecture: str, tmp_path: Path) -> None:
    folder = unpickled(case(architecture, name), tmp_path / name)
    module, report = read(folder, architecture, subtract=False if name == "direft" else None)
    assert report.complete and report.carried == len(load_file(folder / "adapter.safetensors"))
    off, effect = error(architecture, name, module)
    assert effect > 1e-2, "the sample does nothing"
    assert off < 1e-5


def test_pickles_are_refused() -> None:
    with pytest.raises(StoreError, match="pickle"):
        read(case("bert", "mam"), "bert")


def test_a_network_behind_a_prefix_is_kept(tmp_path: Path) -> None:
    module, _ = read(unpickled(case("bert", "prefix_tuning"), tmp_path / "x"), "bert")
    assert module.tensors["tied/prefix.attn.embedding"].shape == (4, 32) and module.tensors["1.attn.mem/prefix.weight"].shape == (64, 12)


def test_a_decoder_s_edits_are_said() -> None:
    """adapters edits what a decoder has generated too; here a call says how long its prompt is."""
    assert any("only those of its prompt" in note for note in read(case("t5", "loreft"), "t5")[1].notes)


def test_an_edit_without_constraint_says_what_the_file_does_not() -> None:
    assert any("DiReFT" in note for note in read(case("bert", "direft"), "bert")[1].notes)
    assert not any("DiReFT" in note for note in read(case("bert", "direft"), "bert", subtract=False)[1].notes)
    assert not any("DiReFT" in note for note in read(case("bert", "loreft"), "bert")[1].notes)


def test_a_task_adapter_may_name_an_invertible_one_that_it_has_not(tmp_path: Path) -> None:
    folder = copied_to(case("bert", "seq_bn_inv"), tmp_path / "x")
    tensors = {key: t for key, t in load_file(folder / "adapter.safetensors").items() if "invertible" not in key}
    save_file(tensors, folder / "adapter.safetensors")
    module, report = read(folder, "bert")
    assert len(report.notes) == 1 and not any(key.startswith("tied") for key in module.tensors)
    save_file({**tensors, "invertible_adapters.seq_bn_inv.F.0.weight": torch.ones(8, 16)}, folder / "adapter.safetensors")
    with pytest.raises(ModuleError, match="expected"):
        read(folder, "bert")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_a_published_file_of_an_older_version() -> None:
    """XLM-T's sentiment adapter (2021): a task adapter that names an invertible one and has none, and a head of two layers."""
    model = XLMRobertaModel(XLMRobertaConfig(vocab_size=50, num_hidden_layers=12, intermediate_size=16, max_position_embeddings=40, type_vocab_size=1)).eval()
    folder = shared("fixtures/adapterhub_published_xlmt/models/adapters/xlm-t-sentiment")
    module, report = read_adapterhub(folder, sites=resolve(model), base=fingerprint(model), config=model.config, allow_pickle=True)
    assert report.complete and report.carried == 52 and module.labels == ("Neg", "Neu", "Pos") and len(report.notes) == 1
    host = Host(model).insert(module)
    with host.using(module.name), torch.no_grad():
        assert model(input_ids=torch.tensor([[0, 5, 6, 2]])).logits.shape == (1, 3)


LEGACY_NAMES = {"output.adapters": "output.layer_text_task_adapters", "attention.output.adapters": "attention.output.attention_text_task_adapters",
                "invertible_adapters": "invertible_lang_adapters"}  # fmt: skip


def test_older_names_and_fields(tmp_path: Path) -> None:
    """The same module from a file as adapter-transformers 1 wrote it."""
    folder = copied_to(case("bert", "double_seq_bn_inv"), tmp_path / "x")
    tensors = load_file(folder / "adapter.safetensors")
    for new, old in sorted(LEGACY_NAMES.items(), key=lambda pair: -len(pair[0])):
        tensors = {key.replace(new, old) if old not in key else key: t for key, t in tensors.items()}
    raw = json.loads((folder / "adapter_config.json").read_text())
    config = {key: raw["config"][key] for key in ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor", "original_ln_before")}
    config["invertible_adapter"] = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    del raw["version"]
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "config": config, "type": "text_lang"}))
    save_file(tensors, folder / "adapter.safetensors")
    assert any("layer_text_task_adapters" in key for key in tensors) and any("attention_text_task_adapters" in key for key in tensors)
    old, new = read(folder, "bert")[0], read(case("bert", "double_seq_bn_inv"), "bert")[0]
    assert old.method.patches == new.method.patches and old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(t, old.tensors[key]) for key, t in new.tensors.items())


def test_a_lora_that_was_never_scaled(tmp_path: Path) -> None:
    folder = copied_to(case("bert", "lora"), tmp_path / "x")
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "version": "adapters.1.0.1"}))
    module, report = read(folder, "bert")
    assert [patch.op.scale for patch in module.method.patches] == [1.0] and "without the scale" in report.notes[0]  # type: ignore[attr-defined]
    assert read(case("bert", "lora"), "bert")[0].method.patches[0].op.scale == 2.0  # type: ignore[attr-defined]


def edited(tmp_path: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None, sample: str = "seq_bn", **top: Any) -> Path:
    folder = copied_to(case("bert", sample), tmp_path / sample)
    found = json.loads((folder / "adapter_config.json").read_text())
    found = {**found, **top, "config": {**found["config"], **(config or {})}}
    (folder / "adapter_config.json").write_text(json.dumps(found))
    if tensors is not None:
        save_file({**load_file(folder / "adapter.safetensors"), **tensors}, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(("config", "message"), [
    ({"a_new_field": 1}, "no field 'a_new_field'"), ({"residual_before_ln": "post_add"}, "post_add"), ({"non_linearity": "gleu"}, "'gleu'"),
    ({"scaling": "channel"}, "channel"), ({"architecture": "mtl_lora"}, "mtl_lora"), ({"ln_after": True}, "adapter_norm_after"),
    ({"inv_adapter": "glow", "inv_adapter_reduction_factor": 2}, "no model ran with it"),
])  # fmt: skip
def test_fields_are_not_ignored(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, config), "bert")


@pytest.mark.parametrize(("sample", "config", "message"), [
    ("dora", {"use_gating": True}, "gated DoRA"), ("ia3", {"use_gating": True}, "gated"), ("lora", {"composition_mode": "other"}, "composition_mode"),
    ("loreft", {"output_reft": False}, "output_reft"), ("vera", {"vera_b": None, "vera_d": None}, "expected the tensors"),
])  # fmt: skip
def test_settings_that_have_no_equal(sample: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, config, sample=sample), "bert")


def test_tensors_are_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="1 tensors that its configuration does not explain"):
        read(edited(tmp_path, tensors={"encoder.layer.0.output.adapters.other.x": torch.ones(1)}), "bert")


def test_layers_that_the_model_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=r"7\.ffn"):
        read(edited(tmp_path, tensors={"encoder.layer.7.output.adapters.seq_bn.adapter_up.bias": torch.ones(32)}), "bert")


def test_what_is_no_configuration(tmp_path: Path) -> None:
    for number, top in enumerate(({"config": []}, {"version": 3}, {"other": 1}, {"name": ""})):
        with pytest.raises(ModuleError):
            folder = edited(tmp_path / str(number))
            raw = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**raw, **top}))
            read(folder, "bert")


def test_a_prompt_s_outputs_are_those_of_the_text() -> None:
    module, report = read(case("xlmr", "prompt_tuning"), "xlmr") if (case("xlmr", "prompt_tuning") / "adapter.safetensors").exists() else (None, None)
    assert module is not None and report is not None and any("in front of them" in note for note in report.notes)
    given = load_file(case("xlmr", "inputs.safetensors"))
    assert outputs("xlmr", module, given).last_hidden_state.shape[:2] == given["input_ids"].shape
