"""`Socket`: where deltas meet an activation.  One child per touched module and port, with one slot per site.

Order at a module: slots in the order they were first used; in a slot the expression decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from intarsia.compose import LOGITS, TENSORS, Algebra, Expr, Mix, Ref, Seq
from intarsia.errors import CompositionError
from intarsia.host.call import Call, Child, State, thread
from intarsia.host.parts import cut, paste
from intarsia.host.routing import answering, blended, router_of
from intarsia.host.seen import View
from intarsia.patches import Delta
from intarsia.sites.address import Site

_PRODUCTS = (nn.Linear, Conv1D)


def key_of(name: str) -> str:
    """A module or site name as a key for `nn.ModuleDict`: no dots, never the name of a method."""
    return "m_" + "".join(c if c.isalnum() and c.isascii() else f"_{ord(c):x}_" for c in name)


class Slot(nn.Module):
    """The deltas of all modules at one site.  May be a child of several sockets (tied weights)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.deltas = nn.ModuleDict()
        self.names: set[str] = set()

    def put(self, name: str, deltas: Sequence[Delta]) -> None:
        """Add a module's deltas, behind those it has here already."""
        key = key_of(name)
        if key not in self.deltas:
            self.deltas[key] = nn.ModuleList()
        for delta in deltas:
            self.deltas[key].append(delta)  # type: ignore[operator]
        self.names.add(name)

    def take(self, name: str) -> None:
        """Remove a module's deltas."""
        if name in self.names:
            del self.deltas[key_of(name)]
            self.names.discard(name)

    def of(self, name: str) -> Sequence[Delta]:
        """A module's deltas here, in patch order."""
        return self.deltas[key_of(name)] if name in self.names else ()  # type: ignore[return-value]


class SlotAt:
    """A slot during one forward: what `Expr.run` needs."""

    __slots__ = ("algebra", "seen", "slot")

    def __init__(self, slot: Slot, seen: View, algebra: Algebra) -> None:
        self.slot = slot
        self.seen = seen
        self.algebra = algebra

    def deltas(self, name: str) -> Sequence[Delta]:
        if self.algebra is LOGITS and self.seen.call.head not in (None, name):
            return ()
        return self.slot.of(name)

    def change(self, delta: Delta, h: Any) -> Any:
        return delta(h, self.seen)

    def routed(self, mix: Mix, h: Any) -> Any:
        if self.algebra is LOGITS:
            return answering(mix, h, self)
        if mix.space == "phi":
            return blended(mix, h, self)
        changes = [part.change(h, self) for part in mix.parts]
        if all(change is None for change in changes):
            return None
        return router_of(mix, self).mix(h, changes, self.seen, mix.top)

    def weights_of(self, mix: Mix, h: Any, members: Sequence[int]) -> Any:
        """Weights of a mixture of tensors, for the members that have something here."""
        if mix.router is None:
            return [mix.weights[i] for i in members]
        there = [h if i in members else None for i in range(len(mix.parts))]  # such a router does not look at changes
        form = router_of(mix, self)
        weights, here = form.weights(h, there, self.seen, mix.top)
        self.seen.note(form, weights, here)
        return weights

    def with_tensors(self, delta: Delta, tensors: dict[str, Tensor], h: Any) -> Any:
        """The change of a delta that has other tensors."""
        return functional_call(delta, tensors, (h, self.seen))

    def of_rows(self, rows: Tensor, size: int) -> SlotAt:
        """The same slot for some of the rows that are here."""
        return SlotAt(self.slot, self.seen.of_rows_here(rows, size), self.algebra)


class Consumer(Protocol):
    """What a tap serves."""

    def active(self, call: Call) -> bool:
        """Whether the call concerns it."""


