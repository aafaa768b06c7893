"""`Root`: the hooks on the model itself.  Heads (port `logits`), the call's mask, pinned checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from intarsia.compose import LOGITS
from intarsia.errors import CompositionError
from intarsia.host.call import Call, Child, State, thread
from intarsia.host.given import Given, flat, rows_of
from intarsia.host.mirror import Mirror
from intarsia.host.replay import Pinned
from intarsia.host.seen import View
from intarsia.host.sequence import bind
from intarsia.host.socket import Slot, SlotAt
from intarsia.sites.address import Site


class Root(Child):
    """Child of the model.

    Args:
        site: the `logits` site.
        embedding: the model's word-embedding module, None if it has none.
        decoder: whether final states are the decoder's (its mask is then the one that counts).
    """

    def __init__(self, state: State, site: Site, embedding: nn.Module | None, decoder: bool) -> None:
        super().__init__(state)
        self.slot = Slot(site)
        self.__dict__["embedding"] = embedding
        self.__dict__["decoder"] = decoder
        self.__dict__["checkpointed"] = []
        self.__dict__["states"] = {}
        self.__dict__["mirror"] = None

    embedding: nn.Module | None
    decoder: bool
    record: Any
    checkpointed: list[nn.Module]
    states: dict[int, Tensor]
    mirror: Mirror | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "states": {}}

    @property
    def names(self) -> set[str]:
        return self.slot.names

    def active(self, call: Call) -> bool:
        return not self.names.isdisjoint(call.names)

    def pin(self) -> None:
        """Make every enabled checkpoint function one of ours."""
        for module in self.checkpointed:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not (isinstance(function, Pinned) and self._pins(function)):
                module._gradient_checkpointing_func = Pinned(self.state, function)  # type: ignore[assignment]

    def _pins(self, function: Any) -> bool:
        while isinstance(function, Pinned):
            if function.state is self.state:
                return True
            function = function.original
        return False

    def unpin(self) -> None:
        """Give the original checkpoint functions back."""
        for module in self.checkpointed:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, Pinned):
                if function.state is self.state:
                    module._gradient_checkpointing_func = function.original  # type: ignore[assignment]
                elif isinstance(function.original, Pinned) and function.original.state is self.state:
                    function.original = function.original.original

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if module.training and not torch.compiler.is_compiling():
            self.pin()
        call = self.state.current()
        if call is None:
            return
        if call.rows is not None:
            self.state.sizes[thread()] = rows_of({**{str(i): value for i, value in enumerate(args)}, **kwargs})
        if not self.active(call):
            return
        given = {**bind(module, args), **kwargs}
        front = "decoder_" if self.decoder else ""
        mask, ids = given.get(f"{front}attention_mask"), given.get(f"{front}input_ids")
        note = Given(rows=rows_of(given), stack=module, mask=flat(mask), ids=ids)
        self.state.given.setdefault(thread(), {})["logits"] = note

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook on the stack whose states feed heads, when that is not the model itself."""
        call = self.state.current()
        if call is not None and self.active(call):
            self.states[thread()] = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook (also after an exception): the head's logits take the place of the model's."""
        given = self.state.given.pop(thread(), {})
        states = self.states.pop(thread(), None)
        self.state.sizes.pop(thread(), None)
        call = self.state.current()
        if output is None or call is None or not self.active(call):
            return None
        if not isinstance(output, ModelOutput):
            raise CompositionError("a head needs the model's named outputs; call the model without return_dict=False")
        if states is None:
            states = output["last_hidden_state"]
        weight = None if self.embedding is None else self.embedding.weight
        seen = View(self.slot.site, call, input=states, given=given, embedding=weight, mirror=self.mirror)  # type: ignore[arg-type]
        logits = self._logits(call, seen, states, output.get("logits"))
        if logits is not None:
            output["logits"] = logits
        return output

    def _logits(self, call: Call, seen: View, states: Tensor, own: Tensor | None) -> Tensor | tuple[Tensor, ...] | None:
        if call.rows is None:
            return call.exprs[0].run(None, SlotAt(self.slot, seen, LOGITS))
        index = call.index(len(states), states.device)
        rows: list[Tensor | None] = [None] * len(states)
        for number, expression in enumerate(call.exprs):
            mine = (index == number).nonzero()[:, 0]
            if not len(mine):
                continue
            value = expression.run(None, SlotAt(self.slot, seen.of_rows(mine, len(states), number), LOGITS))
            if value is None:
                if own is None:
                    raise CompositionError(f"{expression} has no head, and neither has the model: its rows have no logits")
                value = own[mine]
            for row, logits in zip(mine.tolist(), value):
                rows[row] = logits
        found = [r for r in rows if r is not None]
        if len({tuple(r.shape) for r in found}) == 1:
            return torch.stack(found)
        return tuple(found)
