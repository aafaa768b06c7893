"""`Report`: what a conversion carried, what it could not carry, and what a user must know about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intarsia.errors import listing
from intarsia.modules.module import Module


@dataclass(frozen=True, slots=True)
class Report:
    """The account of one conversion.

    Attributes:
        source: folder or module that was converted.
        kind: the peer's name of the method.
        carried: number of tensors that have a place in the result.
        left_out: what has no place there, one sentence each with the reason.
        notes: differences that do not change a tensor but may change an output or a training run.
    """

    source: str
    kind: str
    carried: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything was carried."""
        return not self.left_out

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kind}, {self.carried} tensors carried"]
        lines += [f"  left out: {what}" for what in self.left_out]
        return "\n".join([*lines, *(f"  note: {what}" for what in self.notes)])


def beside(module: Module, labels: Sequence[str] | None, reason: str) -> list[str]:
    """What a module says beside its tensors and a peer's files do not hold, one sentence each for `left_out`.

    Args:
        labels: its label names, if they are lost too.
    """
    found = (("label names", labels), ("the context", module.context), ("required modules", module.requires))
    return [f"{what} ({listing(map(str, there), 4)}): {reason}" for what, there in found if there]
