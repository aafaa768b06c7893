"""What is active, and for how long: `Call` travels in a `ContextVar`, `State` is what all sockets of one host share.

A call holds one expression, or several with a number per row that says which.  Nothing here is stored on layers.
Dynamo cannot trace a ContextVar, so a compiled model runs the state's resting call (see `Host.compile`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from intarsia.compose import Expr, names
from intarsia.errors import CompositionError
from intarsia.sites.address import Site

if TYPE_CHECKING:
    from intarsia.host.given import Given

DROP = "drop_layers"
"""Key of the context: how many of the lowest blocks of each stack run without modules (AdapterDrop)."""


@dataclass(frozen=True, slots=True)
class Note:
    """Weights that a router gave during a forward.

    Attributes:
        site: where.
        owner: the router's form.
        weights: [n], [R, n] or [R, T, n], with their graph.
        members: which of the mixture's members these are.
        rows: which of `size` rows at the site (a multiple of those of the batch), None for all.
    """

    site: Site
    owner: object
    weights: Tensor
    members: tuple[int, ...]
    rows: Tensor | None = None
    size: int = 0


@dataclass(frozen=True, eq=False)
class Call:
    """The expressions of one forward pass.

    Attributes:
        exprs: distinct expressions.
        rows: for each row of the batch the index of its expression; None if all rows run `exprs[0]`.
        head: name of the module whose head answers, None if the expression leaves no choice.
        context: anything forms may ask for (task ids, language codes ...).
        notes: where routers put the weights they give; None if nobody watches.
    """

    exprs: tuple[Expr, ...]
    rows: tuple[int, ...] | None = None
    head: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    notes: list[Note] | None = None

    @classmethod
    def of(
        cls,
        exprs: tuple[Expr, ...],
        rows: tuple[int, ...] | None = None,
        head: str | None = None,
        context: Mapping[str, Any] | None = None,
        notes: list[Note] | None = None,
    ) -> Call:
        return cls(exprs, rows, head, dict(context or {}), frozenset().union(*(names(e) for e in exprs)), notes)

    def alone(self, number: int, rows: Tensor, size: int, count: int = 0) -> Call:
        """The call of those of `size` rows that run expression `number`: as if they were a batch of their own.

        Args:
            count: rows of the batch, where the call does not say it.
        """
        count = count if self.rows is None else len(self.rows)
        each = size // count
        mine = (rows[::each] // each).tolist()
        context = {key: _part(value, mine, count) for key, value in self.context.items()}
        return Call.of((self.exprs[number],), None, self.head, context, self.notes)

    def drops(self, site: Site) -> bool:
        """Whether modules are left out at a site for this call."""
        count = self.context.get(DROP, 0)
        return bool(count) and site.layer is not None and site.layer < count

    def index(self, size: int, device: torch.device) -> Tensor:
        """Expression number for each of `size` rows, [size].

        Beam search and repeated sampling repeat every row in place, and some layers flatten [B, T]: both are multiples.
        """
        assert self.rows is not None
        count = len(self.rows)
        if size % count:
            raise CompositionError(
                f"the call names expressions for {count} rows, but a batch of {size} rows came; give one per row"
            )
        return torch.tensor(self.rows, device=device).repeat_interleave(size // count)


def _part(value: Any, mine: Sequence[int], count: int) -> Any:
    """A value of a call's context for some rows: a list or tensor with one value for each of `count` rows is cut; a tuple of
    numbers is one value (a vector)."""
    if is_vector(value):
        return value
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        return value[torch.tensor(mine, device=value.device)]
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count:
        return [value[i] for i in mine]
    return value


def grouped(context: Mapping[str, Any], keys: frozenset[str]) -> tuple[int, ...] | None:
    """Numbers that say which rows have equal values of some keys of the context; None where all have.

    A parameter is the same for a whole forward, so rows whose weights of it differ run as rows with other expressions do.
    """
    columns = [context[key] for key in sorted(keys) if key in context and _per_row(context[key])]
    if not columns:
        return None
    lists = [[tuple(v) if isinstance(v, list) else v for v in (c.tolist() if isinstance(c, Tensor) else c)] for c in columns]
    if len({len(values) for values in lists}) > 1:
        raise CompositionError(f"the context gives {' and '.join(str(len(v)) for v in lists)} values for {', '.join(sorted(keys))}; give one per row for each")
    found = list(zip(*lists))
    distinct = list(dict.fromkeys(found))
    return None if len(distinct) < 2 else tuple(distinct.index(value) for value in found)


def is_vector(value: Any) -> bool:
    """Whether a value of the context is one vector rather than one value per row."""
    return isinstance(value, tuple) and all(isinstance(v, int | float) for v in value)


def _per_row(value: Any) -> bool:
    """A value for each row."""
    return value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, Sequence) and not isinstance(value, str) and not is_vector(value)


class State:
    """Shared by the sockets of one host: the resting call, and what a running forward has noted per thread."""

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.rest: Call | None = None
        self.sizes: dict[int, int] = {}
        self.given: dict[int, dict[str, Given]] = {}
        self.left: dict[int, Given] = {}
        self.notes: dict[int, list[Note]] = {}
        self.watched: dict[int, list[Note]] = {}
        self.kept: WeakKeyDictionary[Any, dict[tuple[int, int, int], Tensor]] = WeakKeyDictionary()
        self.grown: WeakKeyDictionary[Any, dict[tuple[int, int, int], Any]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has run nothing yet."""
        return {k: v for k, v in self.__dict__.items() if k not in ("kept", "grown")} | {"sizes": {}, "given": {}, "left": {}, "notes": {}, "watched": {}}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, kept=WeakKeyDictionary(), grown=WeakKeyDictionary())

    def noted(self) -> Mapping[str, Given]:
        """What the stacks of this thread's forward were given, by the name of the stack (`logits`: the model itself)."""
        return self.given.get(thread(), {})

    def current(self) -> Call | None:
        """The call of this thread's `using`, or the resting one."""
        if not torch.compiler.is_compiling():
            call = CALLS.get().get(self)
            if call is not None:
                return call
        return self.rest


CALLS: ContextVar[Mapping[State, Call]] = ContextVar("intarsia_calls", default={})  # noqa: B039 (never mutated)


def thread() -> int:
    """Key of this thread; constant while compiling, where there is one thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Child(nn.Module):
    """Base of everything that a host puts into a model.

    A child is an ordinary submodule *and* the owner, as bound methods, of its host module's hooks: so deepcopy, pickle,
    `.to()`, DDP and FSDP see a submodule, and copies never share modules with their original.
    References to other parts of the model are kept out of `_modules`, or they would be registered twice.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.__dict__["state"] = state

    state: State
