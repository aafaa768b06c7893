"""`Tokens`: embeddings put in front of the token sequence (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

With `reparameterise="lstm"` they come from a small network (P-tuning, see `prompt_encoder.py`); `export` turns them into
the plain tensor, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.blocks import TokenBlock
from intarsia.patches.delta import Form, Seen
from intarsia.patches.init import normal, uniform
from intarsia.patches.place import Place
from intarsia.patches.prompt_encoder import PromptEncoder, prompt_encoder


class TokensForm(Form):
    """embeddings: [P, d_embed]."""

    def __init__(self, embeddings: nn.Parameter, where: str, spec: Tokens) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.where = where
        self.spec = spec

    def forward(self, h: Any, seen: Seen) -> tuple[TokenBlock, ...]:
        return (TokenBlock(self.embeddings, self.where, self.spec.behind),)


class EncodedTokensForm(Form):
    """The embeddings [P, d_embed] behind a network."""

    def __init__(self, embeddings: nn.Parameter, encoder: PromptEncoder, where: str, spec: Tokens) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.where = where
        self.spec = spec

    def forward(self, h: Any, seen: Seen) -> tuple[TokenBlock, ...]:
        return (TokenBlock(self.encoder(self.embeddings), self.where, self.spec.behind),)

    def export(self) -> tuple[Tokens, dict[str, Tensor]]:
        with torch.no_grad():
            return replace(self.spec, reparameterise=None), {"embeddings": self.encoder(self.embeddings)}


@register("tokens")
@dataclass(frozen=True, slots=True)
class Tokens:
    """`length` trained embeddings.

    Attributes:
        where: `start` of the sequence, or `after_first` token, which leaves the classification token at position 0
            (bidirectional encoders are pooled there).  `auto` picks `after_first` for encoder-only models.
        init: `uniform` U(-0.5, 0.5); `unit` N(0, 1); `vocabulary`: rows of the base's embedding drawn from the `pool` first
            ids behind the specials (the paper samples the 5,000 most frequent); `ids`: the rows named in `ids`, repeated
            if they are fewer; `groups`: the mean of the rows of each group in `groups` (the pieces of a label or word),
            and drawn rows behind them.
        reparameterise: `lstm` for the network of P-tuning.
        behind: enter behind the norm of the embeddings and without positions, which the text's tokens keep; as AdapterHub's
            prompts, for encoders that normalise their embeddings.
    """

    length: int = 20
    where: Literal["auto", "start", "after_first"] = "auto"
    init: Literal["uniform", "unit", "vocabulary", "ids", "groups"] = "vocabulary"
    pool: int = 5000
    ids: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    reparameterise: Literal["lstm"] | None = None
    behind: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SpecError(f"prompt length must be at least 1, found {self.length}")
        if self.init == "ids" and not self.ids:
            raise SpecError("init='ids' needs the token ids to start from: ids=(...)")
        if self.init == "groups" and not (self.groups and all(self.groups)):
            raise SpecError("init='groups' needs the token ids of each label or word: groups=((...), ...), none of them empty")
        if len(self.groups) > self.length:
            raise SpecError(f"{len(self.groups)} groups do not fit into a prompt of {self.length} tokens; make it longer")

    def _start(self, place: Place) -> nn.Parameter:
        rows = place.embedding()
        width = place.site.features
        if self.init in ("uniform", "unit"):
            return place.parameter(self.length, width, fill=uniform(0.5) if self.init == "uniform" else normal(1.0))
        if rows is None:
            raise SpecError(f"init={self.init!r} needs word embeddings, the base has none; use init='uniform'")
        if place.device.type == "meta":
            return place.parameter(self.length, width)
        rows = rows.detach()
        if self.init == "ids":
            start = self._chosen(rows, [self.ids[i % len(self.ids)] for i in range(self.length)])
        else:
            means = [self._chosen(rows, group).mean(0, keepdim=True) for group in self.groups if self.init == "groups"]
            start = torch.cat([*means, self._drawn(rows, self.length - len(means), place)])
        return nn.Parameter(start.to(place.device, place.dtype).clone())

    @staticmethod
    def _chosen(rows: Tensor, wanted: Sequence[int]) -> Tensor:
        bad = [i for i in wanted if not 0 <= i < len(rows)]
        if bad:
            raise SpecError(f"token id {bad[0]} is outside the vocabulary of {len(rows)}")
        return rows[torch.tensor(wanted, device=rows.device)]

    def _drawn(self, rows: Tensor, count: int, place: Place) -> Tensor:
        first = min(4, len(rows) - 1)  # special tokens stand at the start of every vocabulary we know
        last = min(first + self.pool, len(rows))
        return rows[(first + torch.randint(0, last - first, (count,), generator=place.generator)).to(rows.device)]

    def build(self, place: Place) -> Form:
        where = self.where
        if where == "auto":
            where = "after_first" if place.bidirectional else "start"
        start = self._start(place)
        if self.reparameterise is None:
            return TokensForm(start, where, self)
        return EncodedTokensForm(start, prompt_encoder(place, place.site.features), where, self)
