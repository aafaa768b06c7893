"""Tokenisation for tasks: texts and pairs with counted truncation, word by word, and windows over long inputs.

Words are tokenised one by one, so that no normalisation inside a tokenizer (NFKC turns U+1FBD into a space and a mark)
can shift pieces from one word to the next; the pieces in a row are those of the words joined by blanks.  Works with fast
and slow tokenizers.  Padding is in `common.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intarsia.errors import UsageError

LONGEST = 512
"""Pieces per input where nobody asks for another length."""

_PROBES = ("a", "1", ".", "e", "o", "the", "ka", "на", "的", "अ", "ا")
_CHUNK = 1024

Ids = list[int]


def limit(tokenizer: Any, model: Any = None) -> int:
    """How many pieces an input may have: what tokenizer and model allow, at most `LONGEST`."""
    allowed = [LONGEST, getattr(tokenizer, "model_max_length", LONGEST)]
    if model is not None:
        config = model.config.get_text_config()
        count = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if count:
            allowed.append(count - _reserved(model))
    return int(min(allowed))


def _reserved(model: nn.Module) -> int:
    """Rows of the position table that no token gets: RoBERTa and its kin count from behind the padding id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def special(tokenizer: Any, *kinds: str) -> int | None:
    """Id of the first of the named special tokens (`bos`, `eos` ...) that the tokenizer has."""
    found = (getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds)
    return next((int(i) for i in found if i is not None), None)


def pieces(tokenizer: Any, texts: Sequence[str], target: bool = False) -> list[Ids]:
    """Pieces of each text without special tokens; `target` for the target side of a translation tokenizer."""
    found: list[Ids] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        how = {"text_target": chunk} if target else {"text": chunk}
        found += map(list, tokenizer(**how, add_special_tokens=False, verbose=False)["input_ids"])
    return found


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the pieces of every window: special tokens, and the pieces of a text prefix."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, prefix: str = "", target: bool = False) -> Frame:
        """The frame that the tokenizer puts around a single text, learnt from a probe.

        Raises:
            UsageError: the tokenizer turns no probe into pieces.
        """
        for probe in _PROBES:
            (bare,) = pieces(tokenizer, [probe], target)
            if bare:
                break
        else:
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} gives no pieces for any of {_PROBES}; is its vocabulary loaded?"
            )
        how = {"text_target": [probe]} if target else {"text": [probe]}
        full = list(tokenizer(**how)["input_ids"][0])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        if at is None:
            raise UsageError(
                f"{type(tokenizer).__name__} tokenises {probe!r} differently with and without special tokens: {full}, {bare}"
            )
        middle = [i for word in word_pieces(tokenizer, [tuple(prefix.split())])[0] for i in word]
        return cls((*full[:at], *middle), tuple(full[at + len(bare) :]))

    def room(self, max_length: int) -> int:
        """Pieces that fit between; raises UsageError if there is no room."""
        left = max_length - len(self.before) - len(self.after)
        if left < 1:
            raise UsageError(
                f"max_length={max_length} leaves no room for text: special tokens and prefix take {max_length - left}"
            )
        return left

    def wrap(self, ids: Iterable[int]) -> Ids:
        """The window with its frame."""
        return [*self.before, *ids, *self.after]


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[dict[str, Ids]], Counter[str]]:
    """Texts (or pairs) with special tokens, the longer side cut first where they are too long.

    Args:
        texts: N texts, prefix included.
        pairs: N second texts, or None.
        max_length: in pieces, special tokens included.

    Returns:
        N dictionaries of the tokenizer's model inputs, at least one piece each; counts `truncated`, `pieces`, `unknown`
        (pieces), `empty` (texts without a piece).

    Raises:
        UsageError: `max_length` leaves no room for text.
    """
    specials = int(tokenizer.num_special_tokens_to_add(pair=pairs is not None))
    if max_length - specials < (1 if pairs is None else 2):
        raise UsageError(f"max_length={max_length} leaves no room for text: special tokens take {specials}")
    counts: Counter[str] = Counter(truncated=0, pieces=0, unknown=0, empty=0)
    unknown, filler = special(tokenizer, "unk"), special(tokenizer, "bos", "eos", "cls", "unk", "pad") or 0
    found: list[dict[str, Ids]] = []
    for text, ids in zip(range(len(texts)), _encoded(tokenizer, texts, pairs)):
        if len(ids["input_ids"]) > max_length:
            counts["truncated"] += 1
            second = {} if pairs is None else {"text_pair": pairs[text]}
            cut = tokenizer(texts[text], **second, truncation="longest_first", max_length=max_length, verbose=False)
            ids = {**{key: list(cut[key]) for key in ids if key in cut}, "attention_mask": [1] * len(cut["input_ids"])}
        counts["empty"] += len(ids["input_ids"]) <= specials
        if not ids["input_ids"]:
            # a row without any position would be all padding, which attention turns into NaN
            ids = {key: [{"input_ids": filler, "attention_mask": 1}.get(key, 0)] for key in ids}
        counts["pieces"] += len(ids["input_ids"])
        counts["unknown"] += 0 if unknown is None else ids["input_ids"].count(unknown)
        found.append(ids)
    return found, counts


