"""`Biaffine`: scores of all arcs between words and of their relations (Dozat & Manning 2017, arXiv 1611.01734).

    arc[i, j]    = d_i U h_j + u . h_j                    d = MLP(x_i), h = MLP(x_j), word j as the head of word i
    rel[i, j, k] = [d'_i; 1] R_k [h'_j; 1]                smaller MLPs

A word is represented by one position, the call says which (`words=`, one list of positions per row).  The root is a trained
state in front of the words.  What is here scores; trees are made of the scores by the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError
from intarsia.patches.delta import Seen, dropped, same_dtype
from intarsia.patches.heads import Standardised
from intarsia.patches.init import normal
from intarsia.patches.place import Place

KEY = "words"
"""Key of the call's context: the position of every word, a list per row."""


class BiaffineForm(Standardised):
    """Scores [B, W, W + 1, 1 + n]: of dependents (words) and heads (the root, then words); arcs, then n relations.

    W is the largest number of words in the batch; scores beyond a row's own words mean nothing.
    """

    reads_call = True
    root: nn.Parameter
    arc: nn.Parameter
    arc_bias: nn.Parameter
    relation: nn.Parameter

    def __init__(self, parameters: dict[str, nn.Parameter], spec: Biaffine) -> None:
        super().__init__(spec, parameters["root"])
        for name, value in parameters.items():
            self.register_parameter(name, value)

    def words(self, seen: Seen) -> Tensor:
        """Positions of the words, [B, W]; rows with fewer words are filled up with 0."""
        lists = seen.per_row(KEY)
        length = seen.input.shape[1]
        if any(not isinstance(row, (list, tuple)) or not row or not all(0 <= p < length for p in row) for row in lists):
            raise CompositionError(
                f"{KEY}= needs, for every row of the batch, the list of its words' positions in the input of {length}; one at least"
            )
        width = max(map(len, lists))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in lists], device=seen.input.device)

    def part(self, x: Tensor, name: str) -> Tensor:
        """One of the four MLPs."""
        y = F.leaky_relu(F.linear(x, getattr(self, name), getattr(self, f"{name}_bias")), 0.1)
        return dropped(y, self.spec.dropout, self.training)

    def forward(self, h: Any, seen: Seen) -> Tensor:
        where = self.words(seen)
        states = seen.input[torch.arange(len(where), device=where.device)[:, None], where]
        x = self.standardised(same_dtype(states, self.root))
        x = dropped(x, self.spec.dropout, self.training)
        heads = torch.cat([self.root.expand(len(x), 1, -1), x], 1)
        arcs = self.part(x, "arc_dependent") @ self.arc + self.arc_bias
        arcs = arcs @ self.part(heads, "arc_head").mT
        one = F.pad(self.part(x, "relation_dependent"), (0, 1), value=1.0)
        two = F.pad(self.part(heads, "relation_head"), (0, 1), value=1.0)
        relations = torch.einsum("bwnq,bvq->bwvn", torch.einsum("bwp,npq->bwnq", one, self.relation), two)
        return torch.cat([arcs[..., None], relations], -1)


@register("biaffine")
@dataclass(frozen=True, slots=True)
class Biaffine:
    """A head for dependency parsing.

    Attributes:
        labels: names of the relations in order.
        arc_width, relation_width: of the MLPs (500 and 100 in the paper, which trains its own encoder).
        dropout: of the features and the MLPs.
        standardise: centre and scale the features (see `heads`).
    """

    labels: tuple[str, ...]
    arc_width: int = 256
    relation_width: int = 64
    dropout: float = 0.33
    standardise: bool = True

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise SpecError(f"a parser needs at least one relation, all different, found {self.labels}")
        if self.arc_width < 1 or self.relation_width < 1:
            raise SpecError(f"widths of a parser are at least 1, found {self.arc_width} and {self.relation_width}")

    @property
    def pooling(self) -> str:
        """Every token is looked at."""
        return "token"

    def build(self, place: Place) -> BiaffineForm:
        d, a, r = place.reads, self.arc_width, self.relation_width
        made = {"root": place.parameter(d, fill=normal(1.0))}
        for name, width in (("arc_dependent", a), ("arc_head", a), ("relation_dependent", r), ("relation_head", r)):
            made[name] = place.parameter(width, d, fill=normal(d**-0.5))
            made[f"{name}_bias"] = place.parameter(width)
        made["arc"] = place.parameter(a, a)
        made["arc_bias"] = place.parameter(a)
        made["relation"] = place.parameter(len(self.labels), r + 1, r + 1)
        return BiaffineForm(made, self)


__all__ = ["KEY", "Biaffine", "BiaffineForm"]
