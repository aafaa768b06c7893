"""`Mirror`: undoes in front of the output embedding what invertible modules do where the stack begins (MAD-X).

Last in, first out: `a >> b` is undone as b, then a.  A mixture of several has no inverse: it is refused where an inverse is
needed (`compose/legality.py`), unless the call says `forward_only=True`, and then nothing is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from intarsia.compose import TENSORS, Expr, Mix
from intarsia.compose.legality import inverse
from intarsia.errors import CompositionError, SpecError
from intarsia.host.call import Call, Child, State
from intarsia.host.socket import Slot, first_tensor
from intarsia.patches import Add, Delta

FORWARD_ONLY = "forward_only"
"""Key of the context: leave out the inverse."""


def invertible(delta: Delta) -> bool:
    """Whether a delta has an inverse that the host applies."""
    return bool(getattr(delta.form, "invertible", False))


class Undo:
    """What an expression runs against to undo the invertible deltas of slots."""

    algebra = TENSORS

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots

    def deltas(self, name: str) -> Sequence[Delta]:
        slot = next((slot for slot in self.slots if name in slot.names), None)  # stacks share the coupling
        return () if slot is None else [delta for delta in reversed(list(slot.of(name))) if invertible(delta)]

    def change(self, delta: Delta, h: Any) -> Any:
        return delta.form.undo(h)  # type: ignore[operator]

    def routed(self, mix: Mix, h: Any) -> Any:
        raise CompositionError(f"{mix} has no inverse; leave it out: using(..., forward_only=True)")


class Mirror(Child):
    """In front of the output embedding.

    Attributes:
        stems: slots whose invertible deltas are undone; they belong to the sockets there.
    """

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.__dict__["stems"] = []

    stems: list[Slot]

    def watch(self, slot: Slot) -> None:
        """Undo this slot's deltas too."""
        if all(slot is not known for known in self.stems):
            self.stems.append(slot)

    def active(self, call: Call) -> bool:
        """Whether the call concerns it."""
        return any(not slot.names.isdisjoint(call.names) for slot in self.stems)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the output embedding."""
        call = self.state.current()
        if call is None or not self.active(call):
            return None
        key, h = first_tensor(args, kwargs)
        h = self.rows(call, h)
        return ((h, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: h})

    def rows(self, call: Call, h: Tensor) -> Tensor:
        """h [B, ..., d] with every row's own inverse."""
        if call.rows is None:
            return self.undone(call, call.exprs[0], h)
        index = call.index(h.shape[0], h.device)
        for number, expression in enumerate(call.exprs):
            rows = (index == number).nonzero()[:, 0]
            if len(rows):
                h = h.index_copy(0, rows, self.undone(call, expression, h[rows]))
        return h

    def undone(self, call: Call, expression: Expr, h: Tensor) -> Tensor:
        """h before what the expression does to embeddings."""
        owners = frozenset(name for slot in self.stems for name in slot.names if any(map(invertible, slot.of(name))))
        back = None if call.context.get(FORWARD_ONLY) else inverse(expression, owners)
        if back is None:  # nobody asks for it, or it would have been refused
            return h
        value: Tensor = back.run(h, Undo(self.stems))
        return value


def check_invertible(delta: Delta, width: int | None) -> None:
    """Raises:
    SpecError: the inverse would not be that of the change, or the output embedding reads another width.
    """
    if delta.op != Add():
        raise SpecError(f"{delta.site.name}: an invertible change enters as it is (Add()), found {delta.op}")
    if width is not None and width != delta.site.features:
        raise SpecError(
            f"{delta.site.name} has {delta.site.features} features and the output embedding of this model reads {width}: "
            "the inverse of an invertible adapter has no place there"
        )
