"""The normalisation of a SentencePiece model as the `Precompiled` normaliser of the package `tokenizers`.

`Precompiled` takes SentencePiece's own binary: a Darts double array whose keys are UTF-8 strings and whose values are
offsets into a block of NUL-ended replacements.  Here it is built from a table of single characters (what a model file
tells us) completed by the canonical compositions that SentencePiece's `nmt_nfkc` rule adds (builder.cc,
`BuildNFKCMap`).  So the optional package `sentencepiece` is not needed; and its current release would be wrong: its
table follows a newer Unicode and, among others, keeps U+200D, which the XLM-R family turns into a space.

Only compositions below six bytes are made: `Precompiled` looks up whole grapheme clusters below six bytes and single
characters otherwise, so longer keys (decomposed Hangul, for the most part) can never be met.
"""

from __future__ import annotations

import struct
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import product

#: `Precompiled` looks up a grapheme cluster as a whole only below this many bytes
WHOLE = 6


def with_compositions(singles: Mapping[str, str]) -> dict[str, str]:
    """Add to a table of single characters the sequences that compose, e.g. `e` + U+0301 -> `é`.

    A sequence is spelled with any character that the table knows to be a variant of its decomposition; sequences that
    give the same result piece by piece are left out.
    """
    variants: dict[str, set[str]] = defaultdict(set)
    for char in singles:
        plain = unicodedata.normalize("NFKD", char)
        if len(plain) == 1:
            variants[plain].add(char)
    table = dict(singles)
    for parts, composed in _compositions():
        for spelled in product(*({part} | variants[part] for part in parts)):
            key = "".join(spelled)
            if key != composed and len(key.encode()) < WHOLE:
                table[key] = composed
    return {key: value for key, value in table.items() if len(key) < 3 or _piecewise(key, table) != value}


@cache
def _compositions() -> tuple[tuple[str, str], ...]:
    """Every compatibility decomposition of two or three code points that composes to something else."""
    found: dict[str, str] = {}
    for char in map(chr, (*range(0xD800), *range(0xE000, 0x110000))):
        parts = unicodedata.normalize("NFKD", char)
        # more code points do not fit below six bytes, since one of them is a combining mark of two
        if 2 <= len(parts) <= 3:
            found[parts] = unicodedata.normalize("NFC", parts)
    return tuple((parts, composed) for parts, composed in found.items() if parts != composed)


def _piecewise(key: str, table: Mapping[str, str]) -> str:
    """Normalise `key` by the longest shorter entries, from the left."""
    out, at = [], 0
    while at < len(key):
        for end in range(len(key) if at else len(key) - 1, at, -1):
            part = key[at:end]
            if part in table or end == at + 1:
                out.append(table.get(part, part))
                at = end
                break
    return "".join(out)


class _DoubleArray:
    """A trie over bytes in the unit format of darts-clone.

    A node lives at a *base*; its child by byte c lies at unit `base ^ c` and holds c and the way to the child's own
    base; the child by byte 0 holds the value.  Bases are never shared, so a unit found under one node belongs to it.
    """

    def __init__(self, keys: Mapping[bytes, int]) -> None:
        self.units: list[int] = []
        self.taken: list[bool] = []
        self.bases: set[int] = set()
        self.next: dict[tuple[int, ...], int] = {}
        self._grow()
        self.taken[0] = True
        children: dict[bytes, set[int]] = {b"": set()}
        for key in keys:
            for at, byte in enumerate(key):
                children.setdefault(key[:at], set()).add(byte)
            children.setdefault(key, set()).add(0)
        todo = [(b"", 0)]
        while todo:
            prefix, unit = todo.pop()
            labels = tuple(sorted(children[prefix]))
            base = self._place(labels)
            self.units[unit] |= (unit ^ base) << 10 | (labels[0] == 0) << 8
            for label in labels:
                child = base ^ label
                if label:
                    self.units[child] = label
                    todo.append((prefix + bytes([label]), child))
                else:
                    self.units[child] = keys[prefix] | 1 << 31

    def _grow(self) -> None:
        # whole blocks of 256, so that base ^ byte never leaves the array
        self.units += [0] * 256
        self.taken += [False] * 256

    def _place(self, labels: tuple[int, ...]) -> int:
        # room never comes back, so a search for the same labels goes on where the last one ended
        at = self.next.get(labels, 1)
        while True:
            if at == len(self.taken):
                self._grow()
            base = at ^ labels[0]
            if base and base not in self.bases and not any(self.taken[base ^ label] for label in labels):
                break
            at += 1
        self.next[labels] = at + 1
        self.bases.add(base)
        for label in labels:
            self.taken[base ^ label] = True
        return base


def precompile(table: Mapping[str, str]) -> bytes:
    """The binary that `tokenizers.normalizers.Precompiled` reads.

    Args:
        table: text -> replacement; neither may hold NUL, no key may be empty.
    """
    if any(not key or "\0" in key + value for key, value in table.items()):
        raise ValueError("a normalisation table has no empty key and no NUL")
    offsets: dict[str, int] = {}
    texts = bytearray()
    for value in sorted(set(table.values())):
        offsets[value] = len(texts)
        texts += value.encode() + b"\0"
    units = _DoubleArray({key.encode(): offsets[value] for key, value in sorted(table.items())}).units
    # 21 bits of offset without the extension bit of the format
    assert len(units) < 1 << 21, "far more keys than any normalisation has"
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + bytes(texts)
