"""Against peft itself: adapters of every kind that it makes are read, answered and written back to the byte, and loaded by it again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from intarsia.errors import ModuleError
from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import Report, read_peft, write_peft
from intarsia.store.convert.peft_config import COMMON, DEFAULTS
from tests.store import live
from tests.store.live import CASES, TASKS

pytest.importorskip("peft", "0.21", reason="peft is an extra of the tests")

#: kinds that peft cannot make on these families, in its own words
IMPOSSIBLE = {
    "lora-olora": ("gpt2",),
    **dict.fromkeys(("loha", "lokr", "lokr-both", "lokr-full", "oft", "oft-exact", "oft-shared", "boft", "boft-butterfly", "hra", "hra-odd", "hra-gs", "miss", "miss-mini", "c3a", "delora", "road", "road-2", "road-4", "shira", "beft", "supertuning"), ("gpt2",)),
    **dict.fromkeys(("prompt", "p-tuning", "p-tuning-lstm"), ("bert",)),
    **dict.fromkeys(("prefix", "prefix-projected"), ("bert", "xlm-roberta-cls")),
}  # fmt: skip
#: read as something else that gives the same outputs, so that the file that is written is another
OTHER = {"lora-pissa", "lora-olora", "lokr-both", "pvera", "miss-mini", "hra-gs", "delora", "road-2", "road-4", "vblora"}
#: not written at all
UNWRITTEN = {"randlora", "llama-adapter"}
#: where peft's outputs are others, for the reason in the report
APART = {
    ("lora-tokens", "bert"): "loses the bias", ("tokens", "bert"): "loses the bias",
    ("lora-embedding", "bert"): "tied to it", ("lora-embedding", "gpt2"): "tied to it",
    ("prompt", "xlm-roberta-cls"): "first position", ("p-tuning", "xlm-roberta-cls"): "first position", ("p-tuning-lstm", "xlm-roberta-cls"): "first position",
}  # fmt: skip
#: files with numbers that nothing reads, in an order or a place of their own
UNREAD = {("prompt", "t5"), ("p-tuning", "t5"), ("p-tuning-lstm", "t5"), ("prefix", "t5"), ("prefix-projected", "t5"), ("lora-embedding", "t5"),
          ("lora-all-biases", "xlm-roberta-cls"), ("supertuning", "bert"), ("supertuning", "xlm-roberta-cls"), ("supertuning", "llama"), ("supertuning", "t5")}  # fmt: skip
MATRIX = [(name, family) for name, case in CASES.items() for family in case.families if family not in IMPOSSIBLE.get(name, ())]
#: one family of each kind
FAST = {(name, families[index % len(families)]) for index, (name, families) in enumerate({n: [f for m, f in MATRIX if m == n] for n in CASES}.items())}


def read(folder: Path, family: str) -> tuple[Module, Report]:
    model, _ = live.base(family)
    return read_peft(folder, sites=resolve(model), base=fingerprint(model), weights=model.state_dict(), model=model)


def write(module: Module, family: str, folder: Path, **options: Any) -> Report:
    model, _ = live.base(family)
    return write_peft(module, folder, sites=resolve(model), weights=model.state_dict(), model=model, **options)


def ours(module: Module, family: str) -> torch.Tensor:
    model, inputs = live.base(family)
    host = Host(model).insert(module)
    with host.using(module.name):
        return live.logits(model, inputs)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want[:, -got.shape[1] :] if want.dim() == 3 else want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)


@pytest.mark.parametrize(("name", "family"), [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in MATRIX])
def test_from_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    want = live.make(CASES[name], family, tmp_path / "theirs")
    model, inputs = live.base(family)
    plain = live.logits(model, inputs)
    assert float((want[:, -plain.shape[1] :] if want.dim() == 3 else want).sub(plain).abs().max()) > 1e-3, "the adapter does nothing"
    module, report = read(tmp_path / "theirs", family)
    assert report.complete and report.carried == len(load_file(tmp_path / "theirs/adapter_model.safetensors"))
    module = loads(dumps(module))
    if (name, family) in APART:
        assert any(APART[name, family] in note for note in report.notes), report.notes
    else:
        close(ours(module, family), want)
    if name in UNWRITTEN:
        with pytest.raises(ModuleError):
            write(module, family, tmp_path / "ours")
        return
    written = write(module, family, tmp_path / "ours")
    assert written.complete, written
    close(live.spoken(tmp_path / "ours", family), want)
    if name not in OTHER and (name, family) not in UNREAD:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), (file, live.differing(tmp_path / "ours", tmp_path / "theirs"))


def test_every_field_has_pefts_own_default() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    needed: dict[str, dict[str, Any]] = {"ADALORA": {"total_step": 1}, "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]}}
    derived = {"num_virtual_tokens", "num_transformer_submodules", *needed["CPT"], *needed["ADALORA"]}
    made = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert DEFAULTS.keys() <= made.keys()
    for kind, ours in DEFAULTS.items():
        theirs = {key: getattr(value, "value", value) for key, value in made[kind](**needed.get(kind, {})).to_dict().items() if key not in COMMON and key != "runtime_config"}
        assert theirs.keys() == ours.keys(), kind
        assert {key: value for key, value in theirs.items() if key not in derived and value != ours[key]} == {}, kind


def test_a_trained_module_is_written_with_the_fields_it_came_with(tmp_path: Path) -> None:
    live.make(CASES["lora-gaussian"], "llama", tmp_path / "theirs")
    module, _ = read(tmp_path / "theirs", "llama")
    other = Module(module.name, module.method, {key: t + 1 for key, t in module.tensors.items()}, module.base, card=module.card)
    write(other, "llama", tmp_path / "ours")
    assert live.differing(tmp_path / "ours", tmp_path / "theirs") == []


def test_a_changed_module_is_not(tmp_path: Path) -> None:
    """Scaled, the fields it came with are no longer what it does."""
    from dataclasses import replace

    from intarsia.patches import Add

    live.make(CASES["lora-gaussian"], "llama", tmp_path / "theirs")
    module, _ = read(tmp_path / "theirs", "llama")
    patches = tuple(replace(patch, op=Add(0.5)) for patch in module.method.patches)
    write(Module("half", replace(module.method, patches=patches), module.tensors, module.base, card=module.card), "llama", tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["lora_alpha"] == 1.5
    fewer = {key: t for key, t in module.tensors.items() if not key.startswith("0.")}
    last = tuple(replace(patch, at="1.attn.{q,v}") for patch in module.method.patches)
    write(Module("last", replace(module.method, patches=last), fewer, module.base, card=module.card), "llama", tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer/adapter_config.json").read_text())["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_our_prefix_in_peft(family: str, tmp_path: Path) -> None:
    """Rotary keys are turned, a table of relative positions is said so; one of absolute positions cannot be made up for."""
    from intarsia.methods import build
    from intarsia.patches import Attend
    from tests.host.kit import disturb

    model, _ = live.base(family)
    method = build("prefix", length=4, reparameterise=None)
    if family == "t5":
        from dataclasses import replace

        patches = tuple(replace(patch, at="decoder.{0,1}.attn.mem", form=Attend(4, None, relative=True)) for patch in method.patches)
        method = replace(method, patches=patches)
    host = Host(model).add("m", method)
    disturb(host, "m", 3, 0.3)
    module = host.extract("m")
    if family == "t5":  # peft gives both layers the same
        module = Module("m", module.method, {**module.tensors, **{key.replace("r.0.", "r.1."): t for key, t in module.tensors.items() if "r.0." in key}}, module.base)
    report = write(module, family, tmp_path / "out", task_type=TASKS[family])
    want, got = ours(module, family), live.spoken(tmp_path / "out", family)
    if family == "gpt2":
        assert any("outputs differ" in note for note in report.notes)
    else:
        close(got, want)


def test_an_adapter_with_a_name(tmp_path: Path) -> None:
    """peft keeps it in a folder of its name."""
    import peft

    model, inputs = live.base("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="swh")
        wrapped.add_adapter("kab", peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"], init_lora_weights=False))
        wrapped.eval().save_pretrained(str(tmp_path / "both"))
    for name in ("swh", "kab"):
        wrapped.set_adapter(name)
        want = live.logits(wrapped, inputs)
        module, _ = read(tmp_path / "both" / name, "llama")
        assert module.name == name
        close(ours(module, "llama"), want)


def classifier(kind: str) -> tuple[Any, Any, dict[str, torch.Tensor], str]:
    """A model with the class's head, the model inside it, inputs and the task."""
    import transformers as hf

    from tests import zoo

    family, name, task, inner = {
        "pooled": ("xlm-roberta", "XLMRobertaForSequenceClassification", "SEQ_CLS", "roberta"), "relu": ("distilbert", "DistilBertForSequenceClassification", "SEQ_CLS", "distilbert"),
        "last": ("llama", "LlamaForSequenceClassification", "SEQ_CLS", "model"), "token": ("bert", "BertForTokenClassification", "TOKEN_CLS", "bert"),
    }[kind]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, name)(zoo.config(family, num_labels=3)).eval()
    zoo.perturb_(model)
    inputs = zoo.inputs(family)
    inputs["attention_mask"][1, 5:] = 0
    inputs["input_ids"][1, 5:] = 1 if family.startswith("xlm") else 0
    return model, getattr(model, inner), inputs, task


