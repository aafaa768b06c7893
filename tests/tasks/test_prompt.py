"""Training and generation see the same prompt: edits of prompt positions, gates that average over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intarsia.host import Host
from intarsia.tasks import build, evaluate
from tests import zoo
from tests.host.kit import disturb, small, stepwise
from tests.tasks import toys

BYTES = toys.bytelevel()
TABLE = [{"q": "the ab the", "a": "x ab"}, {"q": "a", "a": "the"}, {"q": "ab ab ab the the", "a": "b"}]


def hosted(name: str, family: str) -> Host:
    model, _ = zoo.make(family, vocab_size=len(BYTES))
    host = Host(model)
    host.add("m", small(name, family))
    disturb(host, "m", size=0.3)
    model.eval()
    return host


def step_by_step(host: Host, feature: Any, **context: Any) -> torch.Tensor:
    """Logits of the completion's pieces as generation computes them: the prompt at once, then piece by piece."""
    ids, given = torch.tensor([feature["input_ids"]]), feature["given"]
    with torch.no_grad(), host.using("m", **context) as model:
        out = model(input_ids=ids[:, :given], use_cache=True)
        found = [out.logits[:, -1]]
        for i in range(given, ids.shape[1] - 1):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("name", "family"), [("loreft", "llama"), ("unipelt", "llama"), ("loreft", "gpt2"), ("direft", "qwen2")])
def test_training_sees_the_prompt_that_generation_sees(name: str, family: str, padding: str) -> None:
    host = hosted(name, family)
    task = build("clm", BYTES, settings={"prompt": "q", "completion": "a", "padding": padding})
    features = task.features(TABLE)
    batch = task.collate(features)
    where = batch["labels"] != -100
    inputs = {key: batch[key] for key in task.keys}
    inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generation counts them
    with torch.no_grad(), host.using("m", **task.context(batch)) as model:
        learnt = model(**inputs).logits
    with torch.no_grad(), host.using("m") as model:
        untold = model(**inputs).logits
    for row, feature in enumerate(features):
        answers = learnt[row, :-1][where[row, 1:]]
        torch.testing.assert_close(answers, step_by_step(host, feature), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(learnt[where], untold[where], atol=1e-3)  # it does matter


def test_a_plain_text_is_not_read_in_advance() -> None:
    """What follows a piece does not change its likelihood, although a gate averages over what it is shown."""
    host = hosted("unipelt", "llama")
    task = build("clm", BYTES, settings={"end": False})
    batch, longer = (task.collate(task.features([{"text": text}])) for text in ("the ab", "the ab cd xyz"))
    with torch.no_grad():
        logits = []
        for one in (batch, longer):
            with host.using("m", **task.context(one)) as model:
                logits.append(model(**{key: one[key] for key in task.keys}).logits)
    torch.testing.assert_close(logits[0], logits[1][:, : logits[0].shape[1]], rtol=1e-4, atol=1e-5)


def test_evaluation_and_generation_run_through_one_loop() -> None:
    host = hosted("loreft", "llama")
    settings = {"prompt": "q", "completion": "a", "max_new_tokens": 4}
    likelihood = build("clm", BYTES, settings=settings)
    written = build("clm", BYTES, settings={**settings, "generate": True})
    a = evaluate(host, "m", likelihood, TABLE).metrics["perplexity"].value
    b = evaluate(host, "m", written, TABLE).metrics["perplexity"].value
    assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_decoders_that_read_an_encoder(padding: str) -> None:
    """The prompt of a decoder is its start token, in training as in generation."""
    model, _ = zoo.make("t5")
    host = Host(model)
    host.add("m", small("loreft", "t5"))
    disturb(host, "m", size=0.3)
    model.eval()
    source, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if padding == "left":
        source, mask = source.flip(1), mask.flip(1)
    target = torch.tensor([[0, 11, 12, 13], [0, 14, 15, 16]])
    with torch.no_grad(), host.using("m") as ready:
        whole = ready(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        steps = stepwise(ready, source, mask, target)
    torch.testing.assert_close(whole, steps, rtol=1e-4, atol=1e-4)
