"""Values of the ports `mem` and `seq`: tuples of blocks, appended by the op `Concat`.

A memory block is keys and values of `length` positions for every key/value head; a token block is `length` embeddings.
Adding blocks is concatenation; a weighted mixture exists only between blocks of equal length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import CompositionError


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """keys, values: [H_kv, P, d_head] (the same for every row) or [B, H_kv, P, d_head].

    Attributes:
        gate: [1], strength of a block that has a softmax of its own (Zhang et al. 2023, arXiv 2303.16199); None for one
            that shares the attention's.
        relative: the positions have the relative bias of standing right in front of the text (T5), else none.
        shifts: the positions are numbered as the first of the text, whose keys move up behind them while its queries stay (T5).
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None
    relative: bool = False
    shifts: bool = False

    @property
    def length(self) -> int:
        return self.keys.shape[-2]

    def scaled(self, weight: float) -> MemoryBlock:
        gate = None if self.gate is None else self.gate * weight
        return MemoryBlock(self.keys * weight, self.values * weight, gate, self.relative, self.shifts)

    def __add__(self, other: MemoryBlock) -> MemoryBlock:
        if (self.gate is None) != (other.gate is None):
            raise CompositionError(
                "a prefix with its own softmax and one that shares the attention's cannot be mixed; put one after the other: a >> b"
            )
        if (self.relative, self.shifts) != (other.relative, other.shifts):
            what = "relative positions" if self.relative != other.relative else "positions that move the text's"
            raise CompositionError(f"a prefix with {what} and one without cannot be mixed; put one after the other: a >> b")
        gate = None if self.gate is None or other.gate is None else self.gate + other.gate
        return MemoryBlock(self.keys + other.keys, self.values + other.values, gate, self.relative, self.shifts)


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """embeddings: [P, d_embed]; `where` is `start` or `after_first` (behind the classification token).

    Attributes:
        behind: they enter behind the embeddings' norm and have no position.
    """

    embeddings: Tensor
    where: str = "start"
    behind: bool = False

    @property
    def length(self) -> int:
        return self.embeddings.shape[-2]

    def scaled(self, weight: float) -> TokenBlock:
        return TokenBlock(self.embeddings * weight, self.where, self.behind)

    def __add__(self, other: TokenBlock) -> TokenBlock:
        return TokenBlock(self.embeddings + other.embeddings, self.where, self.behind)


Blocks = tuple[MemoryBlock, ...] | tuple[TokenBlock, ...]
