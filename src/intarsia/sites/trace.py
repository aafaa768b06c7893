"""One forward pass, written down: every module call, every attention, every parameter read from outside its module.

`trace` is for models nobody else uses (`infer` gives it a twin): it hooks every module.  What it finds is judged in
`infer.py`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intarsia.sites import structure

_numbers = itertools.count()


@dataclass(slots=True)
class Call:
    """One execution of a module.

    Attributes:
        start, end: ticks of a clock that counts all events of the forward pass.
        x: the first floating-point tensor among its inputs (`hidden_states` before all others), a copy.
        y: the first floating-point tensor of its output, a copy.
        ids: the first integer tensor among its inputs.
    """

    path: str
    module: nn.Module
    start: int
    end: int = -1
    x: Tensor | None = None
    y: Tensor | None = None
    ids: Tensor | None = None


@dataclass(slots=True)
class Core:
    """One attention computed by transformers' interface: queries `[B, H, T, D]`, keys and values `[B, G, S, D]`."""

    path: str
    time: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None = None


@dataclass(slots=True)
class Trace:
    """What happened, in the order in which calls began.

    Attributes:
        readers: paths of the modules that read a parameter of another one, by that one's path and the parameter's name.
    """

    calls: list[Call] = field(default_factory=list)
    cores: list[Core] = field(default_factory=list)
    readers: dict[tuple[str, str], set[str]] = field(default_factory=dict)


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in tensors_in(entry)]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return []


def _first(values: list[Tensor], floating: bool) -> Tensor | None:
    return next((value.clone() for value in values if value.is_floating_point() == floating), None)


class _Recorder:
    """Hooks on every module, and the stack of modules that are running."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self.clock = 0
        self.running: list[Call] = []
        self.paths = {module: path for path, module in model.named_modules()}
        self.owners = {id(owned.parameter): owned.owners for owned in structure.parameters(model)}
        self.handles = [
            handle
            for module in self.paths
            for handle in (
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                module.register_forward_hook(self.leave, with_kwargs=True),
            )
        ]

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tensors_in(args) if args else []
        if not args and isinstance(states := kwargs.get("hidden_states"), Tensor):
            given = [states]
        given += tensors_in(kwargs)
        for tensor in given:
            self.read(tensor)
        call = Call(self.paths[module], module, self.tick(), x=_first(given, True), ids=_first(given, False))
        self.trace.calls.append(call)
        self.running.append(call)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        call = self.running.pop()
        call.end = self.tick()
        call.y = _first(tensors_in(output), True)

    def read(self, tensor: Tensor) -> None:
        """Note that the running module uses a parameter; only uses outside its owners are of interest."""
        owners = self.owners.get(id(tensor))
        if owners is None or not self.running:
            return
        reader = self.running[-1].path
        if reader not in {path for path, _ in owners}:
            self.trace.readers.setdefault(owners[0], set()).add(reader)

    def attend(self, base: Callable[..., Any] | None) -> Callable[..., Any]:
        """An attention function that notes what it is given and passes it on."""

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function = base or eager or ALL_ATTENTION_FUNCTIONS["sdpa"]
            core = Core(self.paths[module], self.tick(), q.clone(), k.clone(), v.clone())
            self.trace.cores.append(core)
            output = function(module, q, k, v, mask, **kwargs)
            core.out = _first(tensors_in(output), True)
            return output

        return attention


class _Reads(TorchFunctionMode):
    """Shows the recorder every tensor that goes into an operation which computes a tensor."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if tensors_in(output):
            for tensor in tensors_in((args, kwargs)):
                self.recorder.read(tensor)
        return output


def trace(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Trace:
    """Run `model(**batch)` once and write down what happened.

    The model's hooks, its attention implementation and the registry of attention functions are as before afterwards,
    also after an exception.
    """
    probe = f"intarsia_probe_{next(_numbers)}"
    asked = any(structure.calls_interface(module) for module in model.modules())  # others branch on the names they know
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if asked and hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    implementation = model.config._attn_implementation or "eager"
    masks = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    recorder = _Recorder(model)
    try:
        ALL_ATTENTION_FUNCTIONS[probe] = recorder.attend(ALL_ATTENTION_FUNCTIONS.get(implementation))
        ALL_MASK_ATTENTION_FUNCTIONS[probe] = masks
        for config in configs.values():
            config._attn_implementation = probe
        with torch.no_grad(), _Reads(recorder):
            model(**batch)
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry.pop(probe, None)
        for handle in recorder.handles:
            handle.remove()
    return recorder.trace
