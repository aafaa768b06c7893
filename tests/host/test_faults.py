"""Kinds of fault seen in other libraries, as laws here."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers

from intarsia.compose import Ref
from intarsia.errors import CompositionError, IntarsiaError, ModuleError, SiteError, SpecError
from intarsia.host import Host
from intarsia.methods import Method, Patch, build
from intarsia.patches import Const, Head
from tests import zoo
from tests.host import kit

HOSTILE_NAMES = ("a.b", "keys", "items", "forward", "lora_A", "module", "default", "intarsia", "0", "naïve", "学习", "x" * 200, "a/b", "with space")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_are_only_names(name: str) -> None:
    """Dots, attribute names, words that look like parameters: all legal, none confused with another."""
    model, inputs = zoo.make("bert")
    host = Host(model)
    host.add(name, kit.small("pfeiffer")).add("other", kit.small("lora"))
    kit.disturb(host, name)
    with host.using(Ref(name)):
        on = kit.run(model, inputs)
    assert not torch.allclose(on, kit.reference("bert"), atol=1e-4)
    twin = copy.deepcopy(model)
    with Host.of(twin).using(Ref(name)):
        assert torch.equal(kit.run(twin, inputs), on)
    host.remove(name)
    assert host.names == ("other",)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\0b", "x" * 201, ".", "..", 'quote"', "back\\slash"])
def test_impossible_names_are_refused(name: str) -> None:
    host = Host(zoo.make("bert")[0])
    with pytest.raises((SpecError, ModuleError)):
        host.add(name, kit.small("lora"))
    assert host.names == ()


@pytest.mark.parametrize("family", ["bert", "xlm-roberta-cls", "llama", "t5", "bart", "deberta-v2"])
def test_an_idle_host_drops_no_input(family: str) -> None:
    """Every input of the model still arrives: token types, positions, embeddings, labels, output switches."""
    model, inputs = zoo.make(family)
    length = inputs["input_ids"].shape[1]
    calls = [
        {"output_hidden_states": True, **inputs},
        {"attention_mask": torch.tensor([[1] * length, [1] * (length - 2) + [0, 0]]), **inputs},
        {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), **{k: v for k, v in inputs.items() if k != "input_ids"}},
    ]
    if family in ("bert", "deberta-v2"):
        calls.append({"token_type_ids": torch.ones_like(inputs["input_ids"]), **inputs})
    if family in ("bert", "llama"):
        calls.append({"position_ids": torch.arange(length).flip(0)[None].expand(2, -1), **inputs})
    if family == "xlm-roberta-cls":
        calls.append({"labels": torch.tensor([0, 2]), **inputs})
    else:
        calls.append({"labels": inputs.get("decoder_input_ids", inputs["input_ids"]), **inputs})
    with torch.no_grad():  # the kernels that a forward with gradients picks may round otherwise
        wanted = [model(**c) for c in calls]
    host = Host(model).add("a", kit.small("lora"))
    for call, output in zip(calls, wanted):
        for expression in (None, "a"):
            with host.using(expression), torch.no_grad():
                got = model(**call)
            assert got.keys() == output.keys()
            assert torch.equal(got.logits, output.logits)
            assert output.get("loss") is None or torch.equal(got.loss, output.loss)
    args = [inputs["input_ids"], torch.ones_like(inputs["input_ids"])]
    if family in ("bert", "llama"):
        with torch.no_grad():
            assert torch.equal(model(*args).logits, kit.reference(family)), "positional arguments"


def test_modes_survive() -> None:
    model, inputs = zoo.make("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [(n, m.training) for n, m in model.named_modules()]
    host = Host(model).add("a", kit.small("houlsby"))
    with host.using("a"):
        model(**inputs)
    assert [(n, m.training) for n, m in model.named_modules() if "intarsia" not in n] == modes
    host.close()
    assert [(n, m.training) for n, m in model.named_modules()] == modes


def test_a_failed_add_leaves_no_halves() -> None:
    model, _inputs = zoo.make("bert")
    before = kit.state(model)
    host = Host(model).add("a", kit.small("lora"))
    mixed = Method("bad", (Patch("good", "ffn", Const()), Patch("wrong", "atn.q", Const())))
    with pytest.raises(SiteError, match=r"patch 'wrong'.*did you mean"):
        host.add("b", mixed)
    assert host.names == ("a",)
    with pytest.raises(ModuleError, match="already"):
        host.add("a", kit.small("ia3"))
    host.close()
    assert kit.same_state(before, kit.state(model))


def test_requires_grad_is_what_it_was() -> None:
    model, _ = zoo.make("bert")
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    host = Host(model).add("a", kit.small("full")).add("b", kit.small("prefix"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "intarsia" not in n)
    host.trainable("b")
    assert not any(p.requires_grad for p in host.parameters("a").values())
    assert all(p.requires_grad for p in host.parameters("b").values())
    host.close()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_training_changes_the_module_and_nothing_else() -> None:
    """AdamW with weight decay on all parameters of the model: the base does not move by a bit."""
    for method in ("lora", "ln", "full", "prefix", "prompt", "houlsby", "bitfit", "ia3"):
        model, inputs = zoo.make("bert")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        host = Host(model).add("a", kit.small(method))
        start = {k: v.clone() for k, v in host.tensors("a").items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            with host.using("a"):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
        assert any(not torch.equal(start[k], v) for k, v in host.tensors("a").items())
        host.close()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), method


def test_wrong_base_is_refused_and_forced_only_on_request() -> None:
    model, _ = zoo.make("bert")
    module = Host(model).add("a", kit.small("lora")).extract("a")
    other, inputs = zoo.make("bert", seed=5)
    host = Host(other)
    with pytest.raises(ModuleError, match=r"another base.*weights"):
        host.insert(module)
    deeper, _ = zoo.make("bert", num_hidden_layers=3)
    with pytest.raises(ModuleError, match="another base"):
        Host(deeper).insert(module)
    with pytest.raises(ModuleError, match="another base"):
        Host(zoo.make("roberta")[0]).insert(module)
    host.insert(module, force_base=True)
    with host.using("a"):
        kit.run(other, inputs)


def test_a_head_on_top_makes_no_other_base() -> None:
    """A module of the bare encoder fits the same encoder under another task head, and back."""
    model, _inputs = zoo.make("xlm-roberta")
    module = Host(model).add("a", kit.small("pfeiffer")).extract("a")
    classifier = transformers.XLMRobertaForSequenceClassification(model.config)
    classifier.roberta.load_state_dict(zoo.make("xlm-roberta")[0].roberta.state_dict())
    Host(classifier.eval()).insert(module)


@pytest.mark.parametrize("what", ["missing", "extra", "shape"])
def test_every_tensor_is_accounted_for(what: str) -> None:
    model, _ = zoo.make("bert")
    module = Host(model).add("a", kit.small("lora")).extract("a")
    tensors = dict(module.tensors)
    key = next(iter(tensors))
    if what == "missing":
        del tensors[key]
    elif what == "extra":
        tensors["7.attn.q/lora.factor.down"] = torch.zeros(4, 32)
    else:
        tensors[key] = torch.zeros(5, 32)
    broken = type(module)(name="x", method=module.method, tensors=tensors, base=module.base)
    host = Host(zoo.make("bert")[0])
    with pytest.raises(ModuleError, match={"missing": "1 missing", "extra": "1 unexpected", "shape": "1 of another shape"}[what]):
        host.insert(broken)
    assert host.names == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", kit.METHOD_NAMES)
def test_half_precision_bases(method: str, dtype: torch.dtype) -> None:
    """fp32 modules on a half-precision base: forward and backward run, the stream keeps its dtype."""
    for family in ("bert", "llama"):
        model, inputs = zoo.make(family)
        model.to(dtype)
        host = Host(model).add("a", kit.small(method, family))
        kit.disturb(host, "a", size=0.01)
        with host.using("a"):
            output = model(**inputs)
        logits = kit.answer(output)
        assert logits.isfinite().all()
        assert logits.dtype == (torch.float32 if method == "head" else dtype)
        logits.float().pow(2).mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in host.parameters("a").values())


def test_unknown_names_are_errors_never_the_base() -> None:
    _model, _, host = kit.woven("bert", "lora")
    for wrong in ("c", "a >> c", ["a", "c"], "0.5*a + 0.5*typo"):
        with pytest.raises(CompositionError, match=r"no module '(c|typo)' on this host"), host.using(wrong):
            pass
    with pytest.raises(CompositionError):
        host.fold("c")
    with pytest.raises(CompositionError):
        host.extract("c")
    with pytest.raises(CompositionError):
        host.remove("c")


def test_folding_changes_neither_base_nor_module() -> None:
    model, _inputs, host = kit.woven("bert", "lora")
    base = {k: v.clone() for k, v in model.state_dict().items()}
    host.fold("a + b")
    assert all(torch.equal(base[k], v) for k, v in model.state_dict().items())


def test_two_heads_with_other_labels_coexist() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    host.add("topic", build("lora").with_head(Head(("a", "b", "c"))))
    host.add("sentiment", build("ia3").with_head(Head(("good", "bad"))))
    host.add("tags", build("head").with_head(Head(("O", "B", "I", "E"), "token")))
    with host.using("topic"):
        assert kit.run(model, inputs).shape == (2, 3)
    with host.using("tags"):
        assert kit.run(model, inputs).shape == (2, 7, 4)
    with host.using(["topic", "sentiment"]), torch.no_grad():
        rows = model(**inputs).logits
    assert [tuple(r.shape) for r in rows] == [(3,), (2,)]
    with pytest.raises(CompositionError, match="have a head"), host.using("topic >> sentiment"):
        pass
    with host.using("topic >> sentiment", head="sentiment"):
        assert kit.run(model, inputs).shape == (2, 2)


def test_extract_does_not_alias_live_tensors() -> None:
    _, _, host = kit.woven("bert", "lora")
    module = host.extract("a")
    digest = module.digest
    kit.disturb(host, "a", seed=9)
    assert module.digest == digest and host.extract("a").digest != digest


def test_offloaded_weights_are_refused_by_weight_methods() -> None:
    from accelerate import cpu_offload

    model, inputs = zoo.make("bert")
    host = Host(model).add("ln", kit.small("ln")).add("lora", kit.small("lora"))
    kit.disturb(host, "lora")
    with host.using("lora"):
        wanted = kit.run(model, inputs)
    cpu_offload(model, torch.device("cpu"))
    with host.using("lora"):
        assert torch.allclose(kit.run(model, inputs), wanted, atol=1e-5)
    with host.using("ln"), pytest.raises(SiteError, match="offloaded"):
        kit.run(model, inputs)


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "parallel", "ia3", "prefix", "prompt", "head", "compacter", "vera"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_parameters_are_read_in_forward_only(family: str, method: str) -> None:
    """Under offloading a parameter is in place only while the forward of its own module runs; elsewhere it is on `meta`."""
    from accelerate import cpu_offload

    model, inputs = zoo.make(family)
    host = Host(model).add("a", kit.small(method, family))
    if method == "compacter":  # its layer norms are weights, which are refused when offloaded
        host.remove("a").add("a", build("compacter", width=4, n=2, norms=False))
    kit.disturb(host, "a")
    with host.using("a"):
        wanted = kit.run(model, inputs)
    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in host.parameters("a").values())
    with host.using("a"):
        assert torch.allclose(kit.run(model, inputs), wanted, atol=1e-5)


def test_nothing_is_printed_or_warned(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    with caplog.at_level(logging.INFO):
        model, inputs, host = kit.woven("bert", "prefix")
        with host.using("a"):
            kit.run(model, inputs)
        host.close()
    assert not [r for r in caplog.records if r.name.startswith("intarsia")]
    assert not [w for w in recwarn if "intarsia" in str(w.filename)]


def test_every_refusal_is_one_of_ours() -> None:
    assert all(issubclass(e, IntarsiaError) for e in (CompositionError, ModuleError, SiteError, SpecError))
