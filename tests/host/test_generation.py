"""Generation equals the teacher-forced forward: greedy, beam 4, padding on either side, with and without a cache."""

from __future__ import annotations

import pytest
import torch

from tests.host import kit

FAMILIES = ("gpt2", "llama", "t5", "bart", "m2m_100")
METHODS = ("prompt", "prefix", "lora", "pfeiffer", "houlsby")
NEW = 6
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def padded(inputs: dict[str, torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids with two pads on a side of row 0, and the mask."""
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    pads = slice(0, 2) if side == "left" else slice(-2, None)
    ids[0, pads] = 0
    mask[0, pads] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_generate_equals_forward(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    two_stacks = model.config.is_encoder_decoder
    with torch.no_grad(), host.using("a"):
        for side in ("left", "right") if two_stacks else ("left",):
            ids, mask = padded(inputs, side)
            options = OPTIONS | {"output_logits": True, "return_dict_in_generate": True}
            cached = model.generate(ids, attention_mask=mask, **options)
            plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
            assert torch.equal(cached.sequences, plain.sequences)
            steps = torch.stack(cached.logits, 1)
            tokens = cached.sequences
            if two_stacks:
                forced = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens[:, :-1], use_cache=False).logits
                forced = forced[:, -NEW:]
            else:
                long = torch.cat([mask, mask.new_ones(len(mask), NEW)], 1)[:, : tokens.shape[1]]
                positions = (long.cumsum(1) - 1).clamp(min=0)
                forced = model(input_ids=tokens, attention_mask=long, position_ids=positions, use_cache=False).logits
                forced = forced[:, -NEW - 1 : -1]
            assert torch.allclose(steps, forced, atol=1e-4), (steps - forced).abs().max()
            beams = model.generate(ids, attention_mask=mask, num_beams=4, **OPTIONS)
            assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=4, use_cache=False, **OPTIONS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_rows_under_beams_equal_single_runs(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    ids, mask = padded(inputs, "left")
    with torch.no_grad():
        for beams in (1, 4):
            with host.using(["a", "b"]):
                both = model.generate(ids, attention_mask=mask, num_beams=beams, **OPTIONS)[:, -NEW:]
            for row, name in enumerate("ab"):
                cut = slice(2, None) if row == 0 else slice(None)
                with host.using(name):
                    alone = model.generate(
                        ids[row : row + 1, cut], attention_mask=mask[row : row + 1, cut], num_beams=beams, **OPTIONS
                    )
                assert torch.equal(both[row], alone[0, -NEW:]), f"row {row} with {beams} beams"


def test_return_sequences_and_sampling_keep_rows_apart() -> None:
    model, inputs, host = kit.woven("llama", "lora")
    ids = inputs["input_ids"]
    with torch.no_grad(), host.using(["a", "b"]):
        many = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=4, num_return_sequences=2, **OPTIONS)
    for row, name in enumerate("ab"):
        with torch.no_grad(), host.using(name):
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones_like(ids[:1]), num_beams=4, num_return_sequences=2, **OPTIONS)
        assert torch.equal(many[2 * row : 2 * row + 2], alone)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "bart", "mistral", "gemma"])
def test_prefix_under_both_attentions_and_padding(family: str, implementation: str) -> None:
    """A prefix has the same effect under eager and sdpa, padded or not; a padded row equals the row alone."""
    model, inputs, host = kit.woven(family, "prefix", _attn_implementation=implementation)
    other, _, twin = kit.woven(family, "prefix", _attn_implementation="eager" if implementation == "sdpa" else "sdpa")
    ids, mask = padded(inputs, "right")
    rest = {k: v for k, v in inputs.items() if k.startswith("decoder")}
    with host.using("a"), twin.using("a"):
        a = kit.run(model, {"input_ids": ids, "attention_mask": mask, **rest})
        b = kit.run(other, {"input_ids": ids, "attention_mask": mask, **rest})
        short = {k: v[:1] for k, v in rest.items()}
        alone = kit.run(model, {"input_ids": ids[:1, :-2], **short})
    length = a.shape[1] if rest else alone.shape[1]
    assert torch.allclose(a[0, :length], b[0, :length], atol=1e-4)
    assert torch.allclose(a[1], b[1], atol=1e-4)
    assert torch.allclose(a[0, :length], alone[0], atol=1e-4)
