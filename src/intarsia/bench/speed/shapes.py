"""Models of usual shapes with random weights, and the two sides' training steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from intarsia.bench.speed.pairs import apart
from intarsia.host import Host
from intarsia.modules import Module
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import read_peft

ALL = r".*encoder.*\.(query|key|value|dense)"
QUERY_VALUE = r".*encoder.*\.(query|value)"


def bert(layers: int = 12, width: int = 768, dropout: float = 0.0, like: nn.Module | None = None) -> Any:
    """A BERT with random weights, or one that shares another's."""
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64), intermediate_size=4 * width,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    return model


def batch(rows: int, length: int, vocabulary: int = 30_000) -> dict[str, Tensor]:
    """Full-length rows and labels."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, vocabulary, (rows, length), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 3}


@contextlib.contextmanager
def peft_and_ours(model: Any, twin: Any, config: Any, name: str = "m") -> Iterator[tuple[Any, Host, Module]]:
    """peft's wrapper of `model` with random factors, and a host of `twin` that carries the same module."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        wrapped = get_peft_model(model, config)
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in key:
                nn.init.normal_(parameter, std=0.02)
    host = Host(twin)
    with TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        module, _ = read_peft(Path(folder), sites=resolve(twin), base=fingerprint(twin), weights=twin.state_dict(), name=name)
    host.insert(module, name=name)
    host.trainable(name)
    try:
        yield wrapped, host, module
    finally:
        host.close()


def answers_apart(wrapped: Any, host: Host, given: Mapping[str, Tensor], name: str = "m") -> tuple[float, float]:
    """How far the two sides' answers are apart, and how far the base's would be."""
    wrapped.eval()
    with torch.no_grad():
        wanted, bare = wrapped(**given).logits, host.model(**given).logits
        with host.using(name) as model:
            found = model(**given).logits
    return apart(found, wanted), apart(bare, wanted)


def step(model: Any, given: Mapping[str, Tensor], parameters: Any, using: Callable[[], Any] = contextlib.nullcontext) -> Callable[[], Tensor]:
    """A training step with fused AdamW."""
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-5, fused=True)

    def run() -> Tensor:
        with using():
            loss: Tensor = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, without parameters and buffers."""
    skip = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    total = sum(size for size, _ in seen.values())
    del out
    return total
