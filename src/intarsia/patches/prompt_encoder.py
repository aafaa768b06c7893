"""The network behind the trained embeddings of P-tuning (Liu et al. 2021, arXiv 2103.10385), for `Tokens`.

    E [P, d] -> two bidirectional LSTM layers (d/2 each way) -> Linear -> ReLU -> Linear -> P [P, d]

After training only P is kept (`TokensForm` of the same values): the network is a way to train it, not part of the method's
function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import SpecError
from intarsia.patches.init import kaiming, uniform
from intarsia.patches.place import Place


class PromptEncoder(nn.Module):
    """[P, d] -> [P, d]."""

    def __init__(self, lstm: nn.LSTM, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.lstm = lstm
        for name, value in parameters.items():
            self.register_parameter(name, value)

    first: nn.Parameter
    first_bias: nn.Parameter
    second: nn.Parameter
    second_bias: nn.Parameter

    def forward(self, embeddings: Tensor) -> Tensor:
        x: Tensor = self.lstm(embeddings)[0]
        return F.linear(torch.relu(F.linear(x, self.first, self.first_bias)), self.second, self.second_bias)


def prompt_encoder(place: Place, width: int) -> PromptEncoder:
    """A fresh network for embeddings of `width`, filled from the place's generator as torch fills its layers."""
    if width % 2:
        raise SpecError(f"{place.site.name}: a bidirectional LSTM needs embeddings of even width, found {width}")
    lstm = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True, device="meta", dtype=place.dtype)
    if place.device.type != "meta":
        lstm.to_empty(device=place.device)
        with torch.no_grad():
            for parameter in lstm.parameters():
                start = place.parameter(*parameter.shape, fill=uniform(1 / math.sqrt(width // 2)))
                parameter.copy_(start)
    bias = uniform(1 / math.sqrt(width))
    parts: dict[str, nn.Parameter] = {}
    for name in ("first", "second"):
        parts |= {name: place.parameter(width, width, fill=kaiming), f"{name}_bias": place.parameter(width, fill=bias)}
    return PromptEncoder(lstm, parts)
