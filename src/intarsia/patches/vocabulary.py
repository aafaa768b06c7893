"""`Vocabulary`: word embeddings for another tokenizer, or for more pieces (port `weight`, site `embed.weight`).

    replace    X' [n, d]: row i is row source[i] of the base where source[i] >= 0, else a row of its own
    append     X' [V + n, d]: the base's rows, then n rows of its own

Rows that are copied are the base's, bit for bit, and are not stored; rows of its own are given by a factor [m, d]: all numbers
(`Dense`), or codes times a frozen basis (`Coded`; UNKs Everywhere, Pfeiffer et al. 2021, arXiv 2012.15562).  The pieces and their scores
are part of the module, as bytes and numbers: nothing of a file is run to have the tokenizer again (`intarsia.languages.vocabulary`).

The value has another number of rows than what it takes the place of, so it enters by `Exchange`; what goes with it is one number
per piece at an output bias (`VocabularyBias`), and language-model heads of the same module use its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError
from intarsia.patches.delta import Form, Linear, Seen, WhyNot, same_dtype
from intarsia.patches.factors import Dense, Factor, FactorSpec
from intarsia.patches.init import normal
from intarsia.patches.place import Place

TAG = ("vocabulary",)
"""Key of the part that the forms of a module share."""

_WHY = "a vocabulary changes the number of rows of the embeddings; keep it as a module"


class Words(nn.Module):
    """The rows of one vocabulary: what the forms of a module share.

    Args:
        spec: of the vocabulary.
        base: shape [V, d] of the base's embeddings.
    """

    source: Tensor
    pieces: Tensor
    scores: Tensor

    def __init__(self, spec: Vocabulary, base: tuple[int, int], place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.base = base
        own = spec.size - spec.copied
        self.register_buffer("source", place.buffer((spec.size,), lambda: torch.tensor([*range(spec.copied), *[-1] * own], dtype=torch.int32)))
        self.register_buffer("pieces", place.buffer((spec.bytes,), lambda: torch.zeros(spec.bytes, dtype=torch.uint8)))
        self.register_buffer("scores", place.buffer((spec.size,), lambda: torch.zeros(spec.size)))
        self.factor: Factor = spec.factor.build((own, base[1]), place, "bert")

    @property
    def size(self) -> int:
        """Rows of the whole."""
        return self.spec.size if self.spec.mode == "replace" else self.base[0] + self.spec.size

    def rows(self, base: Tensor) -> Tensor:
        """X', [size, d], from the base's [V, d]."""
        own = self.factor.materialise()
        if self.spec.mode == "append":
            return torch.cat([same_dtype(base, own), own])
        return self.laid(base, own)

    def laid(self, base: Tensor, own: Tensor) -> Tensor:
        """Rows of the base (or numbers per row) where they are copied, one's own elsewhere."""
        copied = self.source >= 0
        held = same_dtype(base[self.source[copied].long()], own)
        order = torch.empty(len(copied), dtype=torch.long, device=copied.device)
        order[copied] = torch.arange(len(held), device=copied.device)
        order[~copied] = torch.arange(len(held), len(copied), device=copied.device)
        return torch.cat([held, own])[order]


class VocabularyForm(Form):
    """X'."""

    words: Words

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.__dict__["words"] = words  # shared with heads: registered once, at the root

    def forward(self, h: Any, seen: Seen) -> Tensor:
        if h.shape != self.words.base:
            raise CompositionError(f"embeddings of {tuple(h.shape)} stand where a vocabulary expects the base's {self.words.base}: one vocabulary at a time")
        return self.words.rows(h)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        return WhyNot(_WHY)


@register("vocabulary")
@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces with their rows.

    Attributes:
        size: number of pieces (of the new ones, for `append`).
        copied: of these, how many have a row of the base; 0 for `append`.
        bytes: of the pieces, in UTF-8 with a line feed between them.
        mode: in the place of the base's pieces, or behind them.
        factor: gives the rows of its own.
        normaliser: Unicode form of the text: NFC, NFKC or none.
    """

    size: int
    copied: int = 0
    bytes: int = 0
    mode: Literal["replace", "append"] = "replace"
    factor: FactorSpec = field(default_factory=Dense)
    normaliser: Literal["NFC", "NFKC", "none"] = "NFKC"

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.copied <= self.size or self.bytes < 0:
            raise SpecError(f"a vocabulary has at least one piece, and copies no more than it has: found {self}")
        if self.mode == "append" and self.copied:
            raise SpecError("pieces that are appended have rows of their own: copied=0")

    def build(self, place: Place) -> VocabularyForm:
        shape = place.site.shape
        if place.site.name != "embed.weight" or len(shape) != 2:
            raise SpecError(f"{place.site.name}: a vocabulary stands at the word embeddings (at='embed.weight')")
        return VocabularyForm(place.tied(TAG, lambda: Words(self, (shape[0], shape[1]), place)))


def words_of(place: Place) -> Words | None:
    """The vocabulary of the module that is being built, None if it has none (or its patch comes later)."""
    return place.shared.get(TAG)  # type: ignore[return-value]


class VocabularyBiasForm(Form):
    """One number per piece: the base's where the row is copied."""

    words: Words

    def __init__(self, words: Words, value: nn.Parameter) -> None:
        super().__init__()
        self.__dict__["words"] = words
        self.value = value

    def forward(self, h: Any, seen: Seen) -> Tensor:
        if self.words.spec.mode == "append":
            return torch.cat([same_dtype(h, self.value), self.value])
        return self.words.laid(h, self.value)

    def value_at(self, base: Linear, port: str) -> Linear | WhyNot:
        return WhyNot(_WHY)


