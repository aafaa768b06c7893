"""`SequenceSocket`: port `seq`.  Trained embeddings in a stack's token sequence (prompt tuning).

Hooks on the stack itself (the base model, or the encoder of a model with two stacks), not on the model with its head:

* before: embed the ids, put the prompt in, extend the mask, token types and positions
  (a prompt that enters `behind` the embeddings' norm leaves ids, types and positions alone: `Late` puts it in there);
* after: cut the prompt's positions out of the hidden states, so that heads, labels and `logits_to_keep` never notice
  (an encoder keeps them: the decoder attends to them, with its mask extended by `DecoderMask`).

With a cache the prompt enters with the first tokens only; later steps extend the mask and the positions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.compose import BLOCKS
from intarsia.errors import CompositionError
from intarsia.host.call import Call, Child, State, thread
from intarsia.host.seen import View
from intarsia.host.socket import Slot, SlotAt
from intarsia.patches.blocks import TokenBlock
from intarsia.sites.address import Site

CACHE_NAMES = ("cache", "past_key_values")


def insert(front: Tensor, rest: Tensor, where: str) -> Tensor:
    """`front` [B, P, ...] into `rest` [B, T, ...], at the start or behind the first position."""
    if where == "after_first":
        return torch.cat([rest[:, :1], front, rest[:, 1:]], 1)
    return torch.cat([front, rest], 1)


class SequenceSocket(Child):
    """The token sequence of one stack.

    Args:
        keep: leave the prompt's positions in the output (encoders that a decoder attends to).
    """

    def __init__(self, state: State, site: Site, keep: bool) -> None:
        super().__init__(state)
        self.slot = Slot(site)
        self.__dict__["keep"] = keep
        self.__dict__["running"] = {}
        self.__dict__["counts"] = {}
        self.__dict__["late"] = {}

    keep: bool
    late: dict[int, tuple[Tensor, str]]
    running: dict[int, tuple[int, int, str]]
    counts: dict[int, int]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": {}, "counts": {}, "late": {}}

    @property
    def names(self) -> set[str]:
        return self.slot.names

    def active(self, call: Call) -> bool:
        return not self.names.isdisjoint(call.names)

    def prompt(self, batch: int) -> tuple[Tensor, str, bool] | None:
        """Embeddings [B, P, d] of this call, where they go, and whether behind the norm."""
        call = self.state.current()
        if call is None or not self.active(call):
            return None
        site: Site = self.slot.site
        at = SlotAt(self.slot, View(site, call), BLOCKS)
        found: list[tuple[TokenBlock, ...]] = [e.run((), at) for e in call.exprs]
        if not any(found):
            return None
        places = {(b.where, b.behind) for blocks in found for b in blocks}
        if len(places) > 1:
            raise CompositionError(f"prompts of one call must stand in one place, found {sorted(w + ' behind the norm' * late for w, late in places)}")
        tensors = [torch.cat([b.embeddings for b in blocks], 0) if blocks else None for blocks in found]
        if call.rows is None:
            assert tensors[0] is not None
            return tensors[0].expand(batch, *tensors[0].shape), *places.pop()
        lengths = [0 if t is None else len(t) for t in tensors]
        if len(set(lengths)) > 1:
            raise CompositionError(
                f"rows of one batch have prompts of different lengths {sorted(set(lengths))}: positions would differ from a "
                "run of each row alone. Split the batch by expression, or train prompts of one length"
            )
        index = call.index(batch, tensors[0].device)  # type: ignore[union-attr]
        return torch.stack([t for t in tensors if t is not None])[index], *places.pop()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook with keywords."""
        self.running.pop(thread(), None)
        self.counts.pop(thread(), None)
        self.late.pop(thread(), None)
        call = self.state.current()
        if call is None or not self.active(call):
            return None
        kwargs = {**bind(module, args), **kwargs}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return None
        batch, length = tokens.shape[:2]
        found = self.prompt(batch)
        if found is None:
            return (), kwargs
        prompt, where, behind = found
        count = self.counts[thread()] = prompt.shape[1]
        past = next((kwargs[k] for k in CACHE_NAMES if kwargs.get(k) is not None), None)
        first = past is None or past.get_seq_length() == 0
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            kwargs["attention_mask"] = insert(mask.new_ones(batch, count), mask, where)
        elif mask is not None:
            raise CompositionError(
                f"a prompt needs the attention mask as [batch, length], found {mask.dim()} dimensions; pass a 2-D mask"
            )
        if behind:
            if first:
                self.late[thread()] = prompt, where
                self.running[thread()] = (count, length + count, where)
            return (), kwargs
        self._positions(kwargs, batch, count, where, first)
        if first:
            kwargs["inputs_embeds"] = insert(
                prompt.to(embeds.dtype if embeds is not None else self._embedding(module).weight.dtype),
                self._embedding(module)(ids) if embeds is None else embeds,
                where,
            )
            kwargs["input_ids"] = None
            types = kwargs.get("token_type_ids")
            if types is not None:
                kwargs["token_type_ids"] = insert(types.new_zeros(batch, count), types, where)
            self.running[thread()] = (count, length + count, where)
        return (), kwargs

    def _positions(self, kwargs: dict[str, Any], batch: int, count: int, where: str, first: bool) -> None:
        """Positions count the prompt's tokens as tokens."""
        kwargs.pop("cache_position", None)
        positions = kwargs.get("position_ids")
        if positions is None:
            return
        if not first:
            kwargs["position_ids"] = positions + count
            return
        start = positions.min(1, keepdim=True).values if where == "start" else positions[:, :1] + 1
        front = start + torch.arange(count, device=positions.device)[None]
        if where == "after_first":
            kwargs["position_ids"] = torch.cat([positions[:, :1], front, positions[:, 1:] + count], 1)
        else:
            kwargs["position_ids"] = torch.cat([front, positions + count], 1)

    @staticmethod
    def _embedding(module: nn.Module) -> Any:
        return module.get_input_embeddings()  # type: ignore[operator]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: cut the prompt's positions out of what the stack returns."""
        note = self.running.pop(thread(), None)
        if note is None or self.keep:
            return None
        count, total, where = note

        def shorten(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == total:
                return torch.cat([value[:, :1], value[:, 1 + count :]], 1) if where == "after_first" else value[:, count:]
            if isinstance(value, tuple):
                return tuple(shorten(v) for v in value)
            return value

        if isinstance(output, tuple):
            return shorten(output)
        for field in ("last_hidden_state", "hidden_states"):
            if output.get(field) is not None:
                output[field] = shorten(output[field])
        return output


class Late(Child):
    """Puts a prompt in behind the norm of the embeddings.

    Args:
        socket: what knows the prompt; it belongs to the stack.
    """

    def __init__(self, state: State, socket: SequenceSocket) -> None:
        super().__init__(state)
        self.__dict__["socket"] = socket

    socket: SequenceSocket

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the norm."""
        found = self.socket.late.pop(thread(), None)
        return None if found is None else insert(found[0].to(output.dtype), output, found[1])


class DecoderMask(Child):
    """Extends a decoder's mask over encoder states that carry a prompt."""

    def __init__(self, state: State, names: set[str]) -> None:
        super().__init__(state)
        self.__dict__["names"] = names

    names: set[str]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.state.current()
        if call is None or self.names.isdisjoint(call.names):
            return None
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or mask is None or mask.dim() != 2:
            return None
        missing = states.shape[1] - mask.shape[1]
        if missing <= 0:
            return None
        return args, {**kwargs, "encoder_attention_mask": torch.cat([mask.new_ones(len(mask), missing), mask], 1)}


def bind(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of a forward by name."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args))
