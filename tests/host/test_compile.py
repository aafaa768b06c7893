"""torch.compile: no graph breaks, one graph per distinct expression, none per call."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from tests.host import kit


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "pfeiffer", pytest.param("prefix", marks=pytest.mark.slow), pytest.param("prompt", marks=pytest.mark.slow), pytest.param("ln", marks=pytest.mark.slow), pytest.param("ia3", marks=pytest.mark.slow), pytest.param("head", marks=pytest.mark.slow)])  # fmt: skip
def test_graphs_do_not_grow_per_call(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    options = {} if family == "bert" else {"use_cache": False}
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = host.compile(backend=counter, fullgraph=True)
    graphs = []
    for text in ("a", "b", "a", "b", "0.5*a + 0.5*b", "0.5*a + 0.5*b", "a"):
        with host.using(text):
            wanted = kit.run(model, inputs)
        got = kit.answer(run(text, **inputs, **options))
        assert torch.allclose(got, wanted, atol=1e-4), text
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 3, 3, 3]


def test_compiled_gradients() -> None:
    model, inputs, host = kit.woven("bert", "lora")
    torch._dynamo.reset()
    with host.using("a"):
        kit.answer(model(**inputs)).pow(2).mean().backward()
    wanted = {n: p.grad.clone() for n, p in host.parameters("a").items()}  # type: ignore[union-attr]
    model.zero_grad()
    run = host.compile(backend="aot_eager")
    kit.answer(run("a", **inputs)).pow(2).mean().backward()
    assert all(torch.allclose(p.grad, wanted[n], atol=1e-5) for n, p in host.parameters("a").items())  # type: ignore[arg-type]
