"""What a stack was given in one pass: its mask, what it has read before, whose states it reads.

`Watch` sits on a stack and notes this for forms that ask (gates, edits of the prompt, task ids per row); a host has one
only where a module needs it.  What is kept for later steps of a generation belongs to the cache object of the model and is
gone with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from intarsia.host.call import Child, State, thread
from intarsia.host.sequence import CACHE_NAMES, SequenceSocket, bind

Kept = dict[tuple[int, int, int], Tensor]


@dataclass(slots=True)
class Given:
    """One pass through a stack.

    Attributes:
        rows: of the batch.
        stack: the module itself.
        mask: [rows, past + T] as the stack was given it, None if it was not.
        states_mask: the mask of encoder states that a decoder reads.
        past: positions that came in earlier passes.
        soft: positions in front that a soft prompt takes.
        answers: the stack is a decoder that reads an encoder.
        ids: token ids [rows, T].
        kept: values computed with the prompt; None if they were never computed.
    """

    rows: int
    stack: nn.Module
    mask: Tensor | None = None
    states_mask: Tensor | None = None
    past: int = 0
    soft: int = 0
    answers: bool = False
    ids: Tensor | None = None
    kept: Kept | None = field(default_factory=dict)


class Watch(Child):
    """Notes what a stack is given.

    Args:
        name: of the stack, as sites name it.
    """

    def __init__(self, state: State, name: str) -> None:
        super().__init__(state)
        self.name = name
        self.__dict__["names"] = set()

    names: set[str]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack; it runs behind those that lengthen the sequence."""
        call = self.state.current()
        if call is None or self.names.isdisjoint(call.names):
            return
        given = {**bind(module, args), **kwargs}
        cache = next((given[k] for k in CACHE_NAMES if given.get(k) is not None), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        soft = next((m.counts.get(thread(), 0) for m in module._modules.values() if isinstance(m, SequenceSocket)), 0)
        kept: Kept | None = {} if past == 0 else self.state.kept.get(cache)
        note = Given(
            rows=rows_of(given),
            stack=module,
            mask=flat(given.get("attention_mask")),
            states_mask=flat(given.get("encoder_attention_mask")),
            past=past,
            soft=soft,
            answers=given.get("encoder_hidden_states") is not None,
            ids=given.get("input_ids"),
            kept=kept,
        )
        self.state.given.setdefault(thread(), {})[self.name] = note

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook (also after an exception): what is kept goes with the cache that the stack returns."""
        note = self.state.given.get(thread(), {}).pop(self.name, None)
        cache = next((found for k in CACHE_NAMES if (found := getattr(output, k, None)) is not None), None)
        if note is not None and note.kept and cache is not None:
            self.state.kept[cache] = note.kept


def flat(mask: Any) -> Tensor | None:
    """A mask that says which positions are real, [B, T]; others (4-D) say nothing about positions."""
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows_of(given: Mapping[str, Any]) -> int:
    """Rows of the batch that a stack or model was given."""
    for value in given.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    return 1
