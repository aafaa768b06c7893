"""Forms that look at the whole prompt: edits at its ends (ReFT), gates over its mean (UniPELT), tasks per row (HyperFormer).

Padding on either side changes nothing, generation with a cache equals generation without one and the teacher-forced
forward, rows equal single runs, checkpointing changes no gradient.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from intarsia.errors import CompositionError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.patches import Head
from tests import zoo
from tests.host import kit
from tests.host.test_generation import NEW, OPTIONS, padded

METHODS = ("loreft", "unipelt", pytest.param("noreft", marks=pytest.mark.slow), pytest.param("direft", marks=pytest.mark.slow))
FAMILIES = ("gpt2", "llama", "t5", pytest.param("bart", marks=pytest.mark.slow))
TASKS = ("one", "two", "three")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_and_without_a_cache(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    two_stacks = model.config.is_encoder_decoder
    ids, mask = padded(inputs, "left")
    said = {} if two_stacks else {"prompt": mask.sum(1)}  # a decoder's prompt is its start token, nothing to say
    with torch.no_grad(), host.using("a", **said):
        options = OPTIONS | {"output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(ids, attention_mask=mask, **options)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(cached.sequences, plain.sequences)
        steps = torch.stack(cached.logits, 1)
        assert torch.allclose(steps, torch.stack(plain.logits, 1), atol=1e-4)
        tokens = cached.sequences
        if two_stacks:
            forced = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens[:, :-1], use_cache=False).logits[:, -NEW:]
        else:
            long = torch.cat([mask, mask.new_ones(len(mask), NEW)], 1)
            positions = (long.cumsum(1) - 1).clamp(min=0)
            forced = model(input_ids=tokens, attention_mask=long, position_ids=positions, use_cache=False).logits[:, -NEW - 1 : -1]
        assert torch.allclose(steps, forced, atol=1e-4)
        beams = model.generate(ids, attention_mask=mask, num_beams=4, **OPTIONS)
        assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=4, use_cache=False, **OPTIONS))
    if not two_stacks:  # without being told, the prompt is what the first pass brings
        with torch.no_grad(), host.using("a"):
            assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS), tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_is_over_when_the_prompt_is(family: str) -> None:
    """Cached steps run the base: from the same cache they give the same, with the module or without."""
    model, inputs, host = kit.woven(family, "loreft")
    ids = inputs["input_ids"]
    with torch.no_grad():
        caches = []
        for _ in range(2):
            with host.using("a"):
                caches.append(model(ids, use_cache=True).past_key_values)
        with host.using("a"):
            edited = model(ids[:, :1], past_key_values=caches[0]).logits
        plain = model(ids[:, :1], past_key_values=caches[1]).logits
    assert torch.equal(edited, plain)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, method: str, side: str) -> None:
    if (family, side) == ("bart", "left"):
        pytest.skip("the base itself numbers positions from the padding on")
    model, inputs, host = kit.woven(family, method)
    ids, mask = padded(inputs, side)
    real = slice(2, None) if side == "left" else slice(0, -2)
    rest = {k: v for k, v in inputs.items() if k.startswith("decoder")}
    positions = {} if rest else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with host.using("a"):
        batch = kit.run(model, {"input_ids": ids, "attention_mask": mask, **rest, **positions})
        alone = kit.run(model, {"input_ids": ids[:1, real], "attention_mask": mask[:1, real], **{k: v[:1] for k, v in rest.items()}})
    found = batch[0] if rest else batch[0, real]
    assert torch.allclose(found, alone[0], atol=1e-4)


@pytest.mark.parametrize("method", ["loreft", "unipelt"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_rows_with_different_modules_and_padding(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    ids, mask = padded(inputs, "left")
    with torch.no_grad(), host.using(["a", "b"]):
        both = model.generate(ids, attention_mask=mask, num_beams=2, **OPTIONS)[:, -NEW:]
    for row, name in enumerate("ab"):
        cut = slice(2, None) if row == 0 else slice(None)
        with torch.no_grad(), host.using(name):
            alone = model.generate(ids[row : row + 1, cut], attention_mask=mask[row : row + 1, cut], num_beams=2, **OPTIONS)
        assert torch.equal(both[row], alone[0, -NEW:])


def test_the_prompt_of_a_row_with_its_answer() -> None:
    """Told where the prompt ends, a row with its answer has the states of the prompt alone."""
    model, inputs, host = kit.woven("llama", "loreft")
    ids = inputs["input_ids"]
    with host.using("a"):
        alone = kit.run(model, {"input_ids": ids[:, :4]})
    with host.using("a", prompt=4):
        whole = kit.run(model, {"input_ids": ids})
    assert torch.allclose(whole[:, :4], alone, atol=1e-5)
    with host.using("a", prompt=[4, 7]):
        rows = kit.run(model, {"input_ids": ids})
    assert torch.allclose(rows[0], whole[0], atol=1e-5) and not torch.allclose(rows[1], whole[1], atol=1e-3)


def test_a_gate_needs_the_cache_it_filled() -> None:
    model, inputs, host = kit.woven("gpt2", "unipelt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with host.using("a"), pytest.raises(CompositionError, match="filled without it"):
            model(ids[:, :1], past_key_values=cache)


def test_an_edit_and_a_soft_prompt() -> None:
    """The soft prompt stands in front of the prompt and is part of it."""
    model, inputs, host = kit.woven("llama", "loreft")
    host.add("p", kit.small("prompt"))
    ids = inputs["input_ids"]
    with host.using("p >> a"):
        alone = kit.run(model, {"input_ids": ids[:, :4]})
    with host.using("p >> a", prompt=4):
        whole = kit.run(model, {"input_ids": ids})
    assert torch.allclose(whole[:, :4], alone, atol=1e-5)


def tasked(family: str, method: str) -> tuple[Any, dict[str, torch.Tensor], Host]:
    model, inputs = zoo.make(family)
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, build(method, **{**kit.SMALL[method], "tasks": TASKS}), seed=seed)
        kit.disturb(host, name, seed)
    return model, inputs, host


@pytest.mark.parametrize("method", ["hyperformer", "hyperformer_pp"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "t5"])
def test_tasks_per_row(family: str, method: str) -> None:
    model, inputs, host = tasked(family, method)
    single = {}
    for task in TASKS:
        with host.using("a", task=task):
            single[task] = kit.run(model, inputs)
    assert not torch.allclose(single["one"], single["two"], atol=1e-3)
    with host.using("a", task=["three", "one"]):
        rows = kit.run(model, inputs)
    assert torch.allclose(rows[0], single["three"][0], atol=1e-5) and torch.allclose(rows[1], single["one"][1], atol=1e-5)
    with host.using(["b", "a"], task=["three", 1]):
        mixed = kit.run(model, inputs)
    assert torch.allclose(mixed[1], single["two"][1], atol=1e-5)
    with host.using("a", task=torch.tensor([0, 0])):
        assert torch.allclose(kit.run(model, inputs), single["one"], atol=1e-5)


@pytest.mark.parametrize("method", ["hyperformer", "hyperformer_pp"])
def test_a_task_teaches_only_itself_and_is_exported(method: str) -> None:
    model, inputs, host = tasked("t5", method)
    with host.using("a", task="two"):
        out = kit.answer(model(**inputs))
        out.pow(2).mean().backward()
    gradient = next(p.grad for n, p in host.parameters("a").items() if n.startswith("tied/hyper.tasks"))
    assert gradient is not None and gradient[1].abs().sum() > 0
    assert not gradient[0].any() and not gradient[2].any()
    plain = host.extract("a", flatten=True, task="two")
    assert not any(key.startswith("tied/hyper") for key in plain.tensors)
    host.insert(plain, name="plain")
    with host.using("plain"), torch.no_grad():
        assert torch.allclose(kit.answer(model(**inputs)), out, atol=1e-5)


@pytest.mark.parametrize("method", ["hyperformer", "hyperformer_pp"])
def test_equal_embeddings_are_equal_tasks(method: str) -> None:
    model, inputs, host = tasked("bert", method)
    table = next(p for n, p in host.parameters("a").items() if n.startswith("tied/hyper.tasks"))
    with torch.no_grad():
        table[2] = table[0]
    found = []
    for task in ("one", "three"):
        with host.using("a", task=task):
            found.append(kit.run(model, inputs))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [({}, "needs 'task'"), ({"task": "tow"}, "did you mean 'two'"), ({"task": ["one"] * 3}, "3 values"), ({"task": 3}, "task 3 does not exist")],
)
def test_tasks_are_refused(said: dict[str, Any], complaint: str) -> None:
    model, inputs, host = tasked("bert", "hyperformer")
    with host.using("a", **said), pytest.raises(CompositionError, match=complaint):
        kit.run(model, inputs)


@pytest.mark.parametrize("method", ["loreft", "unipelt", "hyperformer_pp"])
@pytest.mark.parametrize("family", ["bert", "llama-tied", "t5"])
def test_checkpointing_gives_the_same_gradients(family: str, method: str) -> None:
    def gradients(how: str) -> torch.Tensor:
        model, inputs, host = tasked(family, method) if method.startswith("hyper") else kit.woven(family, method)
        kit.without_dropout(model)
        said = {"task": ["three", "one"]} if method.startswith("hyper") else {}
        ids, mask = padded(inputs, "right")
        rest = {k: v for k, v in inputs.items() if k.startswith("decoder")}
        if how != "plain":
            model.gradient_checkpointing_enable()
        options = {} if family == "bert" else {"use_cache": False}
        with host.using("a", **said):
            loss = kit.answer(model(input_ids=ids, attention_mask=mask, **rest, **options)).pow(2).mean()
        if how == "thread":
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in host.parameters("a").values() if p.grad is not None])

    plain = gradients("plain")
    for how in ("checkpointed", "thread"):
        assert torch.allclose(gradients(how), plain, atol=1e-6, rtol=1e-4), how


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_dropped_layers_run_without_modules(family: str) -> None:
    """A robust AdapterDrop module with the lowest n layers dropped is the module that never had them."""
    model, inputs = zoo.make(family)
    host = Host(model)
    host.add("a", build("adapterdrop", lowest=1, robust=True, reduction=4))
    kit.disturb(host, "a")
    host.add("b", build("adapterdrop", lowest=1, reduction=4))
    with torch.no_grad():
        for name, parameter in host.parameters("b").items():
            parameter.copy_(host.parameters("a")[name])
    with host.using("b"):
        fixed = kit.run(model, inputs)
    with host.using("a", drop_layers=1):
        dropped = kit.run(model, inputs)
    with host.using("a"):
        whole = kit.run(model, inputs)
    assert torch.equal(fixed, dropped) and not torch.allclose(whole, dropped, atol=1e-4)
    with host.using("a", drop_layers=2):
        assert torch.equal(kit.run(model, inputs), kit.reference(family))


def test_nothing_below_the_first_module_keeps_a_graph() -> None:
    model, inputs = zoo.make("bert", num_hidden_layers=4)
    host = Host(model)
    host.add("a", build("adapterdrop", lowest=2, reduction=4))
    seen: dict[int, bool] = {}
    for number, layer in enumerate(model.base_model.encoder.layer):
        layer.register_forward_hook(lambda m, i, o, number=number: seen.update({number: o.requires_grad}))
    with host.using("a"):
        model(**inputs)
    assert seen == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize(("family", "headless"), [("bert", True), ("bert", False), ("llama", True), ("llama", False), ("t5", False)])
def test_a_head_over_a_prompt_pools_the_callers_tokens(family: str, headless: bool) -> None:
    """With a model that is itself the stack that reads the prompt, too: its mask is the one the caller gave."""
    model, batch = zoo.make(family, headless=headless)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -2:] = 0
    host = Host(model)
    host.add("m", build("prompt", length=3).with_head(Head(("a", "b"))))
    states: list[torch.Tensor] = []
    head = host.forms("m")["logits/head"]
    handle = head.register_forward_pre_hook(lambda form, args: states.append(args[1].input))
    with host.using("m"), torch.no_grad():
        logits = model(**batch).logits
    handle.remove()
    assert states[0].shape[1] == batch[("decoder_" if family == "t5" else "") + "input_ids"].shape[1]
    if family != "t5":
        weights = batch["attention_mask"][..., None].to(states[0].dtype)
        pooled = (states[0] * weights).sum(1) / weights.sum(1)
        with torch.no_grad():
            torch.testing.assert_close(logits, torch.nn.functional.linear(head.standardised(pooled), head.weight, head.bias))
    host.close()
