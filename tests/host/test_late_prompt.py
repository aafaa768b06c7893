"""Prompts behind the norm of the embeddings: the text keeps its positions, rows are as alone, others are refused."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import CompositionError, SpecError
from intarsia.host import Host
from intarsia.methods import Method, Patch, build
from intarsia.patches import Concat, Tokens
from tests import zoo
from tests.host.kit import disturb, run


def late(where: str = "start", length: int = 3) -> Method:
    form = Tokens(length, where, init="uniform", behind=True)  # type: ignore[arg-type]
    return Method("late", (Patch("prompt", "seq", form, Concat(), port="seq"),))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
@pytest.mark.parametrize("where", ["start", "after_first"])
def test_the_text_keeps_its_embeddings(family: str, where: str) -> None:
    """What the first block reads is the text's own embeddings with the prompt among them; outputs are the text's."""
    model, inputs = zoo.make(family)
    host = Host(model).add("a", late(where)).add("b", late(where), seed=1)
    disturb(host, "b", 1)
    seen: list[torch.Tensor] = []
    block = model.get_submodule(host.sites["0"].path)
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    bare = run(model, inputs)
    alone = []
    for name in "ab":
        with host.using(name):
            alone.append(run(model, inputs))
    handle.remove()
    text, prompted = seen[0], seen[1]
    cut = prompted[:, 3:] if where == "start" else torch.cat([prompted[:, :1], prompted[:, 4:]], 1)
    assert torch.equal(cut, text) and prompted.shape[1] == text.shape[1] + 3
    prompt = prompted[0, :3] if where == "start" else prompted[0, 1:4]
    assert torch.equal(prompt, host.tensors("a")["seq/prompt.embeddings"])
    assert alone[0].shape == bare.shape and not torch.allclose(alone[0], bare, atol=1e-3)
    with host.using(["a", "b"]):
        rows = run(model, inputs)
    for row in (0, 1):
        torch.testing.assert_close(rows[row], alone[row][row], atol=1e-5, rtol=1e-4)


def test_where_it_cannot_stand() -> None:
    for family in ("gpt2", "llama", "t5"):
        with pytest.raises(SpecError, match="normalises"):
            Host(zoo.make(family)[0]).add("m", late())
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", late()).add("b", build("prompt", length=3))
    with pytest.raises(CompositionError, match="one place"), host.using("a >> b"):
        run(model, inputs)
