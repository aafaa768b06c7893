"""`WeightSocket`: port `weight`.  The effective parameter is lent to its module for one forward and then taken back.

    W_eff = expr.run(W)          in the forward pre-hook; `module._parameters[name]` holds it during the forward

One socket per module, so that several parameters (or several parts of one fused parameter) are lent and returned
together.  Recomputation under gradient checkpointing lends again, so it is right by construction.

Rows with different expressions: every parameter of a transformer enters its own op linearly, so mixing effective weights
per row equals mixing the op's outputs per row.  The module runs once per distinct expression on its rows.

A lent weight is visible to other threads; a lock per module makes the loan exclusive for that one op.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.compose import TENSORS
from intarsia.errors import CompositionError, SiteError
from intarsia.host.call import CALLS, Call, Child, State
from intarsia.host.parts import cut, paste
from intarsia.host.seen import View
from intarsia.host.socket import Slot, SlotAt, key_of, refuse_rows, run
from intarsia.sites.address import Site

POSITIONS = key_of("embed.position.weight").removeprefix("m_")


class WeightSocket(Child):
    """All weight sites read during one module's forward."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.slots = nn.ModuleDict()
        self.__dict__["names"] = set()
        self.__dict__["owners"] = {}
        self.__dict__["lent"] = []
        self.__dict__["holder"] = None
        self.__dict__["lock"] = threading.Lock()

    names: set[str]
    owners: dict[str, tuple[nn.Module, str]]
    lent: list[tuple[nn.Module, str, Tensor]]
    holder: int | None
    lock: threading.Lock

    def __getstate__(self) -> dict[str, Any]:
        return {**{k: v for k, v in self.__dict__.items() if k != "lock"}, "lent": [], "holder": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        super().__setstate__(values)
        self.__dict__["lock"] = threading.Lock()

    def adopt(self, slot: Slot, key: str, owner: nn.Module, param: str) -> None:
        """Serve a slot here: its value is parameter `param` of `owner`."""
        self.slots[key] = slot
        self.owners[key] = (owner, param)

    def refresh(self) -> None:
        self.names.clear()
        for slot in self.slots.values():
            self.names.update(slot.names)  # type: ignore[arg-type]

    def active(self, call: Call) -> bool:
        return not self.names.isdisjoint(call.names)

    def _lend(self, call: Call, number: int) -> None:
        """Put the effective parameters of expression `number` in place."""
        for key, slot in self.slots.items():
            if slot.names.isdisjoint(call.names):  # type: ignore[union-attr, operator]
                continue
            owner, param = self.owners[key]
            current = owner._parameters[param]
            assert current is not None
            if current.device.type == "meta":
                raise SiteError(
                    f"{slot.site.name}: the weight is offloaded (on the meta device) when its module runs; methods that "  # type: ignore[union-attr]
                    "change weights need it in place. Fold the module into the base, or load the base without offloading"
                )
            site: Site = slot.site  # type: ignore[assignment]
            value = effective(current, site, partial(run, call.exprs[number], fresh=False), SlotAt(slot, View(site, call, module=owner), TENSORS))  # type: ignore[arg-type]
            if value is not current:
                self.lent.append((owner, param, current))
                owner._parameters[param] = value  # type: ignore[assignment]

    def _return(self) -> None:
        while self.lent:
            owner, param, value = self.lent.pop()
            owner._parameters[param] = value  # type: ignore[assignment]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: lend."""
        if not torch.compiler.is_compiling():  # also without a call of one's own: another thread may be lending
            self.lock.acquire()
            self.__dict__["holder"] = threading.get_ident()
        call = self.state.current()
        if call is None or not self.active(call):
            return
        if call.rows is None:
            self._lend(call, 0)
        else:
            for slot in self.slots.values():
                if not slot.names.isdisjoint(call.names):  # type: ignore[union-attr, operator]
                    refuse_rows(slot.site)  # type: ignore[arg-type]

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook (also after an exception): take back; with rows, run each expression on its rows."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.holder != threading.get_ident():
            return None
        try:
            self._return()
            call = self.state.current()
            if output is None or call is None or call.rows is None or not self.active(call):
                return None
            return self._rowwise(module, args, kwargs, output, call)
        finally:
            if not compiling:
                self.__dict__["holder"] = None
                self.lock.release()

    def _rowwise(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, call: Call
    ) -> Any:
        if isinstance(output, tuple) and all(isinstance(o, Tensor) for o in output):
            return self._merge(module, args, kwargs, output, call)
        if not isinstance(output, Tensor):
            raise CompositionError(
                f"{module.__class__.__name__} returns {type(output).__name__}; its weights cannot differ between the "
                "rows of one batch. Split the batch by expression"
            )
        return self._merge(module, args, kwargs, (output,), call)[0]

    def _merge(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...], call: Call
    ) -> tuple[Tensor, ...]:
        batch = self.state.sizes.get(threading.get_ident())
        table = output[0].dim() == 2 and any(key.endswith(POSITIONS) for key in self.slots)
        if table:  # [T, d], added to every row
            output = tuple(o[None] for o in output)
        size = output[0].shape[0]
        if size == 1 and batch is not None and batch > 1:  # the same for all rows
            output = tuple(o.expand(batch, *o.shape[1:]) for o in output)
        index = call.index(output[0].shape[0], output[0].device)
        for number, expression in enumerate(call.exprs):
            if self.names.isdisjoint(name.name for name in expression.refs()):
                continue
            rows = (index == number).nonzero()[:, 0]
            if not len(rows):
                continue

            def part(value: Any, rows: Tensor = rows) -> Any:
                if isinstance(value, Tensor) and value.dim() and value.shape[0] == size > 1:
                    return value[rows]
                return value

            # modules inside this one see only these rows, all with this expression
            alone = call.alone(number, rows, output[0].shape[0])
            token = CALLS.set({**CALLS.get(), self.state: alone})
            try:
                self._lend(alone, 0)
                value = module.forward(*map(part, args), **{k: part(v) for k, v in kwargs.items()})
            finally:
                self._return()
                CALLS.reset(token)
            values = value if isinstance(value, tuple) else (value[None] if table else value,)
            output = tuple(
                o.index_copy(0, rows, v.expand(len(rows), *v.shape[1:]).to(o.dtype)) for o, v in zip(output, values)
            )
        return output


def effective(current: Tensor, site: Site, run: Any, at: SlotAt) -> Tensor:
    """The parameter after an expression, in the module's own layout.

    Forms see parameters as (out, in), cut to the site's view, in the dtype the parameter is stored in.
    """
    whole = current.t() if site.transposed and current.dim() == 2 else current
    part = whole if site.view is None else cut(whole, site, dim=0)
    value = run(part, at)
    if value is part:
        return current
    value = value.to(current.dtype)
    whole = value if site.view is None else paste(whole, value, site, dim=0)
    return whole.t() if site.transposed and current.dim() == 2 else whole


def slot_key(site: Site) -> str:
    """Key of a weight slot within a socket."""
    return key_of(site.name)
