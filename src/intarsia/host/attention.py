"""`MemorySocket`: port `mem`.  Keys and values put in front of what an attention sees (prefix tuning and kin).

transformers routes every attention through one function chosen by `config._attn_implementation`.  Importing this module
registers `intarsia_sdpa` and `intarsia_eager`: they put the module's keys and values in front, extend the mask and the
position bias, and call the implementation that was configured.  The cache never holds prefix positions (they are put
in front again at every step), so generation, beams and checkpointing are right by construction.

Keys enter after the key projection and after rotary embedding: prefixes have no position.  A relative position bias (T5)
is 0 on prefix columns, unless a block asks for that of the distance (`MemoryBlock.relative`).  Blocks with a gate have a softmax of their own, whose result is added to the heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intarsia.compose import BLOCKS
from intarsia.errors import CompositionError, SiteError
from intarsia.host.call import Call, Child, State, thread
from intarsia.host.seen import View
from intarsia.host.socket import Slot, SlotAt, Tap
from intarsia.patches.blocks import MemoryBlock
from intarsia.sites.address import Site

PREFIX = "intarsia_"
BASES = ("sdpa", "eager")


class MemorySocket(Child):
    """The memory site of one attention module."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.slot = Slot(site)
        self.__dict__["tap"] = None
        self.__dict__["table"] = None
        self.__dict__["number"] = 0
        self.__dict__["caught"] = {}

    tap: Tap | None
    table: nn.Module | None
    number: int
    caught: dict[int, tuple[Tensor, Tensor] | None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "caught": {}}

    @property
    def names(self) -> set[str]:
        return self.slot.names

    def active(self, call: Call) -> bool:
        return not self.names.isdisjoint(call.names)

    def fronts(self, keys: Tensor) -> tuple[Front | None, list[Front]]:
        """What this call puts in front of keys [B, H_kv, T, d]: blocks that share their softmax, and those with their own."""
        if thread() in self.caught:
            return None, []
        call = self.state.current()
        reads = None if self.tap is None else self.tap.pop(self.number)
        site: Site = self.slot.site
        if call is None or not self.active(call) or call.drops(site):
            return None, []
        seen = View(site, call, reads=reads, given=self.state.noted())
        if call.rows is None:
            rows: list[Tensor | None] = [None]
            found: list[tuple[MemoryBlock, ...]] = [call.exprs[0].run((), SlotAt(self.slot, seen, BLOCKS))]
        else:
            index = call.index(keys.shape[0], keys.device)
            rows, found = [], []
            for number, expression in enumerate(call.exprs):
                mine = (index == number).nonzero()[:, 0]
                if len(mine):
                    part = seen.of_rows(mine, keys.shape[0], number)
                    rows.append(mine)
                    found.append(expression.run((), SlotAt(self.slot, part, BLOCKS)))
        shared = Front.of([tuple(b for b in blocks if b.gate is None) for blocks in found], rows, keys)
        own = [[b for b in blocks if b.gate is not None] for blocks in found]
        depth = max(map(len, own))
        apart = [Front.of([tuple(blocks[i : i + 1]) for blocks in own], rows, keys) for i in range(depth)]
        return shared, [front for front in apart if front is not None]

    def bias(self, module: Any, front: Front, like: Tensor) -> Tensor:
        """Relative position bias of the columns in front, [1 or B, H, Q, P], beside that of the others [1 or B, H, Q, K]."""
        count = front.keys.shape[2]
        zero = bias_in_front(like, count)
        given = None if front.relative is None else self.state.noted().get(self.slot.site.stack)
        if front.relative is None or given is None or self.table is None:
            return zero
        query = torch.arange(like.shape[-2], device=like.device)[None] + given.past
        if given.mask is not None:
            query = query - given.mask.long().argmax(1, keepdim=True)  # padding in front of a text is no distance
        distance = torch.arange(-count, 0, device=like.device) - query[..., None]
        found = self.looked_up(module, distance, like)
        return torch.where(front.relative[:, None, None, :], found, found.new_zeros(()))

    def looked_up(self, module: Any, distance: Tensor, like: Tensor) -> Tensor:
        """The bias of distances [B, Q, K] from query to key, [B, H, Q, K]."""
        assert self.table is not None
        buckets = module._relative_position_bucket(
            distance, bidirectional=not module.is_decoder, num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )  # fmt: skip
        return self.table(buckets).permute(0, 3, 1, 2).to(like.dtype)

    def shifted(self, module: Any, front: Front, bias: Tensor) -> Tensor:
        """The position bias of text and positions in front that shift it, [B, H, Q, P + K], from that of the text alone."""
        given = self.state.noted().get(self.slot.site.stack)
        if given is None or self.table is None:
            return torch.cat([bias_in_front(bias, front.keys.shape[2]), bias], -1)
        count, length = front.keys.shape[2], bias.shape[-1]
        assert front.shift is not None
        query = torch.arange(bias.shape[-2], device=bias.device)[None, :, None] + given.past
        key = torch.arange(length, device=bias.device)[None, None]
        moved = self.looked_up(module, key + front.shift[:, None, None] - query, bias) - self.looked_up(module, key - query, bias)
        first = torch.arange(-count, 0, device=bias.device)[None, None] + front.shift[:, None, None]
        ahead = self.looked_up(module, first - query, bias)
        rows = max(len(ahead), len(bias))
        return torch.cat([ahead.expand(rows, *ahead.shape[1:]), (bias + moved).expand(rows, *bias.shape[1:])], -1)


