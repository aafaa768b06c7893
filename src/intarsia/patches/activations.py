"""Non-linearities by the names papers and configurations use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from intarsia._registry import Registry

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: Registry[Activation] = Registry("activation")
_TABLE: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": F.tanh,
    "leakyrelu": F.leaky_relu,
    "identity": lambda x: x,
}
for _name, _function in _TABLE.items():
    ACTIVATIONS.add(_name, _function)
