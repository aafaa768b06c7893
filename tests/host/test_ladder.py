"""Ladder side-tuning: nothing enters the base's graph; generation, padding, rows and encoders apart from decoders."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import CompositionError, SiteError, SpecError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.patches import Ladder
from intarsia.patches.ladder import bucket
from tests import zoo
from tests.host import kit
from tests.host.test_generation import NEW, OPTIONS, padded

FAMILIES = ("gpt2", "llama", "t5", "bart")


@pytest.mark.parametrize("family", ["bert", *FAMILIES])
def test_no_activation_of_the_base_has_a_graph(family: str) -> None:
    model, inputs = zoo.make(family)
    host = Host(model).add("a", kit.small("lst"))
    kit.disturb(host, "a")
    graphs: dict[str, bool] = {}
    for site in host.sites.values():
        if site.port == "out" and site.layer is not None and site.name.rpartition(".")[2].isdecimal() and site.path != host.sites["head.in"].path:
            model.get_submodule(site.path).register_forward_hook(
                lambda m, i, o, name=site.name: graphs.update({name: (o[0] if isinstance(o, tuple) else o).requires_grad})
            )
    with host.using("a"):
        out = kit.answer(model(**inputs))
    assert out.requires_grad and len(graphs) >= 1 and not any(graphs.values())
    out.pow(2).mean().backward()
    assert all(p.grad is not None for p in host.parameters("a").values())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_a_cache(family: str) -> None:
    model, inputs, host = kit.woven(family, "lst")
    two_stacks = model.config.is_encoder_decoder
    ids, mask = padded(inputs, "left")
    with torch.no_grad(), host.using("a"):
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


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_under_beams_equal_single_runs(family: str) -> None:
    model, inputs, host = kit.woven(family, "lst")
    ids, mask = padded(inputs, "left")
    if family == "bart":
        ids, mask = inputs["input_ids"], torch.ones_like(mask)  # its encoder counts positions from the padding on
    with torch.no_grad(), host.using(["a", "b"]):
        both = model.generate(ids, attention_mask=mask, num_beams=4, **OPTIONS)[:, -NEW:]
    for row, name in enumerate("ab"):
        cut = slice(2, None) if row == 0 and family != "bart" else slice(None)
        with torch.no_grad(), host.using(name):
            alone = model.generate(ids[row : row + 1, cut], attention_mask=mask[row : row + 1, cut], num_beams=4, **OPTIONS)
        assert torch.equal(both[row], alone[0, -NEW:])


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model, inputs, host = kit.woven(family, "lst")
    ids, mask = padded(inputs, side)
    real = slice(2, None) if side == "left" else slice(0, -2)
    rest = {k: v for k, v in inputs.items() if k.startswith("decoder")}
    positions = {} if rest else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with host.using("a"):
        batch = kit.run(model, {"input_ids": ids, "attention_mask": mask, **rest, **positions})
        alone = kit.run(model, {"input_ids": ids[:1, real], "attention_mask": mask[:1, real], **{k: v[:1] for k, v in rest.items()}})
    assert torch.allclose(batch[0] if rest else batch[0, real], alone[0], atol=1e-4)


def test_a_decoder_looks_back_only_and_an_encoder_both_ways() -> None:
    for family, causal in (("llama", True), ("bert", False)):
        model, inputs, host = kit.woven(family, "lst")
        other = inputs["input_ids"].clone()
        other[:, -1] = (other[:, -1] + 1).clamp(max=96)
        with host.using("a"):
            one, two = kit.run(model, {"input_ids": inputs["input_ids"]}), kit.run(model, {"input_ids": other})
        assert torch.allclose(one[:, :-1], two[:, :-1], atol=1e-5) == causal


def test_encoder_states_of_another_run_are_refused() -> None:
    model, inputs, host = kit.woven("t5", "lst")
    with torch.no_grad():
        with host.using("a"):
            first = model.get_encoder()(inputs["input_ids"])
            whole = model(**inputs, use_cache=False).logits
            again = model.get_encoder()(inputs["input_ids"])
            assert torch.allclose(model(encoder_outputs=again, decoder_input_ids=inputs["decoder_input_ids"], use_cache=False).logits, whole, atol=1e-5)
            model.get_encoder()(inputs["input_ids"].flip(0))
            with pytest.raises(CompositionError, match="not those of the encoder's last pass"):
                model(encoder_outputs=first, decoder_input_ids=inputs["decoder_input_ids"])
        with host.using("a"), pytest.raises(CompositionError, match="just before the decoder"):
            model(encoder_outputs=first, decoder_input_ids=inputs["decoder_input_ids"])


def test_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> torch.Tensor:
        model, inputs, host = kit.woven("llama-tied", "lst")
        kit.without_dropout(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with host.using("a"):
            kit.answer(model(**inputs, use_cache=False)).pow(2).mean().backward()
        return torch.cat([p.grad.flatten() for p in host.parameters("a").values()])  # type: ignore[union-attr]

    assert torch.allclose(gradients(False), gradients(True), atol=1e-6, rtol=1e-4)


def test_a_side_network_behind_another_module_reads_what_that_left() -> None:
    model, inputs, host = kit.woven("bert", "lst")
    host.add("lora", kit.small("lora"))
    kit.disturb(host, "lora")
    with host.using("a"):
        alone = kit.run(model, inputs)
    with host.using("lora >> a"):
        both = kit.run(model, inputs)
        kit.answer(model(**inputs)).pow(2).mean().backward()
    assert not torch.allclose(alone, both, atol=1e-4)
    assert not any(p.grad.any() for p in host.parameters("lora").values() if p.grad is not None), "no gradient enters the base"


def test_buckets_are_t5s() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)[None]
    for both_ways in (True, False):
        theirs = T5Attention._relative_position_bucket(distance, both_ways, 32, 128)
        assert torch.equal(bucket(distance, both_ways, 32, 128), theirs)


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"skip_every": 1}, SpecError, "leaves no side block"),
        ({"reduction": 4, "head_size": 3}, None, ""),
        ({"reduction": 1, "head_size": 5}, SpecError, "do not divide"),
        ({"temperature": 0.0}, SpecError, "positive temperature"),
    ],
)
def test_settings(settings: dict[str, float], error: type[Exception] | None, complaint: str) -> None:
    host = Host(zoo.make("bert")[0])
    if error is None:
        assert host.count(build("lst", **settings)) > 0
        return
    with pytest.raises(error, match=complaint):
        host.add("a", build("lst", **settings))
    assert host.names == ()


def test_shared_blocks_have_no_single_last_one() -> None:
    with pytest.raises(SiteError, match="run several times"):
        Host(zoo.make("albert")[0]).add("a", kit.small("lst"))
    with pytest.raises(SpecError, match=r"put it at 'head\.in'"):
        from intarsia.methods import Method, Patch
        from intarsia.patches import Set

        Host(zoo.make("bert")[0]).add("a", Method("m", (Patch("p", "ffn", Ladder(), Set()),)))