@dataclass(frozen=True, slots=True)
class Front:
    """Keys and values in front of an attention's own.

    Attributes:
        keys, values: [B, H_kv, P, d].
        valid: which of them are there for a row, [B, P]; None: all for all.
        gate: strength per row, [B], of blocks with a softmax of their own.
        relative: which of them have a relative position, [1 or B, P]; None: none has.
        shift: by how many positions the text of a row moves, [1 or B]; None: by none.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    gate: Tensor | None = None
    relative: Tensor | None = None
    shift: Tensor | None = None

    @classmethod
    def of(cls, found: Sequence[tuple[MemoryBlock, ...]], rows: Sequence[Tensor | None], like: Tensor) -> Front | None:
        """The blocks of each expression, for its rows (None: all rows), in the dtype of `like` [B, H_kv, T, d]."""
        batch = like.shape[0]
        if not any(found):
            return None
        if rows[0] is None:
            keys, values = joined(found[0], batch, like.dtype)
            return cls(keys, values, None, strength(found[0], batch, like.dtype), measured(found[0], like.device), shift_of(found[0], like.device))
        longest = max(sum(b.length for b in blocks) for blocks in found)
        empty = like.new_zeros(batch, like.shape[1], longest, like.shape[3])
        front = cls(empty, empty, torch.zeros(batch, longest, dtype=torch.bool, device=like.device))
        for blocks, mine in zip(found, rows):
            if blocks and mine is not None:
                front = front.with_rows(blocks, mine)
        return front

    def with_rows(self, blocks: tuple[MemoryBlock, ...], mine: Tensor) -> Front:
        """The blocks of one expression written to its rows, at the end of the positions."""
        assert self.valid is not None
        count, longest = len(mine), self.keys.shape[2]
        keys, values = joined(blocks, count, self.keys.dtype)
        missing = longest - keys.shape[2]
        put = [old.index_copy(0, mine, F.pad(new, (0, 0, missing, 0))) for old, new in ((self.keys, keys), (self.values, values))]
        there = (torch.arange(longest, device=mine.device) >= missing).expand(count, longest)
        gate, strengths = self.gate, strength(blocks, count, self.keys.dtype)
        if strengths is not None:
            gate = keys.new_zeros(len(self.keys)) if gate is None else gate
            gate = gate.index_copy(0, mine, strengths)
        relative, some = self.relative, measured(blocks, mine.device)
        if some is not None:
            relative = torch.zeros_like(self.valid) if relative is None else relative
            relative = relative.index_copy(0, mine, F.pad(some, (missing, 0)).expand(count, longest))
        shift, some = self.shift, shift_of(blocks, mine.device)
        if some is not None:
            shift = torch.zeros(len(self.keys), dtype=some.dtype, device=mine.device) if shift is None else shift
            shift = shift.index_copy(0, mine, some.expand(count))
        return Front(put[0], put[1], self.valid.index_copy(0, mine, there), gate, relative, shift)

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """gate * softmax(q K^T) V over these positions alone, [B, T, H, d]."""
        assert self.gate is not None
        mask = None
        if self.valid is not None:  # a row without any has gate 0: let it look at all
            mask = (self.valid | ~self.valid.any(1, keepdim=True))[:, None, None, :]
        groups = query.shape[1] // self.keys.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (self.keys, self.values))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return (out * self.gate[:, None, None, None]).transpose(1, 2)


def joined(blocks: Sequence[MemoryBlock], batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All blocks as one pair of tensors [batch, H_kv, P, d]."""

    def whole(tensor: Tensor) -> Tensor:
        return (tensor if tensor.dim() == 4 else tensor.expand(batch, *tensor.shape)).to(dtype)

    keys, values = [whole(b.keys) for b in blocks], [whole(b.values) for b in blocks]
    return (keys[0], values[0]) if len(blocks) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


