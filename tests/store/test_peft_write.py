"""Writing peft's folders: what is read back computes the same, peft itself (where installed) computes the same, samples return byte by byte."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.errors import ModuleError, StoreError
from intarsia.host import Host
from intarsia.methods import METHODS, Method, Patch, build, union
from intarsia.modules import Module
from intarsia.modules.arithmetic import scale
from intarsia.patches import Concat, Head, LowRank, Renorm, Tokens
from intarsia.sites import resolve
from intarsia.store.convert import read_peft, write_peft
from tests.host.kit import disturb
from tests.store.peers import inputs, logits, oracle, tiny
from tests.store.test_peft_read import read, sample

REVERSIBLE = ("lora", "lora_dora", "lora_rslora_bias", "lora_lorabias", "ia3", "loha", "lokr", "oft", "hra", "miss", "fourierft", "c3a", "road",
              "hira", "ln_tuning", "prompt_tuning", "prefix")  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5.0}, "rslora": {"rank": 3}, "dora": {"rank": 3}, "adalora": {"rank": 3}, "ia3": {}, "loha": {"rank": 3},
    "lokr": {"rank": 2, "at": "attn.q"}, "oft": {"block": 8}, "hra": {"count": 4}, "miss": {"rank": 4}, "hira": {"rank": 3}, "c3a": {"block": 8},
    "road": {"group": 8}, "fourierft": {"count": 20, "stream": "torch"}, "ln": {}, "lora_plus": {"rank": 2}, "vera": {"rank": 4, "start": 1.0},
    "gralora": {"rank": 4}, "shira": {"rank": 2}, "boft": {"block": 8}, "bitfit": {"at": "attn.{q,v}.bias"}, "lt_sft": {"density": 0.1, "at": "attn.{q,v}.weight"},
}  # fmt: skip
FAMILIES = ("bert", "gpt2", "llama", "t5")
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
#: GPT-2's queries, keys and values are one layer, of which peft knows no part
FUSED = ("dora", "ia3", "loha", "lokr", "oft", "boft", "hra", "miss", "hira", "c3a", "road", "fourierft", "gralora")


def made(family: str, method: Method) -> tuple[Host, Module]:
    host = Host(tiny(family)).add("m", method)
    disturb(host, "m", 3, 0.3)
    return host, host.extract("m")


def write(module: Module, family: str, folder: Path, **options: Any) -> Any:
    model = tiny(family)
    return write_peft(module, folder, sites=resolve(model), weights=model.state_dict(), task_type=TASKS[family], **options)


def small(name: str, family: str) -> Method:
    settings = dict(SMALL[name])
    if family == "gpt2" and name in FUSED and name != "ia3":
        settings["at"] = "ffn.down"
    return build(name, **settings)


def spoken_by_peft(folder: Path, family: str) -> Tensor:
    import peft

    model = peft.PeftModel.from_pretrained(tiny(family), str(folder)).eval()
    return logits(model, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SMALL)
def test_ours_there_and_back(method: str, family: str, tmp_path: Path) -> None:
    if (family == "gpt2" and method in ("ia3", "bitfit", "shira", "lt_sft")) or (method == "bitfit" and family in ("llama", "t5")):
        pytest.skip("parts of a fused layer are refused (see below); no biases")
    host, module = made(family, small(method, family))
    written = write(module, family, tmp_path / "out")
    assert written.complete, written
    back, report = read_peft(tmp_path / "out", sites=host.sites, base=host.fingerprint, weights=tiny(family).state_dict())
    assert report.complete, report
    host.insert(back, name="back")
    with host.using("m"):
        want = logits(host.model, family)
    with host.using("back"):
        got = logits(host.model, family)
    with host.using(None):
        effect = float((logits(host.model, family) - want).abs().max())
    assert effect > 2e-5, "the module does nothing"
    tolerance = 1e-3 * effect + 1e-6
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    conv1d = family == "gpt2" and method in ("loha", "lokr", "oft", "boft", "hra", "miss", "c3a", "road")
    assert any("Conv1D" in note for note in written.notes) == conv1d
    if importlib.util.find_spec("peft") is not None and not conv1d:
        torch.testing.assert_close(spoken_by_peft(tmp_path / "out", family), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", REVERSIBLE)
def test_samples_return(method: str, family: str, tmp_path: Path) -> None:
    folder = sample(f"{family}_{method}")
    if method == "lora_rslora_bias":
        pytest.skip("written as a LoRA of another alpha: test_rslora_keeps_its_outputs")
    module, _ = read(folder, family)
    write(module, family, tmp_path / "out")
    again, _ = read(tmp_path / "out", family)
    assert again == module, "the module read back is the module"
    if not (method in ("prompt_tuning", "prefix") and family == "t5"):  # half of their rows are never used
        theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (folder, tmp_path / "out"))
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "lora_dora", "lora_lorabias", "oft", "hira", "miss", "fourierft", "c3a", "loha"])
def test_samples_return_byte_by_byte(method: str, tmp_path: Path) -> None:
    """Where nothing is an absolute value: tensors to the byte, and every field of the configuration but the version's own."""
    folder = sample(f"llama_{method}")
    module, _ = read(folder, "llama")
    theirs = json.loads((folder / "adapter_config.json").read_text())
    write(module, "llama", tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    ours = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key.startswith("init_") and key not in ("oft_block_size", "modules_to_save"):
            assert (sorted(ours[key]) if isinstance(value, list) else ours[key]) == (sorted(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("fields", [{"lora_alpha": "x"}, {"modules_to_save": 5}, {"peft_type": {}}, {"rank_pattern": 3}, {"new": 1}], ids=str)
def test_a_cards_word_on_the_configuration_is_not_trusted(fields: dict[str, Any], tmp_path: Path) -> None:
    module, _ = read(sample("bert_lora"), "bert")
    recipe = dict(module.card.recipe)
    spoilt = replace(module, card=replace(module.card, recipe={**recipe, "peft": {**recipe["peft"], **fields}}))  # type: ignore[dict-item]
    write(spoilt, "bert", tmp_path / "out")
    assert read(tmp_path / "out", "bert")[0].tensors.keys() == module.tensors.keys()


def test_rslora_keeps_its_outputs(tmp_path: Path) -> None:
    module, _ = read(sample("bert_lora_rslora_bias"), "bert")
    write(module, "bert", tmp_path / "out")
    again, _ = read(tmp_path / "out", "bert")
    assert {p.op for p in again.method.patches if p.name.startswith("lora")} == {p.op for p in module.method.patches if p.name.startswith("lora")}
    assert all(torch.allclose(t, again.tensors[k], atol=1e-7) for k, t in module.tensors.items())


def test_ranks_and_scales_become_patterns(tmp_path: Path) -> None:
    method = union("lora", build("lora", rank=2, at="attn.q, ffn.up"), build("lora", rank=4, alpha=3.0, at="attn.v", layers="-1:"))
    host, module = made("llama", method)
    write(module, "llama", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["rank_pattern"] == {"model.layers.1.self_attn.v_proj": 4} and config["alpha_pattern"] == {"model.layers.1.self_attn.v_proj": 3}
    assert config["target_modules"] != ["q_proj", "up_proj", "v_proj"], "the first layer's v_proj is none of them"
    back, _ = read(tmp_path / "out", "llama")
    host.insert(back, name="back")
    with host.using("m"):
        want = logits(host.model, "llama")
    with host.using("back"):
        torch.testing.assert_close(logits(host.model, "llama"), want, atol=1e-6, rtol=1e-6)


def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    _, module = made("bert", build("lora", rank=2))
    for name in "ab":
        write(module, "bert", tmp_path / name)
    assert all((tmp_path / "a" / p.name).read_bytes() == (tmp_path / "b" / p.name).read_bytes() for p in (tmp_path / "a").iterdir())


def test_parts_of_a_fused_layer_are_refused(tmp_path: Path) -> None:
    _, module = made("gpt2", build("ia3"))
    with pytest.raises(ModuleError, match=r"c_attn.*no single IA3"):
        write(module, "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SMALL])
def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(method: str, tmp_path: Path) -> None:
    from tests.host.kit import small as any_small

    _, module = made("bert", any_small(method))
    if method == "prompt":
        assert any("first token" in note for note in write(module, "bert", tmp_path / "out").notes)
        return
    if method in ("child_tuning_d", "spiel"):  # entries, as SHiRA has them
        assert write(module, "bert", tmp_path / "out").kind == "SHIRA"
        return
    if method in ("p_tuning_v2",):
        assert write(module, "bert", tmp_path / "out").notes
        return
    with pytest.raises(ModuleError):
        write(module, "bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_behind_the_norm_is_refused(tmp_path: Path) -> None:
    _, module = made("bert", Method("prompt", (Patch("prompt", "seq", Tokens(3, "start", behind=True), Concat(), "seq"),)))
    with pytest.raises(ModuleError, match="behind=False"):
        write(module, "bert", tmp_path / "out")


@pytest.mark.parametrize("form", [Renorm(LowRank(2), whole=True, scaled_norm=False), Renorm(LowRank(2), whole=True), Renorm(LowRank(2), scaled_norm=False)])
def test_another_dora_is_refused(form: Renorm, tmp_path: Path) -> None:
    """AdapterHub's scales the bias with the rows and leaves alpha / r out of the norm."""
    _, module = made("bert", Method("dora", (Patch("dora", "attn.q", form),)))
    with pytest.raises(ModuleError, match="has no form in peft"):
        write(module, "bert", tmp_path / "out")


@pytest.mark.parametrize("method", [build("ln"), build("bitfit", at="attn.{q,v}.bias"), build("lt_sft", density=1.0, at="embed.weight")], ids=lambda m: m.name)
def test_two_changes_of_one_parameter_are_refused(method: Method, tmp_path: Path) -> None:
    _, module = made("bert", union("twice", method, method))
    with pytest.raises(ModuleError, match="two patches"):
        write(module, "bert", tmp_path / "out")


def test_two_patches_of_one_layer_are_added_up_first(tmp_path: Path) -> None:
    method = union("two", build("lora", rank=2, at="attn.q"), build("lora", rank=3, at="attn.q"))
    host, module = made("llama", method)
    with pytest.raises(ModuleError, match=r"arithmetic\.scale"):
        write(module, "llama", tmp_path / "out")
    write(scale(module, 1.0), "llama", tmp_path / "out")
    back, _ = read(tmp_path / "out", "llama")
    host.insert(back, name="back")
    with host.using("m"):
        want = logits(host.model, "llama")
    with host.using("back"):
        torch.testing.assert_close(logits(host.model, "llama"), want, atol=1e-6, rtol=1e-6)


def test_a_head_and_label_names_are_left_out_and_said(tmp_path: Path) -> None:
    _, module = made("bert", build("lora", rank=2).with_head(Head(("x", "y"))))
    report = write(module, "bert", tmp_path / "out")
    assert not report.complete and any("head" in text for text in report.left_out) and any("label names (x, y)" in text for text in report.left_out)


@pytest.mark.parametrize("standardise", [False, True])
def test_a_token_head_becomes_the_models_own(standardise: bool, tmp_path: Path) -> None:
    """`modules_to_save`: linear over every token, as the class with that head has it."""
    model = oracle("tiny").bert(oracle("tiny").BertForTokenClassification)
    host = Host(model).add("m", build("lora", rank=2).with_head(Head(("x", "y", "z"), "token", standardise=standardise)))
    disturb(host, "m", 3, 0.3)
    module = host.extract("m")
    if standardise:
        moved = {"logits/head.mean": torch.linspace(-1, 1, 32), "logits/head.scale": torch.linspace(0.5, 2, 32)}
        module = replace(module, name="n", tensors={**module.tensors, **moved})
        host.remove("m").insert(module, name="m")
    write_peft(module, tmp_path / "out", sites=host.sites, weights=model.state_dict(), task_type="TOKEN_CLS")
    assert "classifier" in json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"]
    back, report = read_peft(tmp_path / "out", sites=host.sites, base=host.fingerprint, weights=model.state_dict())
    assert report.complete
    host.insert(back, name="back")
    with host.using("m"):
        want = logits(host.model, "bert")
    with host.using("back"):
        torch.testing.assert_close(logits(host.model, "bert"), want, atol=1e-5, rtol=1e-5)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    _, module = made("bert", build("lora", rank=2))
    write(module, "bert", tmp_path / "out")
    with pytest.raises(StoreError, match="already holds"):
        write(module, "bert", tmp_path / "out")


def test_another_model_is_refused(tmp_path: Path) -> None:
    _, module = made("llama", build("lora", rank=2, at="ffn.gate"))
    with pytest.raises(ModuleError, match="does not fit this model"):
        write(module, "bert", tmp_path / "out")


def test_inputs_reach_every_family() -> None:
    assert all(inputs(family)["input_ids"].shape == (2, 8) for family in FAMILIES)