@register("vocabulary_bias")
@dataclass(frozen=True, slots=True)
class VocabularyBias:
    """The output bias of the base's own language-model head, for a vocabulary of the same method (an earlier patch)."""

    def build(self, place: Place) -> VocabularyBiasForm:
        words = words_of(place)
        if words is None:
            raise SpecError(f"{place.site.name}: a bias per piece goes with a vocabulary, whose patch stands before it in the method")
        return VocabularyBiasForm(words, place.parameter(words.spec.size - words.spec.copied))


@register("exchange")
@dataclass(frozen=True, slots=True)
class Exchange:
    """h' = value, of another shape: stands in sequences, never in mixtures."""

    def change(self, h: Any, value: Any) -> Any:
        raise CompositionError("a vocabulary takes the place of the word embeddings: it can stand in a sequence (a >> b), not in a mixture")

    def enter(self, h: Tensor, form: Form, seen: Seen, fresh: bool) -> Tensor | None:
        """The value itself."""
        value: Tensor = form(h, seen)
        return value if value.dtype == h.dtype else value.to(h.dtype)

    def fold(self, base: Linear, form: Form, port: str) -> Linear | WhyNot:
        return WhyNot(_WHY)


class CodedFactor(Factor):
    """Codes [n, r] times a frozen basis: one for all rows, one per cluster, or a small network."""

    basis: Tensor
    cluster: Tensor
    bias: Tensor
    top: Tensor

    def __init__(self, codes: nn.Parameter, width: int, spec: Coded, place: Place) -> None:
        super().__init__()
        self.codes = codes
        self.spec = spec
        n, rank = codes.shape
        inner = spec.hidden or width
        zeros = lambda *shape: place.buffer(shape, lambda: torch.zeros(shape))  # noqa: E731
        self.register_buffer("basis", zeros(spec.clusters, rank, inner))
        self.register_buffer("cluster", place.buffer((n,), lambda: torch.zeros(n, dtype=torch.int32)) if spec.clusters > 1 else None)
        self.register_buffer("bias", zeros(spec.hidden) if spec.hidden else None)
        self.register_buffer("top", zeros(spec.hidden, width) if spec.hidden else None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(same_dtype(x, self.codes), self.materialise())

    def materialise(self) -> Tensor:
        if self.spec.hidden:
            return torch.tanh(self.codes @ self.basis[0] + self.bias) @ self.top
        if self.spec.clusters == 1:
            return self.codes @ self.basis[0]
        order = [(self.cluster == c).nonzero()[:, 0] for c in range(self.spec.clusters)]
        made = torch.cat([self.codes[rows] @ self.basis[c] for c, rows in enumerate(order)])
        back = torch.empty(len(made), dtype=torch.long, device=made.device)
        back[torch.cat(order)] = torch.arange(len(made), device=made.device)
        return made[back]


@register("coded")
@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix of codes over a frozen basis (MF of UNKs Everywhere, and its variants by k-means and by a network).

    Attributes:
        rank: of the codes.
        clusters: number of bases; each row belongs to one.
        hidden: width of the network between codes and rows, 0 for a linear map.
    """

    rank: int = 100
    clusters: int = 1
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.clusters < 1 or self.hidden < 0 or (self.hidden and self.clusters > 1):
            raise SpecError(f"codes need a rank and clusters of at least 1, and a network serves one cluster only: found {self}")

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> CodedFactor:
        if len(shape) != 2:
            raise SpecError(f"codes stand for a matrix, {place.site.name} holds a tensor of shape {tuple(shape)}")
        return CodedFactor(place.parameter(shape[0], self.rank, fill=normal(0.02)), shape[1], self, place)
