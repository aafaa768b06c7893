"""Bits per character: how well a language model knows a text, comparable between tokenizers.

    causal model    sum of -log2 p(piece | what is before it) over characters: a code length
    masked model    the same with every piece hidden once (one in seven per pass, in the context of the others): a pseudo
                    code length, comparable with others measured the same way only

An unknown piece hides what it stands for; each of its characters is charged log2 |characters of the text|, so that not knowing
a script is not free.  Lines are measured one by one; what is longer than the model reads is measured in windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import DataError, UsageError
from intarsia.tasks.common import logits_of, pad
from intarsia.tasks.text import Frame, limit, special, windows

STRIDE = 7
"""Every how manieth piece is hidden in one pass over a masked model's window."""
BATCH = 16


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits per character of a text.

    Attributes:
        bits: per character.
        characters: measured.
        unknown: characters that unknown pieces stand for.
        note: how it was measured.
    """

    bits: float
    characters: int
    unknown: int
    note: str


def bits_of_base(base: Any, texts: Sequence[str], lines: int = 32) -> Bits:
    """Bits per character of a base with an LM head, on evenly spread lines of a text."""
    return bits(base.model, base.tokenizer, spread([t for t in texts if t.strip()], lines))


def spread(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` texts, evenly spread over the sequence."""
    if len(texts) <= count:
        return list(texts)
    return [texts[i * len(texts) // count] for i in range(count)]


@torch.no_grad()
def bits(model: Any, tokenizer: Any, texts: Sequence[str], *, run: Callable[[dict[str, Tensor]], Any] | None = None) -> Bits:
    """Bits per character of texts.

    Args:
        model: decides whether it is masked or causal, and how long an input may be.
        tokenizer: a fast one; its mask token makes a model a masked one.
        texts: N lines.
        run: calls the model with a batch (on the CPU) and returns its outputs, on any device; None for a model on the CPU.

    Raises:
        UsageError: the tokenizer is no fast one.
        DataError: there is no text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("bits per character need a fast tokenizer, which knows where in the text a piece comes from")
    characters = sum(map(len, texts))
    if not characters:
        raise DataError("no text to measure bits per character on")
    masked = tokenizer.mask_token_id is not None
    ask = run or (lambda batch: model(**batch))
    frame = Frame.of(tokenizer)
    width = frame.room(limit(tokenizer, model))
    unk = special(tokenizer, "unk")
    each = math.log2(max(2, len(set("".join(texts)))))
    total, unknown = 0.0, 0
    was = model.training
    model.eval()
    try:
        for ids, spans in _windows(tokenizer, texts, width):
            hidden = sum(end - start for piece, (start, end) in zip(ids, spans) if piece == unk)
            unknown += hidden
            total += hidden * each
            known = [i for i, piece in enumerate(ids) if piece != unk]
            total += _masked(ask, tokenizer, frame, ids, known) if masked else _causal(ask, frame, ids, known)
    finally:
        model.train(was)
    how = f"hiding every {STRIDE}th piece in turn" if masked else "piece by piece"
    note = f"{'pseudo ' if masked else ''}bits per character on {len(texts)} lines, {how}; {unknown:,} of {characters:,} characters unknown"
    return Bits(total / characters, characters, unknown, note)


def _windows(tokenizer: Any, texts: Sequence[str], width: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    for text in texts:
        found = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(found["input_ids"][0]), list(found["offset_mapping"][0])
        for start, end in windows(len(ids), width, 0):
            yield ids[start:end], spans[start:end]


def _masked(ask: Callable[[dict[str, Tensor]], Any], tokenizer: Any, frame: Frame, ids: list[int], known: list[int]) -> float:
    """Bits of a window's known pieces, each hidden once."""
    passes = [known[i::STRIDE] for i in range(min(STRIDE, len(known)))]
    total = 0.0
    for start in range(0, len(passes), BATCH):
        chunk = passes[start : start + BATCH]
        rows = [frame.wrap(tokenizer.mask_token_id if i in set(hidden) else piece for i, piece in enumerate(ids)) for hidden in chunk]
        logits = _logits(ask, rows)
        offset = len(frame.before)
        for row, hidden in enumerate(chunk):
            at = torch.tensor([offset + i for i in hidden])
            target = torch.tensor([ids[i] for i in hidden], device=logits.device)
            total -= float(logits[row, at].double().log_softmax(-1).gather(1, target[:, None]).sum())
    return total / math.log(2)


def _causal(ask: Callable[[dict[str, Tensor]], Any], frame: Frame, ids: list[int], known: list[int]) -> float:
    """Bits of a window's known pieces, each after what is before it; the first has nothing before it where no token begins texts."""
    full = frame.wrap(ids)
    at = [len(frame.before) + i for i in known]
    scored = [i for i in at if i > 0]
    total = 0.0
    if scored:
        found = _logits(ask, [full])[0, torch.tensor(scored) - 1].double().log_softmax(-1)
        total = -float(found.gather(1, torch.tensor([full[i] for i in scored], device=found.device)[:, None]).sum())
        total += (len(at) - len(scored)) * math.log(found.shape[-1])
    return total / math.log(2)


def _logits(ask: Callable[[dict[str, Tensor]], Any], rows: list[list[int]]) -> Tensor:
    batch = {"input_ids": pad(rows, 0), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
    found: Tensor = logits_of(ask(batch))
    return found
