"""Reading peft's folders: the logits are those of the weights the files stand for, and nothing is ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intarsia.errors import IntarsiaError, ModuleError, StoreError
from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import Report, read_peft, write_peft
from tests.shared import shared
from tests.store.peers import applied, inputs, logits, tiny

FAMILIES = ("bert", "llama", "t5")
METHODS = ("lora", "lora_dora", "lora_rslora_bias", "lora_lorabias", "adalora", "ia3", "loha", "lokr", "lokr_full", "vera", "oft", "boft", "hra",
           "miss", "fourierft", "c3a", "delora", "gralora", "road", "hira", "ln_tuning", "shira")  # fmt: skip


def sample(name: str) -> Path:
    return shared(f"fixtures/peft/{name}")


def read(folder: Path, family: str, with_weights: bool = True) -> tuple[Module, Report]:
    model = tiny(family)
    return read_peft(folder, sites=resolve(model), base=fingerprint(model), weights=model.state_dict() if with_weights else None)


def spoken(module: Module, family: str) -> Tensor:
    """Logits of the module on the tiny model, after a way through its file."""
    host = Host(tiny(family)).insert(loads(dumps(module)))
    with host.using(module.name):
        return logits(host.model, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_file(method: str, family: str) -> None:
    folder = sample(f"{family}_{method}")
    module, report = read(folder, family)
    assert report.complete and report.carried > 0
    want = logits(applied(tiny(family), folder, method), family)
    assert not torch.allclose(want, logits(tiny(family), family), atol=1e-3), "the sample does nothing"
    torch.testing.assert_close(spoken(module, family), want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)


def with_rows(model: Any, family: str) -> Tensor:
    """Logits of a text with the tokens that the samples train."""
    ids = torch.tensor([[1, 9, 5, 7, 12], [5, 5, 20, 1, 30]])
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if family == "t5" else {})).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_an_embedding_and_back(family: str, tmp_path: Path) -> None:
    folder = sample(f"{family}_trainable_tokens")
    module, report = read(folder, family)
    assert report.complete and report.carried == len(load_file(folder / "adapter_model.safetensors"))
    assert module.n_parameters == 3 * 32, "only the rows"
    want = with_rows(applied(tiny(family), folder, "trainable_tokens"), family)
    assert not torch.allclose(want, with_rows(tiny(family), family), atol=1e-3), "the sample does nothing"
    model = tiny(family)
    write_peft(module, tmp_path / "out", sites=resolve(model), weights=model.state_dict(), task_type="CAUSAL_LM")
    theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all(torch.allclose(t, ours[key], atol=1e-6) for key, t in theirs.items())
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["token_indices"] == [1, 5, 7]
    for found in (module, read(tmp_path / "out", family)[0]):
        host = Host(tiny(family)).insert(loads(dumps(found)))
        with host.using(found.name):
            torch.testing.assert_close(with_rows(host.model, family), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("indices", "message"), [([1, 5], "3"), ([1, 5, 99], "no list of rows"), ([1, 5, 5], "different rows"), ({"a": 1}, "no list of rows")])
def test_rows_that_do_not_fit(indices: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, "llama_trainable_tokens", token_indices=indices), "llama")


def test_tied_rows_must_agree(tmp_path: Path) -> None:
    other: dict[str, Tensor | None] = {"base_model.model.shared.trainable_tokens_delta": torch.ones(3, 32)}
    with pytest.raises(ModuleError, match="tied to it"):
        read(edited(tmp_path, "t5_trainable_tokens", other), "t5")


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning_mlp"])
def test_prompts_of_a_decoder(kind: str) -> None:
    folder = sample(f"llama_{kind}")
    module, report = read(folder, "llama")
    assert report.complete
    model, ids = tiny("llama"), inputs("llama")["input_ids"]
    prompt = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
        want = model(inputs_embeds=embeds).logits[:, len(prompt) :]
    torch.testing.assert_close(spoken(module, "llama"), want, atol=1e-5, rtol=1e-5)


def test_prefix_tensors_stand_where_peft_has_them() -> None:
    """Layer, key or value, head, position, feature: position-free numbers, so that a swapped axis shows."""
    module, report = read(sample("llama_prefix"), "llama")
    flat = load_file(sample("llama_prefix") / "adapter_model.safetensors")["prompt_embeddings"]
    assert report.notes and "positions" in report.notes[0]
    for layer in range(2):
        for which, leaf in enumerate(("keys", "values")):
            ours = module.tensors[f"{layer}.attn.mem/prefix.{leaf}"]
            for head in range(2):
                start = ((2 * layer + which) * 2 + head) * 8
                assert torch.equal(ours[head], flat[:, start : start + 8])
    spoken(module, "llama")


def test_a_head_without_the_base_is_left_out_and_said() -> None:
    module, report = read(sample("bert_lora"), "bert", with_weights=False)
    assert len(report.left_out) == 2 and all("weights=model.state_dict()" in text for text in report.left_out)
    assert not any("saved" in key for key in module.tensors)


def test_a_model_without_the_saved_head() -> None:
    """The file was made on a model with `bert.` in front of its paths and a classifier; the base model has neither."""
    model = tiny("bert").bert
    module, report = read_peft(sample("bert_lora"), sites=resolve(model), base=fingerprint(model))
    assert len(report.left_out) == 2 and all("classifier" in text for text in report.left_out)
    assert "0.attn.q/lora.factor.up" in module.tensors
    Host(model).insert(module)


def edited(tmp_path: Path, source: str, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
    """A copy of a sample with other fields or tensors (None removes one)."""
    folder = tmp_path / "copy"
    shutil.copytree(sample(source), folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    found = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**found, **config}))
    if tensors is not None:
        now = {**load_file(folder / "adapter_model.safetensors"), **tensors}
        save_file({k: t for k, t in now.items() if t is not None}, folder / "adapter_model.safetensors")
    return folder


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("config", "message"), [
    ({"use_qalora": True}, "use_qalora='True' changes"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"a_new_field": 1}, "no field 'a_new_field'"), ({"peft_type": "LORE"}, "did you mean 'LORA'"), ({"init_lora_weights": "loftq"}, "changes the base's own weights"),
    ({"r": 8}, "rank 8"), ({"rank_pattern": {".*q_proj": 2}}, "regular expression"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks 2 of 6 layers"),
])  # fmt: skip
def test_what_the_reader_does_not_know_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, "llama_lora", **config), "llama")


@pytest.mark.parametrize(("tensors", "message"), [
    ({f"{QUERY}.lora_B.weight": None}, "lack their partner: lora_A.weight"),
    ({f"{QUERY}.lora_C.weight": torch.ones(1)}, "does not have.*lora_C"),
    ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, "1 of 9 tensors are for modules that"),
    ({"base_model.extra": torch.ones(1)}, "belong to no layer"),
    ({"base_model.model.elsewhere.weight": torch.ones(1)}, "1 of 9 tensors are for modules that"),
    ({f"{QUERY}.lora_B.weight": torch.full((32, 4), float("nan"))}, "NaN"),
])  # fmt: skip
def test_no_tensor_is_ignored(tmp_path: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ModuleError, match=message):
        read(edited(tmp_path, "llama_lora", tensors), "llama")


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor | None] = {
        f"{QUERY}.lora_A.weight": torch.randn(2, 32, generator=generator), f"{QUERY}.lora_B.weight": torch.randn(32, 2, generator=generator)
    }
    folder = edited(tmp_path, "llama_lora", tensors, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}, lora_alpha=5)
    module, _ = read(folder, "llama")
    assert len(module.method.patches) == 3, "ranks and scales differ, so the patches do"
    want = logits(applied(tiny("llama"), folder, "lora"), "llama")
    torch.testing.assert_close(spoken(module, "llama"), want, atol=1e-5, rtol=1e-5)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = edited(tmp_path, "llama_lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(StoreError, match=r"pickle.*weights_only=True"):
        read(folder, "llama")


def test_named_adapters_lie_in_sub_folders(tmp_path: Path) -> None:
    edited(tmp_path, "llama_lora")
    with pytest.raises(StoreError, match="sub-folders: copy"):
        read(tmp_path, "llama")


def test_the_wrong_model_is_refused() -> None:
    with pytest.raises(ModuleError, match="is this the model"):
        read(sample("llama_lora"), "bert")


@pytest.mark.parametrize("damage", ["{", "[]", '{"peft_type": "LORA", "r": NaN}'])
def test_a_damaged_configuration(tmp_path: Path, damage: str) -> None:
    folder = edited(tmp_path, "llama_lora")
    (folder / "adapter_config.json").write_text(damage)
    with pytest.raises(ModuleError):
        read(folder, "llama")


def test_truncated_weights(tmp_path: Path) -> None:
    folder = edited(tmp_path, "llama_lora")
    data = (folder / "adapter_model.safetensors").read_bytes()
    for length in (0, 4, 9, len(data) // 2, len(data) - 1):
        (folder / "adapter_model.safetensors").write_bytes(data[:length])
        with pytest.raises(IntarsiaError):
            read(folder, "llama")