@pytest.mark.parametrize("kind", ["pooled", "relu", "last", "token"])
def test_a_head_of_a_class_for_a_base_without_one_and_back(kind: str, tmp_path: Path) -> None:
    import peft

    model, _, inputs, task = classifier(kind)
    targets = {"last": ["q_proj"], "relu": ["q_lin"]}.get(kind, ["query"])
    more = {"modules_to_save": ["pre_classifier", "classifier"]} if kind == "relu" else {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False, **more)).eval()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    want = live.logits(wrapped, inputs)
    _, base, _, _ = classifier(kind)
    module, report = read_peft(tmp_path / "theirs", sites=resolve(base), base=fingerprint(base), weights=base.state_dict(), model=base)
    assert report.complete and module.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    host = Host(base).insert(module)
    with host.using(module.name):
        got = live.logits(base, inputs)
    real = inputs["attention_mask"].bool() if kind == "token" else slice(None)
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    whole, _, _, _ = classifier(kind)
    written = write_peft(module, tmp_path / "ours", sites=resolve(whole), weights=whole.state_dict(), task_type=task)
    assert written.complete, written
    again = peft.PeftModel.from_pretrained(whole, str(tmp_path / "ours")).eval()
    torch.testing.assert_close(live.logits(again, inputs)[real], want[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_half_precision(autocast: bool, tmp_path: Path) -> None:
    """peft keeps single precision beside it, or half if told so: either way the file returns to the byte."""
    import peft

    model, inputs = live.base("llama")
    model = model.bfloat16()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast).eval()
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    want = live.logits(wrapped, inputs)
    plain, _ = live.base("llama")
    plain = plain.bfloat16()
    module, _ = read_peft(tmp_path / "theirs", sites=resolve(plain), base=fingerprint(plain), weights=plain.state_dict())
    host = Host(plain).insert(loads(dumps(module)))
    with host.using(module.name):
        torch.testing.assert_close(live.logits(plain, inputs).float(), want.float(), atol=3e-2, rtol=3e-2)
    write_peft(module, tmp_path / "ours", sites=resolve(plain), weights=plain.state_dict())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
