"""Views of a model that leave out blocks: a shorter model beside the frozen one, made of the same parts.

    upto(model, blocks, k)       runs blocks 0 .. k-1 and keeps what the last of them gave
    beyond(model, blocks, k)     runs blocks k .. and takes what block k-1 gave from outside

Only the modules on the way to the list of blocks are copied, shallowly: parameters, hooks and everything that a host laid into
the model are the same objects, and the model itself is not touched.  What a model computes before its first block (masks,
positions) is computed as always.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.host.given import Watch
from intarsia.host.host import Host


def blocks(host: Host) -> tuple[str, int]:
    """Path of the list of blocks and their number.

    Raises:
        SiteError: the model's blocks cannot be left out; the reason.
    """
    model, layers = host.model, host.sites.layers
    kind = type(model).__name__
    if model.config.is_encoder_decoder or list(layers) != [""]:
        raise SiteError(f"{kind} has two stacks, or shares something between its blocks")
    count = layers[""]
    paths = [host.sites[str(layer)].path.rpartition(".") for layer in range(count)]
    if len({parent for parent, _, _ in paths}) != 1 or [last for _, _, last in paths] != [str(i) for i in range(count)]:
        raise SiteError(f"the blocks of {kind} do not stand in one list")
    path = paths[0][0]
    found = model.get_submodule(path)
    if not isinstance(found, nn.ModuleList) or len(found) != count or ("stem" in host.sites and host.sites["stem"].port == "out"):
        raise SiteError(f"the blocks of {kind} do not stand in one list, or run several times")
    if any("relative_attention_bias" in name for name, _ in found.named_modules()):
        raise SiteError(f"block 0 of {kind} computes positions for the others")
    return path, count


def reads_blocks(host: Host, name: str) -> bool:
    """Whether a module reads what every block gives, so that none can be left out."""
    return any(isinstance(part, Watch) and name in part.tapping for part in host.model.modules())


def along(model: nn.Module, path: str) -> tuple[nn.Module, nn.Module, str]:
    """A shallow copy of a model in which the modules on the way to `path` are copies too: (copy, copy of the parent, last word)."""
    root = parent = _shallow(model)
    *way, last = path.split(".")
    for word in way:
        child = _shallow(parent._modules[word])
        parent._modules[word] = child
        parent = child
    return root, parent, last


def _shallow(module: Any) -> Any:
    found = module.__class__.__new__(module.__class__)
    found.__dict__.update(module.__dict__)
    found.__dict__["_modules"] = dict(module._modules)
    return found


class Given:
    """Stands where a left-out block stood: a copy of it whose forward gives what was put in, or else what it is given.

    It keeps its parts, since some models look into their first block (X-MOD for its languages), and its place in the list, since
    some number their blocks.

    Args:
        block: the left-out block.
        behind: what a block gives behind its states, None if it gives a tensor alone.
    """

    def __init__(self, block: nn.Module, behind: tuple[None, ...] | None) -> None:
        stand_in: Any = _shallow(block)
        for word in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
                     "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks"):  # fmt: skip
            stand_in.__dict__[word] = OrderedDict()
        stand_in.__dict__["gradient_checkpointing"] = False
        stand_in.__dict__["forward"] = self.forward
        self.module: nn.Module = stand_in
        self.behind = behind
        self.value: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.value
        if states is None:
            states = args[0] if args else kwargs["hidden_states"]
        return states if self.behind is None else (states, *self.behind)


class Beyond:
    """A model that begins behind block k-1.

    Attributes:
        model: the view; call it like the model, after `put`.
    """

    def __init__(self, model: nn.Module, path: str, k: int, behind: tuple[None, ...] | None) -> None:
        self.model, parent, last = along(model, path)
        every = list(parent._modules[last].children())  # type: ignore[union-attr]
        left = [Given(block, behind) for block in every[:k]]
        self._last = left[-1]
        parent._modules[last] = nn.ModuleList([*(given.module for given in left), *every[k:]])

    def put(self, states: Tensor | None) -> None:
        """What block k-1 gives in the next calls, [B, T, d]."""
        self._last.value = states


class Upto:
    """A model that ends behind block k-1; what comes after runs on its states, and its answer is not to be used.

    Attributes:
        states: what block k-1 gave last, [B, T, d].
        behind: what it gives behind the states, None if it gives a tensor alone.
    """

    def __init__(self, model: PreTrainedModel, path: str, k: int) -> None:
        base: Any = model.base_model  # without a head: its answer is not wanted, and may be the largest product of all
        prefix = next(name for name, module in model.named_modules() if module is base)
        self.model, parent, last = along(base, path[len(prefix) + 1 :] if prefix else path)
        every = list(parent._modules[last].children())  # type: ignore[union-attr]
        final = _shallow(every[k - 1])
        final.__dict__["_forward_hooks"] = OrderedDict(final._forward_hooks)
        final.register_forward_hook(self._keep)
        self._rest = [Given(block, None) for block in every[k:]]
        parent._modules[last] = nn.ModuleList([*every[: k - 1], final, *(given.module for given in self._rest)])
        self.states: Tensor | None = None
        self.behind: tuple[None, ...] | None = None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            if any(part is not None for part in output[1:]):
                raise SiteError(f"a {type(module).__name__} gives more than its states")
            self.behind = output[1:]
        for given in self._rest:
            given.behind = self.behind
        self.states = output[0] if isinstance(output, tuple) else output
