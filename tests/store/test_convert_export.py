"""A weighted sum of LoRA modules as one LoRA folder does what the expression does, without patterns that servers do not read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from intarsia.errors import ModuleError, StoreError, UsageError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.patches import Head
from intarsia.store.convert import export_lora, read_peft
from tests.host.kit import disturb
from tests.store.peers import logits, tiny
from tests.store.test_peft_write import spoken_by_peft


def two(family: str, a: Any = None, b: Any = None) -> tuple[Host, Module, Module]:
    host = Host(tiny(family))
    for seed, name, method in ((1, "a", a or build("lora", rank=3, at="attn.{q,v}")), (2, "b", b or build("rslora", rank=2, alpha=5.0, at="attn.q, ffn.up"))):
        host.add(name, method)
        disturb(host, name, seed, 0.3)
    return host, host.extract("a"), host.extract("b")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_the_folder_does_what_the_expression_does(family: str, tmp_path: Path) -> None:
    host, a, b = two(family)
    report = export_lora([a, b], [0.6, -0.4], tmp_path / "out", sites=host.sites, task_type=None)
    assert report.complete, report
    with host.using("0.6*a - 0.4*b"):
        want = logits(host.model, family)
    with host.using(None):
        assert float((logits(host.model, family) - want).abs().max()) > 1e-3
    back, _ = read_peft(tmp_path / "out", sites=host.sites, base=host.fingerprint)
    host.insert(back, name="back")
    with host.using("back"):
        torch.testing.assert_close(logits(host.model, family), want, atol=1e-5, rtol=1e-5)
    if importlib.util.find_spec("peft") is not None:
        torch.testing.assert_close(spoken_by_peft(tmp_path / "out", family), want, atol=1e-5, rtol=1e-5)


def test_one_rank_and_no_patterns(tmp_path: Path) -> None:
    host, a, b = two("llama")
    report = export_lora([a, b], [1.0, 2.0], tmp_path / "out", sites=host.sites, base_name="some/base")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == config["lora_alpha"] == 5
    assert not config["use_rslora"] and config["target_modules"] == ["q_proj", "up_proj", "v_proj"] and config["base_model_name_or_path"] == "some/base"
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {5}
    assert any("max-lora-rank" in note for note in report.notes)


def test_a_head_is_left_out_and_said(tmp_path: Path) -> None:
    host, a, b = two("bert", build("lora", rank=2).with_head(Head(("x", "y"))))
    report = export_lora([a, b], [1.0, 1.0], tmp_path / "out", sites=host.sites)
    assert any("head of 'a'" in text for text in report.left_out)


@pytest.mark.parametrize("method", ["dora", "ia3", "pfeiffer", "ln", "hira"])
def test_what_is_no_lora_is_refused_and_nothing_is_written(method: str, tmp_path: Path) -> None:
    host, a, b = two("bert", b=build(method))
    with pytest.raises(ModuleError):
        export_lora([a, b], [0.5, 0.5], tmp_path / "out", sites=host.sites)
    assert not (tmp_path / "out").exists()


def test_weights_and_folders_are_checked(tmp_path: Path) -> None:
    host, a, b = two("llama")
    with pytest.raises(UsageError, match="2 modules and 1 weights"):
        export_lora([a, b], [0.5], tmp_path / "out", sites=host.sites)
    export_lora([a, b], [0.5, 0.5], tmp_path / "out", sites=host.sites)
    with pytest.raises(StoreError, match="already holds"):
        export_lora([a, b], [0.5, 0.5], tmp_path / "out", sites=host.sites)


def served(folder: Path, family: str, limit: int) -> torch.Tensor:
    """Logits of a server that reads what vLLM reads of a folder: three fields and two names of tensors, everything else refused."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= limit and not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none" and isinstance(config["target_modules"], list)
    tensors = load_file(folder / "adapter_model.safetensors")
    model = tiny(family)
    done = set()
    for key, down in tensors.items():
        path, _, which = key.removeprefix("base_model.model.").rpartition(".lora_")
        assert key.startswith("base_model.model.") and which in ("A.weight", "B.weight"), key
        assert any(path.endswith(f".{name}") for name in config["target_modules"])
        if which == "A.weight":
            up = tensors[key.replace("lora_A", "lora_B")]
            assert down.shape[0] == up.shape[1] == config["r"]
            layer = model.get_submodule(path)
            change = config["lora_alpha"] / config["r"] * up @ down
            layer.weight.data += change.T if type(layer).__name__ == "Conv1D" else change
            done.add(path)
    assert 2 * len(done) == len(tensors)
    return logits(model, family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_server_of_loras_does_what_the_expression_does(family: str, tmp_path: Path) -> None:
    host, a, b = two(family)
    export_lora([a, b], [0.6, -0.4], tmp_path / "out", sites=host.sites, max_rank=16)
    with host.using("0.6*a - 0.4*b"):
        torch.testing.assert_close(served(tmp_path / "out", family, 16), logits(host.model, family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rank_above_the_limit_is_refused_or_cut(family: str, tmp_path: Path) -> None:
    host, a, b = two(family)
    with pytest.raises(ModuleError, match=r"limit; cut it down"):
        export_lora([a, b], [0.6, 0.4], tmp_path / "out", sites=host.sites, max_rank=4)
    assert not (tmp_path / "out").exists()
    report = export_lora([a, b], [0.6, 0.4], tmp_path / "out", sites=host.sites, max_rank=4, cut=True)
    assert any("% of the change is lost" in note for note in report.notes)
    with host.using("0.6*a + 0.4*b"):
        want = logits(host.model, family)
    with host.using(None):
        plain = logits(host.model, family)
    near = served(tmp_path / "out", family, 4)
    assert float((near - want).norm()) < float((plain - want).norm())
    with pytest.raises(UsageError, match="at least 1"):
        export_lora([a, b], [0.6, 0.4], tmp_path / "no", sites=host.sites, max_rank=0)


def test_rows_and_shifts_are_refused(tmp_path: Path) -> None:
    """What servers do not read: embeddings, biases."""
    host = Host(tiny("llama"))
    for name, method in (("a", build("lora", rank=2)), ("b", build("lora", rank=2))):
        host.add(name, method)
        disturb(host, name, 1, 0.3)
    a = host.extract("a")
    export_lora([a, host.extract("b")], [1.0, 1.0], tmp_path / "out", sites=host.sites)
    other = Host(tiny("bert")).add("c", build("bitfit", at="attn.q.bias"))
    disturb(other, "c", 1, 0.3)
    with pytest.raises(ModuleError):
        export_lora([other.extract("c")], [1.0], tmp_path / "no", sites=other.sites)
