"""AdapterHub's heads: reference logits, there and back, and by name what no head of ours can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from intarsia.errors import ModuleError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.patches import Add, Biaffine, Head, LanguageModelHead
from intarsia.store.convert import read_adapterhub, write_adapterhub
from tests import zoo
from tests.host.kit import disturb, run
from tests.store.adapterhub import case, copied_to, hosted, outputs, read, weights

KINDS = {"head_tagging": ("bert", "xlmr", "gpt2", "llama"), "head_classification": ("bert", "xlmr", "gpt2", "llama"), "head_multilabel": ("bert", "xlmr", "gpt2", "llama"),
         "head_causal_lm": ("bert", "xlmr", "gpt2", "llama"), "head_masked_lm": ("bert", "xlmr"), "head_masked_lm_inv": ("bert", "xlmr"),
         "head_seq2seq_lm": ("t5",), "head_seq2seq_lm_inv": ("t5",)}  # fmt: skip
FAST = {("gpt2", "head_multilabel"), ("llama", "head_causal_lm"), ("llama", "head_classification"), ("t5", "head_seq2seq_lm_inv")}
MATRIX = [pytest.param(a, kind, marks=() if a == "bert" or (a, kind) in FAST else pytest.mark.slow) for kind, where in KINDS.items() for a in where]


def write(module: Module, folder: Path, architecture: str, **options: Any) -> Any:
    host = hosted(architecture)
    settings = {"weights": weights(architecture), "config": host.model.config, **options}
    return write_adapterhub(module, folder, sites=host.sites, model_type=host.model.config.model_type, **settings)


@pytest.mark.parametrize(("architecture", "name"), MATRIX)
def test_logits_are_the_reference_and_files_return(architecture: str, name: str, tmp_path: Path) -> None:
    folder = case(architecture, name)
    module, report = read(folder, architecture)
    assert report.complete
    given, want = load_file(folder / "inputs.safetensors"), load_file(folder / "reference.safetensors")["logits"]
    got = outputs(architecture, module, given).logits
    real = given["attention_mask"].bool() if want.dim() == 3 and architecture != "t5" else torch.ones(want.shape[:-1], dtype=torch.bool)
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    written = write(module, tmp_path / "out", architecture, name="h")
    assert written.complete
    theirs, ours = (load_file(p / "model_head.safetensors") for p in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all(torch.equal(t, ours[key]) for key, t in theirs.items())
    theirs, ours = (json.loads((p / "head_config.json").read_text()) for p in (folder, tmp_path / "out"))
    assert ours["model_class"] == theirs["model_class"] and ours["name"] == "h" and ours["version"] == theirs["version"]
    changed = {"dropout_prob"} | ({"head_type", "shift_labels"} if (architecture, name) in {("bert", "head_causal_lm"), ("xlmr", "head_causal_lm")} else set())
    assert {k: v for k, v in theirs["config"].items() if k not in changed} == {k: v for k, v in ours["config"].items() if k not in changed}
    again, _ = read(tmp_path / "out", architecture, name=module.name)
    assert again == module


def test_a_matrix_of_its_own_without_the_base_to_compare() -> None:
    host = hosted("bert")
    module, report = read_adapterhub(case("bert", "head_masked_lm"), sites=host.sites, base=host.fingerprint, config=host.model.config)
    assert "logits/head.decoder" in module.tensors and any("weights=" in note for note in report.notes)
    _, without = read_adapterhub(case("bert", "head_masked_lm"), sites=host.sites, base=host.fingerprint, weights=weights("bert"))
    assert "config=model.config" in without.left_out[0]


@pytest.mark.parametrize(("architecture", "name", "message"), [
    ("bert", "head_qa", "question_answering"), ("t5", "head_classification", "pools a t5"), ("t5", "head_qa", "question_answering"),
])  # fmt: skip
def test_other_heads_are_left_out_and_said(architecture: str, name: str, message: str) -> None:
    module, report = read(case(architecture, name), architecture)
    assert len(report.left_out) == 1 and message in report.left_out[0] and module.method.head is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"head_type": "dependency_parsing"}, "means of their pieces"), ({"head_type": "multiple_choice"}, "chooses among texts"), ({"head_type": "tagginG"}, "did you mean"),
    ({"use_pooler": True}, "the model's pooler"), ({"layers": 0}, "0 layers"), ({"num_labels": 2}, "does not number"), ({"layers": 3}, "a head of 3 layers"),
    ({"activation_function": "softsign"}, "softsign"), ({"new": 1}, "fields new are not known"),
])  # fmt: skip
def test_settings_of_heads(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied_to(case("bert", "head_classification"), tmp_path / "x")
    raw = json.loads((folder / "head_config.json").read_text())
    (folder / "head_config.json").write_text(json.dumps({**raw, "config": {**raw["config"], **settings}}))
    try:
        _, report = read(folder, "bert")
    except ModuleError as refusal:
        assert message in str(refusal)
    else:
        assert message in report.left_out[0]


@pytest.mark.parametrize("name", ["seq_bn", pytest.param("lora", marks=pytest.mark.slow), pytest.param("compacter", marks=pytest.mark.slow)])
def test_the_head_of_a_model_class(name: str, tmp_path: Path) -> None:
    """Its values are changes of the class's own parameters, and are written as values."""
    folder = case("bert_static_seqcls", name)
    model = AutoModelForSequenceClassification.from_pretrained(case("bert_static_seqcls", "base")).eval()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    host = Host(model)
    common: dict[str, Any] = {"sites": host.sites, "base": host.fingerprint, "config": model.config}
    module, report = read_adapterhub(folder, weights=state, **common)
    assert report.complete
    host.insert(module)
    given = load_file(case("bert_static_seqcls", "inputs.safetensors"))
    with torch.no_grad(), host.using(module.name):
        torch.testing.assert_close(model(**given).logits, load_file(folder / "reference.safetensors")["logits"], atol=1e-5, rtol=0)
    write_adapterhub(module, tmp_path / "out", sites=host.sites, model_type="bert", weights=state, config=model.config)
    theirs, ours = (load_file(p / "model_head.safetensors") for p in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all(torch.equal(t, ours[key]) for key, t in theirs.items())
    patches = tuple(replace(p, op=Add(0.5)) if p.tag == "head" else p for p in module.method.patches)  # a scale counts
    write_adapterhub(replace(module, method=replace(module.method, patches=patches)), tmp_path / "half", sites=host.sites, model_type="bert", weights=state, config=model.config)
    half = load_file(tmp_path / "half" / "model_head.safetensors")
    assert all(torch.allclose(half[key], (state[key] + t) / 2, atol=1e-6) for key, t in theirs.items())
    raws = [json.loads((p / "head_config.json").read_text()) for p in (folder, tmp_path / "out")]
    assert all(raws[0][key] == raws[1][key] for key in ("config", "name", "num_labels", "label2id", "model_class"))
    assert "weights=" in read_adapterhub(folder, **common)[1].left_out[0]
    assert "has no such parameters" in read(folder, "bert")[1].left_out[0]
    assert "weights=" in write_adapterhub(module, tmp_path / "more", sites=host.sites, model_type="bert").left_out[0]


HEADS = (Head(("x", "y", "z"), "first", dropout=0.0), Head(("x", "y"), "token", layers=2, activation="relu"), Head(("x", "y"), "first", "multi", layers=3),
         Head(("value",), "first", "regression", standardise=False), LanguageModelHead(), LanguageModelHead(dense=False, norm=False, bias=False, tied=False))  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{type(head).__name__}-{getattr(head, 'pooling', head.__class__)}-{getattr(head, 'layers', '')}")
def test_ours_there_and_back(head: Any, tmp_path: Path) -> None:
    model, inputs = zoo.make("bert", headless=True)
    host = Host(model).add("m", build("pfeiffer", reduction=4).with_head(head))
    disturb(host, "m", 2)
    for form in host.forms("m").values():
        if getattr(getattr(form, "spec", None), "standardise", False):
            form.calibrate(torch.randn(9, 32, generator=torch.Generator().manual_seed(3)))  # type: ignore[operator]
    state = {key: t for key, t in model.state_dict().items() if "intarsia" not in key}
    report = write_adapterhub(host.extract("m"), tmp_path / "out", sites=host.sites, model_type="bert", weights=state, config=model.config)
    assert report.complete
    back, report = read_adapterhub(tmp_path / "out", sites=host.sites, base=host.fingerprint, weights=state, config=model.config)
    assert report.complete and back.labels == getattr(head, "labels", None)
    if isinstance(head, Head):
        assert back.method.head is not None and back.method.head.problem == head.problem  # type: ignore[union-attr]
    host.insert(back, name="back")
    with host.using("m"):
        want = run(model, inputs)
    with host.using("back"):
        torch.testing.assert_close(run(model, inputs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("head", "family", "message"), [
    (Head(("x", "y")), "bert", "pools by 'mean'"), (Head(("x", "y"), "first"), "gpt2", "at the last token"), (Biaffine(("a",)), "bert", "Biaffine"),
    (Head(("x", "y"), "token", "multi"), "bert", "'multi'"), (LanguageModelHead(epsilon=1e-5), "bert", "epsilon"), (LanguageModelHead(scale=0.5), "bert", "scales"),
    (Head(("x", "y"), "last"), "qwen2", "no class"),
])  # fmt: skip
def test_heads_that_adapters_has_not(head: Any, family: str, message: str, tmp_path: Path) -> None:
    model, _ = zoo.make(family)
    host = Host(model).add("m", build("pfeiffer", reduction=4).with_head(head))
    state = {key: t for key, t in model.state_dict().items() if "intarsia" not in key}
    report = write_adapterhub(host.extract("m"), tmp_path / "out", sites=host.sites, model_type=model.config.model_type, weights=state, config=model.config)
    assert len([text for text in report.left_out if message in text]) == 1 and not (tmp_path / "out/head_config.json").exists()
