"""What a stack was given in one pass: its mask, what it has read before, whose states it reads.

`Watch` sits on a stack and notes this for forms that ask (gates, edits of the prompt, task ids per row); a host has one
only where a module needs it.  What is kept for later steps of a generation belongs to the cache object of the model and is
gone with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from intarsia.errors import CompositionError
from intarsia.host.call import Child, State, thread
from intarsia.host.sequence import CACHE_NAMES, SequenceSocket, bind
from intarsia.host.socket import first_tensor

Key = tuple[int, int, int]
Kept = dict[Key, Tensor]
Pair = tuple[Tensor, Tensor]


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
        blocks: number of blocks of the stack.
        taps: what the first block was given and what each block gave so far, without a graph.
        grown: keys and values of forms, of earlier passes; they are layers of the model's cache, so that it reorders them.
        fresh: those of this pass.
        final: first state of every row, by which a decoder knows that it reads this pass of the encoder.
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
    blocks: int = 0
    taps: list[Tensor] = field(default_factory=list)
    grown: dict[Key, DynamicLayer] = field(default_factory=dict)
    fresh: dict[Key, Pair] = field(default_factory=dict)
    final: Tensor | None = None


class Watch(Child):
    """Notes what a stack is given.

    Args:
        name: of the stack, as sites name it.
        blocks: number of its blocks.
    """

    def __init__(self, state: State, name: str, blocks: int) -> None:
        super().__init__(state)
        self.name = name
        self.blocks = blocks
        self.__dict__["names"] = set()
        self.__dict__["tapping"] = set()

    names: set[str]
    tapping: set[str]

    def forget(self, name: str) -> None:
        """A module is gone."""
        self.names.discard(name)
        self.tapping.discard(name)

    def taps(self) -> list[Tensor] | None:
        """Where the blocks of the running pass put what they give; None if nobody asks."""
        call = self.state.current()
        note = self.state.noted().get(self.name)
        return None if note is None or call is None or self.tapping.isdisjoint(call.names) else note.taps

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
            blocks=self.blocks,
            grown={} if cache is None else self.state.grown.get(cache, {}),
        )
        here = self.state.given.setdefault(thread(), {})
        here[self.name] = note
        if note.answers and not self.tapping.isdisjoint(call.names):
            here["encoder"] = self._encoder(given["encoder_hidden_states"])

    def _encoder(self, states: Tensor) -> Given:
        """The pass of the encoder whose states this decoder reads (beams and samples repeat its rows)."""
        note = self.state.left.get(thread())
        if note is None or note.final is None or len(states) % note.rows:
            raise CompositionError("a side network needs the encoder to run under the same expression, just before the decoder")
        each = len(states) // note.rows
        if not torch.equal(states[::each, 0], note.final):
            raise CompositionError(
                "these encoder states are not those of the encoder's last pass; a side network needs both, so let the model "
                "run its encoder, or run it again"
            )
        return note if each == 1 else repeated(note, each)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook (also after an exception): what is kept goes with the cache that the stack returns."""
        note = self.state.given.get(thread(), {}).pop(self.name, None)
        if note is None or output is None:
            return
        cache = next((found for k in CACHE_NAMES if (found := getattr(output, k, None)) is not None), None)
        if note.kept and cache is not None:
            self.state.kept[cache] = note.kept
        if note.fresh and cache is not None:
            self._grow(cache, note)
        if note.taps and self.name == "encoder":
            states = output[0]
            note.final = states[:, 0].detach()
            self.state.left[thread()] = note

    def _grow(self, cache: Any, note: Given) -> None:
        """Put a pass's keys and values of forms into the model's cache, behind its own layers."""
        known = self.state.grown.setdefault(cache, {})
        layers = getattr(cache, "self_attention_cache", cache).layers
        for key, (keys, values) in note.fresh.items():
            if key not in known:
                known[key] = DynamicLayer()
                layers.append(known[key])
            known[key].update(keys.detach(), values.detach())


def repeated(note: Given, each: int) -> Given:
    """The encoder's pass with every row repeated."""

    def wide(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.repeat_interleave(each, 0)

    taps = [tap.repeat_interleave(each, 0) for tap in note.taps]
    return replace(note, rows=note.rows * each, mask=wide(note.mask), taps=taps, final=wide(note.final))


class Rung(Child):
    """On a block: notes what it gives (and, on the first, what it is given)."""

    def __init__(self, state: State, watch: Watch) -> None:
        super().__init__(state)
        self.__dict__["watch"] = watch

    watch: Watch

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps = self.watch.taps()
        if taps is not None:
            taps.append(first_tensor(args, kwargs)[1].detach())

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        taps = self.watch.taps()
        if taps is not None:
            taps.append((output[0] if isinstance(output, tuple) else output).detach())


def flat(mask: Any) -> Tensor | None:
    """A mask that says which positions are real, [B, T]; others (4-D) say nothing about positions."""
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows_of(given: Mapping[str, Any]) -> int:
    """Rows of the batch that a stack or model was given."""
    for value in given.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    return 1
