"""Prefixes with T5's relative position bias: a prefix of a text's own keys and values is that text in front."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intarsia.errors import CompositionError, SpecError
from intarsia.host import Host
from intarsia.methods import build
from tests import zoo
from tests.host.kit import disturb, stepwise

FRONT = torch.tensor([[11, 12, 13, 14, 15]])
TEXT = torch.tensor([[21, 22, 23, 24], [31, 32, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
SOURCE = torch.tensor([[41, 42, 43], [44, 45, 46]])


def hosted(family: str = "t5", relative: bool = True, **config: Any) -> Host:
    model, _ = zoo.make(family, **config)
    host = Host(model)
    host.add("m", build("prefix", length=FRONT.shape[1], reparameterise=None, relative=relative))
    model.eval()
    return host


def fill(host: Host, layers: Any) -> None:
    """A cache's keys and values into the decoder's self-attentions; the prefixes of cross-attention are taken away."""
    for site, (delta,) in host.deltas("m"):
        if site.name.endswith("xattn.mem"):
            delta.form.forward = lambda h, seen: ()
        elif site.stack == "decoder":
            delta.form.start_from(layers[site.layer].keys[0], layers[site.layer].values[0])


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_decoder_reads_the_text_in_front(family: str, relative: bool) -> None:
    """With its bias a causal stack cannot tell a prefix of a text's keys and values from the text; without, it can."""
    host = hosted(family, relative)
    decoder = host.model.get_decoder()
    states = torch.randn(1, 3, host.model.config.d_model, generator=torch.Generator().manual_seed(0))
    text = TEXT[:1]
    with torch.no_grad():
        cache = decoder(input_ids=FRONT, encoder_hidden_states=states, use_cache=True).past_key_values
        fill(host, cache.self_attention_cache.layers)
        whole = decoder(input_ids=torch.cat([FRONT, text], 1), encoder_hidden_states=states).last_hidden_state
        with host.using("m"):
            ours = decoder(input_ids=text, encoder_hidden_states=states).last_hidden_state
    assert torch.allclose(ours, whole[:, FRONT.shape[1] :], atol=1e-5) == relative


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_padding_rows_and_steps_do_not_change_it(family: str) -> None:
    host = hosted(family)
    host.add("n", build("prefix", length=2, reparameterise=4))
    for seed, name in enumerate("mn"):
        disturb(host, name, seed, 0.5)
    model = host.model
    with torch.no_grad():
        with host.using("m"):
            whole = model(input_ids=TEXT, attention_mask=MASK, decoder_input_ids=SOURCE).logits
            left = model(input_ids=torch.tensor([[0, 0, 31, 32]]), attention_mask=torch.tensor([[0, 0, 1, 1]]), decoder_input_ids=SOURCE[1:]).logits
            torch.testing.assert_close(left[0], whole[1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(stepwise(model, TEXT, MASK, SOURCE), whole, atol=1e-5, rtol=1e-4)
        with host.using(["m", "n"]):
            mixed = model(input_ids=TEXT, attention_mask=MASK, decoder_input_ids=SOURCE).logits
        torch.testing.assert_close(mixed[0], whole[0], atol=1e-5, rtol=1e-4)
        with host.using("n"):
            other = model(input_ids=TEXT, attention_mask=MASK, decoder_input_ids=SOURCE).logits
        torch.testing.assert_close(mixed[1], other[1], atol=1e-5, rtol=1e-4)


def test_what_has_no_table_or_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(SpecError, match="no table of relative positions"):
        Host(zoo.make("bert")[0]).add("m", build("prefix", relative=True, reparameterise=None))
    with pytest.raises(SpecError, match="shares the attention's softmax"):
        build("prefix", relative=True, mix="zero_gate")
    host = hosted()
    host.add("n", build("prefix", length=FRONT.shape[1], reparameterise=None))
    with pytest.raises(CompositionError, match="relative positions"), host.using("0.5*m + 0.5*n") as model:
        model(input_ids=TEXT, decoder_input_ids=SOURCE)


def test_positions_that_move_the_text() -> None:
    """As AdapterHub numbers them: rows, padding on the right and single steps agree with the whole; beside others it is refused."""
    from intarsia.methods import Method, Patch
    from intarsia.patches import Attend, Concat

    def moving(length: int) -> Method:
        return Method("moving", (Patch("prefix", "attn.mem", Attend(length, None, shifts=True), Concat(), port="mem"),))

    model, _ = zoo.make("t5")
    host = Host(model).add("m", moving(3)).add("n", moving(2)).add("plain", build("prefix", length=3, reparameterise=None))
    for seed, name in enumerate("mn"):
        disturb(host, name, seed, 0.5)
    given = {"input_ids": TEXT, "attention_mask": MASK, "decoder_input_ids": SOURCE}
    with torch.no_grad():
        alone = []
        for name in ("m", "n"):
            with host.using(name):
                alone.append(model(**given).logits)
        with host.using(["m", "n"]):
            rows = model(**given).logits
        for row in (0, 1):
            torch.testing.assert_close(rows[row], alone[row][row], atol=1e-5, rtol=1e-4)
        with host.using("m"):
            torch.testing.assert_close(stepwise(model, TEXT, MASK, SOURCE), alone[0], atol=1e-5, rtol=1e-4)
        with pytest.raises(CompositionError, match="moves the text"), host.using("m >> plain"):
            model(**given)
    with pytest.raises(SpecError, match="not both"):
        Attend(3, None, relative=True, shifts=True)