class Tap(Child):
    """Remembers a module's input until the sockets that asked for it have run (per thread, never copied)."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.__dict__["consumers"] = {}
        self.__dict__["values"] = {}

    consumers: dict[int, Consumer]
    values: dict[tuple[int, int], Tensor]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        call = self.state.current()
        if call is None:
            return
        for number, consumer in self.consumers.items():
            if consumer.active(call):
                self.values[thread(), number] = first_tensor(args, kwargs)[1]

    def pop(self, consumer: int) -> Tensor | None:
        return self.values.pop((thread(), consumer), None)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """The hidden states a module was given, and their keyword (None if positional)."""
    if args and isinstance(args[0], Tensor):
        return None, args[0]
    for key in ("hidden_states", "hidden_state", "input", "inputs", "x", "inputs_embeds"):
        if isinstance(kwargs.get(key), Tensor):
            return key, kwargs[key]
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return key, value
    raise RuntimeError("a touched module was called without a tensor")


class Socket(Child):
    """Activation ports `out` and `in`."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.slots = nn.ModuleDict()
        self.__dict__["names"] = set()
        self.__dict__["taps"] = {}
        self.__dict__["norm"] = None
        self.__dict__["number"] = 0

    names: set[str]
    taps: dict[str, Tap]
    norm: nn.Module | None
    number: int

    def slot(self, site: Site) -> Slot:
        """The slot of a site, made if need be."""
        key = key_of(site.name)
        if key not in self.slots:
            self.slots[key] = Slot(site)
        return self.slots[key]  # type: ignore[return-value]

    def refresh(self) -> None:
        """Recompute which modules are present here."""
        self.names.clear()
        for slot in self.slots.values():
            self.names.update(slot.names)  # type: ignore[arg-type]

    def active(self, call: Call) -> bool:
        """Whether the call concerns this socket."""
        return not self.names.isdisjoint(call.names)

    def _call(self) -> Call | None:
        call = self.state.current()
        return call if call is not None and self.active(call) else None

    def _run(self, module: nn.Module, h: Tensor, call: Call, given: Tensor | None, fresh: bool = False) -> Tensor:
        values = {id(tap): tap.pop(self.number) for tap in dict.fromkeys(self.taps.values())}  # one may serve both
        surroundings: dict[str, Any] = {what: values[id(tap)] for what, tap in self.taps.items()}
        for slot in self.slots.values():
            site: Site = slot.site  # type: ignore[assignment]
            if slot.names.isdisjoint(call.names) or call.drops(site):  # type: ignore[union-attr, operator]
                continue
            if call.rows is not None:
                refuse_rows(site)
            noted = self.state.noted()
            seen = View(site, call, module=module, input=given, norm=self.norm, given=noted, state=self.state, **surroundings)
            part = h if site.view is None else cut(h, site)
            value = run_rows(call, part, seen, slot, fresh and site.view is None)  # type: ignore[arg-type]
            fresh = False
            h = value if site.view is None else paste(h, value, site)
        return h

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of port `out`."""
        call = self._call()
        if call is None:
            return None
        h = output[0] if isinstance(output, tuple) else output
        given = args[0] if args and isinstance(args[0], Tensor) else first_tensor(args, kwargs)[1]
        # a product nobody has seen yet may be overwritten: a linear layer keeps its input for the backward, not its output
        fresh = type(module) in _PRODUCTS and len(module._forward_hooks) == 1
        h = self._run(module, h, call, given, fresh)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of port `in`."""
        call = self._call()
        if call is None:
            return None
        key, h = first_tensor(args, kwargs)
        h = self._run(module, h, call, h)
        return ((h, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: h})


def refuse_rows(site: Site) -> None:
    """Rows of one batch cannot differ at a site that is computed once for all of them.

    Raises:
        CompositionError: the site and what to do instead.
    """
    if site.rowless or site.reused:
        raise CompositionError(
            f"the rows of one batch cannot have different modules at {site.name}: the model computes it once for all rows "
            "(a table of relative positions). Run the rows of each expression as a batch of their own"
        )


def run(expression: Expr, h: Tensor, at: SlotAt, fresh: bool) -> Tensor:
    """`expression.run(h, at)`; modules that stand one after the other are laid into `h` as they come (`Delta.enter`)."""
    if isinstance(expression, Ref):
        for delta in at.deltas(expression.name):
            h, fresh = delta.enter(h, at.seen, fresh), False
        return h
    if isinstance(expression, Seq):
        for part in expression.parts:
            h = run(part, h, at, fresh)
            fresh = fresh and untouched(part, at)
        return h
    return expression.run(h, at)


def untouched(expression: Expr, at: SlotAt) -> bool:
    """Whether an expression has nothing at this site."""
    return not any(at.deltas(ref.name) for ref in expression.refs())


def run_rows(call: Call, h: Tensor, seen: View, slot: Slot, fresh: bool = False) -> Tensor:
    """The value of a site: each row as its own expression says.  Rows are the first dimension of `h`."""
    if call.rows is None:
        return run(call.exprs[0], h, SlotAt(slot, seen, TENSORS), fresh)
    index = call.index(h.shape[0], h.device)
    for number, expression in enumerate(call.exprs):
        rows = (index == number).nonzero()[:, 0]
        if len(rows):
            part = h[rows]
            value = expression.run(part, SlotAt(slot, seen.of_rows(rows, h.shape[0], number), TENSORS))
            if value is not part:
                h = h.index_copy(0, rows, value.to(h.dtype))
    return h