def measured(blocks: Sequence[MemoryBlock], device: torch.device) -> Tensor | None:
    """Which positions of some blocks have a relative position, [1, P]; None if none has."""
    if not any(b.relative for b in blocks):
        return None
    return torch.tensor([[b.relative for b in blocks for _ in range(b.length)]], device=device)


def shift_of(blocks: Sequence[MemoryBlock], device: torch.device) -> Tensor | None:
    """By how many positions some blocks move the text, [1]; None if none does."""
    if not any(b.shifts for b in blocks):
        return None
    if not all(b.shifts for b in blocks):
        raise CompositionError("a prefix that moves the text's positions (shifts) cannot stand beside one that does not")
    return torch.tensor([sum(b.length for b in blocks)], device=device)


def strength(blocks: Sequence[MemoryBlock], batch: int, dtype: torch.dtype) -> Tensor | None:
    """The gate of a block with its own softmax, [batch]."""
    gate = blocks[0].gate
    return None if gate is None else gate.to(dtype).expand(batch)


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file a module's class (or one of its parents) is defined in."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise SiteError(f"{type(module).__name__} has no eager attention to call; load the base with attn_implementation='sdpa'")


def widen(mask: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """A [B or 1, 1 or H, Q, K] mask with `count` visible columns in front (those of `valid` [B, count], if given)."""
    shape = (*mask.shape[:-1], count)
    if mask.dtype == torch.bool:
        front = mask.new_ones(shape)
        if valid is not None:
            front = front & valid[:, None, None, :]
    else:
        front = mask.new_zeros(shape)
        if valid is not None:
            front = front.masked_fill(~valid[:, None, None, :], torch.finfo(mask.dtype).min)
    if front.shape[0] != mask.shape[0]:
        mask = mask.expand(front.shape[0], *mask.shape[1:])
    return torch.cat([front, mask], -1)


def plain_mask(query: Tensor, keys: Tensor, causal: bool, additive: bool) -> Tensor:
    """The mask an implementation would have applied by itself, written out: [1, 1, Q, K]."""
    q, k = query.shape[2], keys.shape[2]
    mask = torch.ones(q, k, dtype=torch.bool, device=query.device)
    if causal:
        mask = mask.tril(k - q)
    if additive:
        return torch.zeros(q, k, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)[None, None]
    return mask[None, None]


def bias_in_front(bias: Tensor, count: int) -> Tensor:
    """Relative position bias of `count` prefix columns: none, they have no position."""
    return bias.new_zeros(*bias.shape[:-1], count)


def attention(base: str) -> Callable[..., Any]:
    """The attention function registered as `intarsia_<base>`."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        run = ALL_ATTENTION_FUNCTIONS[base] if base != "eager" else eager_of(module)
        apart: list[Front] = []
        bare = (key, value)
        for socket in module._modules.values():
            if not isinstance(socket, MemorySocket):
                continue
            if thread() in socket.caught:
                socket.caught[thread()] = bare
            front, own = socket.fronts(key)
            apart += own
            if front is None:
                continue
            valid, count = front.valid, front.keys.shape[2]
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
            if attention_mask is None and (causal or valid is not None):
                attention_mask = plain_mask(query, key, causal, additive=base == "eager")
            if attention_mask is not None:
                attention_mask = widen(attention_mask[..., : key.shape[2]], count, valid)
            if position_bias is not None and front.shift is not None:
                position_bias = socket.shifted(module, front, position_bias)
            elif position_bias is not None:
                columns = socket.bias(module, front, position_bias)
                rows = max(len(columns), len(position_bias))
                position_bias = torch.cat([t.expand(rows, *t.shape[1:]) for t in (columns, position_bias)], -1)
            key = torch.cat([front.keys, key], 2)
            value = torch.cat([front.values, value], 2)
            if base != "eager":
                is_causal = False
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        result = run(module, query, key, value, attention_mask, **kwargs)
        if not apart:
            return result
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return (result[0] + sum(front.attend(query, scale) for front in apart), *result[1:])

    return attend


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, attention(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
