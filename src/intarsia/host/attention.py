"""`MemorySocket`: port `mem`.  Keys and values put in front of what an attention sees (prefix tuning and kin).

transformers routes every attention through one function chosen by `config._attn_implementation`.  Importing this module
registers `intarsia_sdpa` and `intarsia_eager`: they put the module's keys and values in front, extend the mask and the
position bias, and call the implementation that was configured.  The cache never holds prefix positions (they are put
in front again at every step), so generation, beams and checkpointing are right by construction.

Keys enter after the key projection and after rotary embedding: prefixes have no position.  A relative position bias (T5)
is 0 on prefix columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intarsia.compose import BLOCKS
from intarsia.errors import SiteError
from intarsia.host.call import Call, Child, State
from intarsia.host.seen import View
from intarsia.host.socket import Slot, SlotAt
from intarsia.patches.blocks import MemoryBlock
from intarsia.sites.address import Site

PREFIX = "intarsia_"
BASES = ("sdpa", "eager")


class MemorySocket(Child):
    """The memory site of one attention module."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.slot = Slot(site)

    @property
    def names(self) -> set[str]:
        return self.slot.names

    def active(self, call: Call) -> bool:
        return not self.names.isdisjoint(call.names)

    def prefix(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values [B, H_kv, P, d] of this call and which of them are real, [B, P] (None: all)."""
        call = self.state.current()
        if call is None or not self.active(call):
            return None
        site: Site = self.slot.site
        batch = keys.shape[0]
        at = SlotAt(self.slot, View(site, call, input=query), BLOCKS)
        if call.rows is None:
            found = gather(call.exprs[0].run((), at), keys)
            if found is None:
                return None
            pk, pv = (t if t.dim() == 4 else t.expand(batch, *t.shape) for t in found)
            return pk, pv, None
        parts = [gather(e.run((), at), keys) for e in call.exprs]
        longest = max((0 if p is None else p[0].shape[-2]) for p in parts)
        if longest == 0:
            return None
        empty = keys.new_zeros(keys.shape[1], 0, keys.shape[3])
        filled, valid = [], []
        for part in parts:
            pair = part or (empty, empty)
            length = pair[0].shape[-2]
            front = keys.new_zeros(keys.shape[1], longest - length, keys.shape[3])
            filled.append(torch.stack([torch.cat([front, tensor], 1) for tensor in pair]))
            valid.append(torch.arange(longest, device=keys.device) >= longest - length)
        index = call.index(batch, keys.device)
        front_keys, front_values = torch.stack(filled)[index].unbind(1)
        return front_keys, front_values, torch.stack(valid)[index]


def gather(blocks: Sequence[MemoryBlock], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """All blocks as one pair of tensors, in the dtype of the keys."""
    if not blocks:
        return None
    keys = torch.cat([b.keys for b in blocks], -2) if len(blocks) > 1 else blocks[0].keys
    values = torch.cat([b.values for b in blocks], -2) if len(blocks) > 1 else blocks[0].values
    return keys.to(like.dtype), values.to(like.dtype)


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
        for socket in module._modules.values():
            found = socket.prefix(query, key) if isinstance(socket, MemorySocket) else None
            if found is None:
                continue
            front_k, front_v, valid = found
            count = front_k.shape[2]
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
            if attention_mask is None and (causal or valid is not None):
                attention_mask = plain_mask(query, key, causal, additive=base == "eager")
            if attention_mask is not None:
                attention_mask = widen(attention_mask[..., : key.shape[2]], count, valid)
            if position_bias is not None:
                position_bias = torch.cat([position_bias.new_zeros(*position_bias.shape[:-1], count), position_bias], -1)
            key = torch.cat([front_k, key], 2)
            value = torch.cat([front_v, value], 2)
            if base != "eager":
                is_causal = False
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return run(module, query, key, value, attention_mask, **kwargs)

    return attend


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, attention(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
