"""What a form sees of the forward pass (`intarsia.patches.Seen`), cut to the rows that run its expression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import CompositionError, SiteError
from intarsia.host.call import Call
from intarsia.sites.address import Site


class View:
    """The surroundings of one slot during one forward.  Nothing is computed until asked."""

    __slots__ = ("_embedding", "_input", "_mask", "_norm", "_reads", "_residual", "_rows", "call", "site")

    def __init__(
        self,
        site: Site,
        call: Call,
        *,
        input: Tensor | None = None,
        residual: Tensor | None = None,
        reads: Tensor | None = None,
        norm: nn.Module | None = None,
        mask: Tensor | None = None,
        embedding: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.site = site
        self.call = call
        self._input = input
        self._residual = residual
        self._reads = reads
        self._norm = norm
        self._mask = mask
        self._embedding = embedding
        self._rows = rows

    def of_rows(self, rows: Tensor) -> View:
        """The same surroundings for some rows only."""
        return View(
            self.site,
            self.call,
            input=self._input,
            residual=self._residual,
            reads=self._reads,
            norm=self._norm,
            mask=self._mask,
            embedding=self._embedding,
            rows=rows,
        )

    def _cut(self, value: Tensor | None, what: str) -> Tensor:
        if value is None:
            raise SiteError(f"site {self.site.name} (port {self.site.port}) gives no {what} to look at")
        return value if self._rows is None else value[self._rows]

    @property
    def input(self) -> Tensor:
        return self._cut(self._input, "input")

    @property
    def residual(self) -> Tensor:
        return self._cut(self._residual, "residual")

    @property
    def reads(self) -> Tensor:
        return self._cut(self._reads, "sub-layer input")

    @property
    def mask(self) -> Tensor | None:
        return None if self._mask is None else self._cut(self._mask, "mask")

    @property
    def embedding(self) -> Tensor:
        if self._embedding is None:
            raise SiteError(f"site {self.site.name} gives no word embeddings to look at")
        return self._embedding

    def normed(self, h: Tensor) -> Tensor:
        total = h + self.residual
        return total if self._norm is None else self._norm(total)

    def context(self, key: str) -> Any:
        if key not in self.call.context:
            raise CompositionError(
                f"a module at {self.site.name} needs {key!r} from the call: with host.using(expr, {key}=...)"
            )
        return self.call.context[key]


def bool_mask(mask: Tensor | None) -> Tensor | None:
    """A [B, T] attention mask as booleans; other shapes (4-D masks) say nothing about positions and give None."""
    if mask is None or mask.dim() != 2:
        return None
    return mask if mask.dtype == torch.bool else mask > 0