def _encoded(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterable[dict[str, Ids]]:
    for start in range(0, len(texts), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        second = {} if pairs is None else {"text_pair": list(pairs[chunk])}
        batch = tokenizer(list(texts[chunk]), **second, verbose=False)
        keys = [key for key in ("input_ids", "token_type_ids") if key in batch]
        for row in range(len(batch["input_ids"])):
            yield {**{key: list(batch[key][row]) for key in keys}, "attention_mask": [1] * len(batch["input_ids"][row])}


def word_pieces(tokenizer: Any, sentences: Sequence[Sequence[str]], follows: bool = False) -> list[list[Ids]]:
    """Pieces of every word of every sentence; a word that gives no piece gets the unknown token (or a filler).

    Args:
        follows: something stands before the first word (a prefix).
    """
    lead = _leading_space(tokenizer)
    forms = [[(lead if i or follows else "") + word for i, word in enumerate(words)] for words in sentences]
    new = list(dict.fromkeys(form for words in forms for form in words))
    filler = special(tokenizer, "unk", "pad", "eos", "bos") or 0
    known = {form: ids or [filler] for form, ids in zip(new, pieces(tokenizer, new))}
    return [[known[form] for form in words] for words in forms]


def _leading_space(tokenizer: Any) -> str:
    """A blank if words inside a text are tokenised with the blank before them (byte-level BPE), otherwise nothing."""
    joint, first, bare, spaced = pieces(tokenizer, ["a a", "a", "a", " a"])
    return " " if joint != first + bare and joint == first + spaced else ""


def windows(count: int, width: int, overlap: int, flush: bool = False) -> list[tuple[int, int]]:
    """`(start, end)` of windows over `count` positions, each `width` long, neighbours sharing `overlap`.

    Every position is in a window; there is always at least one, `(0, 0)` for nothing.

    Args:
        flush: move the last window back to full width, so that its first positions have context.

    Raises:
        UsageError: the overlap is not smaller than the width.
    """
    if not 0 <= overlap < width:
        raise UsageError(f"windows of {width} pieces cannot overlap by {overlap}")
    found = [(0, min(width, count))]
    while found[-1][1] < count:
        start = found[-1][1] - overlap
        if flush:
            start = max(0, min(start, count - width))
        found.append((start, min(start + width, count)))
    return found


def context(window: tuple[int, int], position: int, count: int) -> int:
    """Positions of context on the poorer side; an end of the text itself is no lack of context."""
    start, end = window
    left = position - start if start else count
    right = end - 1 - position if end < count else count
    return min(left, right)


def best_window(found: Sequence[tuple[int, int]], position: int, count: int) -> int:
    """Index of the window that gives a position most context (the earliest of equals)."""
    key: Callable[[int], tuple[int, int]] = lambda i: (context(found[i], position, count), -i)  # noqa: E731
    return max((i for i, (start, end) in enumerate(found) if start <= position < end), key=key)
