"""`Tokens`: embeddings put in front of the token sequence (prompt tuning, Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.blocks import TokenBlock
from intarsia.patches.delta import Form, Seen
from intarsia.patches.init import uniform
from intarsia.patches.place import Place


class TokensForm(Form):
    """embeddings: [P, d_embed]."""

    def __init__(self, embeddings: nn.Parameter, where: str) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.where = where

    def forward(self, h: Any, seen: Seen) -> tuple[TokenBlock, ...]:
        return (TokenBlock(self.embeddings, self.where),)


@register("tokens")
@dataclass(frozen=True, slots=True)
class Tokens:
    """`length` trained embeddings.

    Attributes:
        where: `start` of the sequence, or `after_first` token, which leaves the classification token at position 0
            (bidirectional encoders are pooled there).  `auto` picks `after_first` for encoder-only models.
        init: `uniform` U(-0.5, 0.5), or `vocabulary`: rows of the base's embedding drawn from the `pool` first ids
            behind the specials (the paper samples the 5,000 most frequent), or `ids`: the rows named in `ids`.
    """

    length: int = 20
    where: Literal["auto", "start", "after_first"] = "auto"
    init: Literal["uniform", "vocabulary", "ids"] = "vocabulary"
    pool: int = 5000
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prompt length must be at least 1, found {self.length}")
        if self.init == "ids" and not self.ids:
            raise SpecError("init='ids' needs the token ids to start from: ids=(...)")

    def _start(self, place: Place) -> nn.Parameter:
        rows = place.embedding()
        width = place.site.features
        if self.init == "uniform":
            return place.parameter(self.length, width, fill=uniform(0.5))
        if rows is None:
            raise SpecError(f"init={self.init!r} needs word embeddings, the base has none; use init='uniform'")
        if place.device.type == "meta":
            return place.parameter(self.length, width)
        if self.init == "ids":
            wanted = [self.ids[i % len(self.ids)] for i in range(self.length)]
            bad = [i for i in wanted if not 0 <= i < len(rows)]
            if bad:
                raise SpecError(f"token id {bad[0]} is outside the vocabulary of {len(rows)}")
            chosen = torch.tensor(wanted)
        else:
            first = min(4, len(rows) - 1)  # special tokens stand at the start of every vocabulary we know
            last = min(first + self.pool, len(rows))
            chosen = first + torch.randint(0, last - first, (self.length,), generator=place.generator)
        start = rows.detach()[chosen.to(rows.device)].to(place.device, place.dtype)
        return nn.Parameter(start.clone())

    def build(self, place: Place) -> TokensForm:
        where = self.where
        if where == "auto":
            where = "after_first" if place.bidirectional else "start"
        return TokensForm(self._start(place), where)

