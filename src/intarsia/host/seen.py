"""What a form sees of the forward pass (`intarsia.patches.Seen`), cut to the rows that run its expression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from intarsia.errors import CompositionError, SiteError
from intarsia.host.call import CALLS, Call, Note, State
from intarsia.host.parts import bias_of, weight_of
from intarsia.patches.delta import Positions
from intarsia.sites.address import Site

if TYPE_CHECKING:
    from intarsia.host.given import Given
    from intarsia.host.mirror import Mirror


class View:
    """The surroundings of one slot during one forward.  Nothing is computed until asked."""

    __slots__ = (
        "_asked", "_embedding", "_given", "_input", "_mirror", "_module", "_norm", "_part", "_reads", "_residual", "_rows", "_size",
        "_state", "call", "site",
    )  # fmt: skip

    def __init__(
        self,
        site: Site,
        call: Call,
        *,
        module: nn.Module | None = None,
        input: Tensor | None = None,
        residual: Tensor | None = None,
        reads: Tensor | None = None,
        norm: nn.Module | None = None,
        given: Mapping[str, Given] = MappingProxyType({}),
        embedding: Tensor | None = None,
        mirror: Mirror | None = None,
        rows: Tensor | None = None,
        size: int = 0,
        part: int = 0,
        state: State | None = None,
    ) -> None:
        self.site = site
        self.call = call
        self._module = module
        self._input = input
        self._residual = residual
        self._reads = reads
        self._norm = norm
        self._given = given
        self._embedding = embedding
        self._mirror = mirror
        self._rows = rows
        self._size = size
        self._part = part
        self._state = state
        self._asked: dict[Any, int] = {}

    def of_rows(self, rows: Tensor, size: int, part: int) -> View:
        """The same surroundings for some of `size` rows only, which run expression number `part`."""
        return View(
            self.site,
            self.call,
            module=self._module,
            input=self._input,
            residual=self._residual,
            reads=self._reads,
            norm=self._norm,
            given=self._given,
            embedding=self._embedding,
            mirror=self._mirror,
            rows=rows,
            size=size,
            part=part,
            state=self._state,
        )

    def of_rows_here(self, rows: Tensor, size: int) -> View:
        """The same surroundings for some of the `size` rows that are left here."""
        return self.of_rows(rows if self._rows is None else self._rows[rows], size if self._rows is None else self._size, self._part)

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
        given = self._given.get("logits")
        mask = None if given is None else bool_mask(given.mask)
        return None if mask is None else self._cut(mask, "mask")

    @property
    def weight(self) -> Tensor:
        value = None if self._module is None else weight_of(self.site, self._module)
        if value is None or not value.is_floating_point():
            raise SiteError(
                f"a method at {self.site.name} looks at the base's weight there, and there is "
                f"{'none' if value is None else f'one of {value.dtype}'}; use a base whose weights are floating point"
            )
        return value

    @property
    def bias(self) -> Tensor | None:
        return None if self._module is None else bias_of(self.site, self._module)

    @property
    def embedding(self) -> Tensor:
        if self._embedding is None:
            raise SiteError(f"site {self.site.name} gives no word embeddings to look at")
        return self._embedding

    def unembedding(self, x: Tensor) -> Tensor:
        return x if self._mirror is None else self._mirror.undone(self.call, self.call.exprs[self._part], x)

    def normed(self, h: Tensor) -> Tensor:
        total = h + self.residual
        if self._norm is None:
            return total
        if self._rows is None or self._state is None or torch.compiler.is_compiling():
            return self._norm(total)
        # modules on the norm itself see these rows only, all with this expression
        noted = self._given.get(self.site.stack)
        alone = self.call.alone(self._part, self._rows, self._size, self._size if noted is None else noted.rows)
        token = CALLS.set({**CALLS.get(), self._state: alone})
        try:
            return self._norm(total)
        finally:
            CALLS.reset(token)

    def context(self, key: str) -> Any:
        if key not in self.call.context:
            raise CompositionError(
                f"a module at {self.site.name} needs {key!r} from the call: with host.using(expr, {key}=...)"
            )
        return self.call.context[key]

    # -- what the whole stack was given ------------------------------------------------------------------------------

    @property
    def _states(self) -> bool:
        """Whether the tokens here are the encoder's, read by a decoder."""
        return self.site.name.endswith((".xattn.k", ".xattn.v"))

    @property
    def _stack(self) -> Given:
        return self._of(self.site.stack if self.site.port != "logits" else "logits")

    def _of(self, stack: str) -> Given:
        given = self._given.get(stack)
        if given is None:
            raise SiteError(
                f"a module at {self.site.name} looks at the whole batch, which was not seen; call the model, or its encoder "
                "or decoder, not a part of them"
            )
        return given

    def _batch_rows(self) -> Tensor | None:
        """Numbers of the batch's rows that are computed here, None for all."""
        if self._rows is None:
            return None
        each = self._size // self._stack.rows  # a layer that flattens [B, T] has T rows for each
        return self._rows[::each] // each

    @property
    def rows(self) -> int:
        return self._stack.rows if self._rows is None else len(self._rows) * self._stack.rows // self._size

    def per_row(self, key: str) -> tuple[Any, ...]:
        value = self.context(key)
        count = self._stack.rows
        if isinstance(value, Tensor):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            return (value,) * self.rows
        if not value or count % len(value):
            raise CompositionError(f"{key}= has {len(value)} values, but a batch of {count} rows came; give one per row")
        repeated = [v for v in value for _ in range(count // len(value))]  # beams repeat every row in place
        mine = self._batch_rows()
        return tuple(repeated if mine is None else [repeated[i] for i in mine.tolist()])

    @property
    def ids(self) -> Tensor | None:
        ids, mine = self._stack.ids, self._batch_rows()
        return ids if ids is None or mine is None else ids[mine]

    def tokens(self, length: int, stack: str | None = None, *, all_passes: bool = False) -> Positions:
        given, mine = self._stack if stack is None else self._of(stack), self._batch_rows()
        past = 0 if self._states else given.past
        real = real_positions(given, given.states_mask if self._states else given.mask, past + length, self._device())
        real = real if mine is None else real[mine]
        rank = torch.where(real, real.cumsum(1) - 1, -1)
        rank = rank if all_passes else rank[:, past:]
        told = "prompt" in self.call.context and self.site.stack != "encoder" and not self._states
        if told:
            prompt = torch.tensor(self.per_row("prompt"), device=rank.device) + given.soft
        elif given.answers and not self._states:
            prompt = torch.ones_like(rank[:, 0])
        else:
            prompt = torch.zeros_like(rank[:, 0]) if past else real.sum(1)
        return Positions(rank, prompt, over=past > 0 and not told)

    def _device(self) -> torch.device:
        for value in (self._input, self._reads, self._residual):
            if value is not None:
                return value.device
        raise SiteError(f"site {self.site.name} (port {self.site.port}) gives no tokens to look at")

    def taps(self, stack: str) -> tuple[Tensor, ...]:
        given, mine = self._of(stack), self._batch_rows()
        if len(given.taps) != given.blocks + 1:
            ran = max(0, len(given.taps) - 1)
            raise SiteError(f"a side network at {self.site.name} needs the states of all {given.blocks} blocks, and {ran} ran before it")
        return tuple(given.taps if mine is None else [tap[mine] for tap in given.taps])

    def grown(self, owner: object, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        given, mine = self._stack, self._batch_rows()
        asked = self._asked[id(owner), number] = self._asked.get((id(owner), number), -1) + 1
        key = (id(owner), self._part, number * 1000 + asked)
        given.fresh[key] = (keys, values) if mine is None else (whole(keys, mine, given.rows), whole(values, mine, given.rows))
        if not given.past:
            return keys, values
        layer = given.grown.get(key)
        if layer is None or layer.keys is None or layer.values is None:
            raise self._unfilled()
        before = layer.keys if mine is None else layer.keys[mine], layer.values if mine is None else layer.values[mine]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)

    def note(self, owner: object, weights: Tensor, members: Sequence[int]) -> None:
        if self.call.notes is not None:
            self.call.notes.append(Note(self.site, owner, weights, tuple(members), self._rows, self._size))

    def _unfilled(self) -> CompositionError:
        return CompositionError(
            f"a module at {self.site.name} keeps what it saw in the prompt, but this cache was filled without it; "
            "read the prompt and generate with the same expression"
        )

    def kept(self, owner: object, make: Callable[[], Tensor]) -> Tensor:
        given = self._stack
        count = self._asked[id(owner)] = self._asked.get(id(owner), -1) + 1  # `a >> a` asks twice
        key = (id(owner), self._part, count)
        if given.past == 0 or self._states:
            value = make()
            if given.kept is not None:
                given.kept[key] = value.detach()
            return value
        if given.kept is None or key not in given.kept:
            raise self._unfilled()
        return given.kept[key]


def whole(part: Tensor, mine: Tensor, rows: int) -> Tensor:
    """The rows of a part at their places in a batch, zero elsewhere: a cache holds all rows, in the order of the batch."""
    return part.new_zeros(rows, *part.shape[1:]).index_copy(0, mine, part)


def real_positions(given: Given, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Which of `length` positions hold tokens, [B, length].

    Raises:
        SiteError: the mask is about something else than these positions, and not all of it is real.
    """
    if mask is not None and mask.shape[1] != length:
        shorten = getattr(given.stack, "_get_feature_vector_attention_mask", None)  # encoders of sound shorten their frames
        if shorten is not None:
            mask = shorten(length, mask)
        elif bool(mask.all()):
            mask = None
        else:
            raise SiteError(f"the attention mask has {mask.shape[1]} positions where the stack has {length}, so padding is unknown")
    found = bool_mask(mask)
    return torch.ones(given.rows, length, dtype=torch.bool, device=device) if found is None else found


def bool_mask(mask: Tensor | None) -> Tensor | None:
    """A [B, T] attention mask as booleans; other shapes (4-D masks) say nothing about positions and give None."""
    if mask is None or mask.dim() != 2:
        return None
    return mask if mask.dtype == torch.bool else mask > 0
