"""Running a model to look at what it does; what the base itself computes for a text: keys and values of every attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.host.attention import MemorySocket
from intarsia.host.call import thread

Batch = Mapping[str, Tensor]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What a model is given of a batch: all but the answers."""
    return {key: value for key, value in batch.items() if key != "labels"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every submodule is in its own former mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def memories(
    model: PreTrainedModel, sockets: Sequence[MemorySocket], ids: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [H_kv, T, d_head] that the base computes for token ids, per socket; both stacks read the same ids.

    Raises:
        SiteError: the model does not read token ids, or an id is outside its vocabulary.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    bad = [i for i in ids if not 0 <= i < vocabulary]
    if bad:
        raise SiteError(f"token id {bad[0]} is outside the vocabulary of {vocabulary}")
    if model.main_input_name != "input_ids":
        raise SiteError(f"{type(model).__name__} reads {model.main_input_name!r}, not token ids, so no text has keys and values there")
    batch = torch.tensor([list(ids)], device=model.device)
    inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch
    for socket in sockets:
        socket.caught[thread()] = None
    try:
        with evaluating(model):
            model(**inputs)
        found = [socket.caught[thread()] for socket in sockets]
    finally:
        for socket in sockets:
            socket.caught.pop(thread(), None)
    missing = [socket.slot.site.name for socket, pair in zip(sockets, found) if pair is None]
    if missing:
        raise SiteError(f"the attention at {missing[0]} did not run for this text, so it has no keys and values to start from")
    return [(pair[0][0], pair[1][0]) for pair in found if pair is not None]
