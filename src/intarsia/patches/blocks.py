"""Values of the ports `mem` and `seq`: tuples of blocks, appended by the op `Concat`.

A memory block is keys and values of `length` positions for every key/value head; a token block is `length` embeddings.
Adding blocks is concatenation; a weighted mixture exists only between blocks of equal length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """keys, values: [H_kv, P, d_head] (the same for every row) or [B, H_kv, P, d_head]."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[-2]

    def scaled(self, weight: float) -> MemoryBlock:
        return MemoryBlock(self.keys * weight, self.values * weight)

    def __add__(self, other: MemoryBlock) -> MemoryBlock:
        return MemoryBlock(self.keys + other.keys, self.values + other.values)


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """embeddings: [P, d_embed]; `where` is `start` or `after_first` (behind the classification token)."""

    embeddings: Tensor
    where: str = "start"

    @property
    def length(self) -> int:
        return self.embeddings.shape[-2]

    def scaled(self, weight: float) -> TokenBlock:
        return TokenBlock(self.embeddings * weight, self.where)

    def __add__(self, other: TokenBlock) -> TokenBlock:
        return TokenBlock(self.embeddings + other.embeddings, self.where)


Blocks = tuple[MemoryBlock, ...] | tuple[TokenBlock, ...]
