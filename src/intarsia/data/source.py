"""From bytes to lines: strict decoding, line ends, limits, Unicode normalisation and messages with a place.

What is here knows nothing of formats.  Only `\\n`, `\\r\\n` and (in files without any `\\n`) `\\r` end a line; U+2028,
U+0085, form feeds and the like are characters of the text.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from intarsia.errors import DataError, UsageError, listing, nearest

FORMS = ("NFC", "NFD", "NFKC", "NFKD", "none")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts at most.

    Attributes:
        file_bytes: size of a file.
        line_chars: characters of a line (and of a csv record that spans lines).
        fields: fields of a row, keys of a JSON object.
        tokens: tokens of a sentence.
    """

    file_bytes: int = 4 << 30
    line_chars: int = 1_000_000
    fields: int = 1_000
    tokens: int = 50_000


@dataclass(frozen=True, slots=True)
class Bad:
    """A malformed row: where and why (`column` is a 1-based character position, 0 for the whole line)."""

    line: int
    column: int
    what: str
    text: str

    def message(self, name: str) -> str:
        """`file:line:column: what; found: '...'`."""
        place = f"{name}:{self.line}:{self.column}" if self.column else f"{name}:{self.line}"
        return f"{place}: {self.what}; found: {excerpt(self.text, self.column)}"


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of one file, without their ends.

    Attributes:
        name: the file, as messages show it.
        texts: the lines.
        ends: what ended each line; the last may be empty.
        limits: see `Limits`.
    """

    name: str
    texts: Sequence[str]
    ends: Sequence[str]
    limits: Limits

    def problem(self, index: int, *, allow_cr: bool = False) -> Bad | None:
        """What makes a line unfit for every format: NUL, a stray carriage return, too long."""
        text = self.texts[index]
        if len(text) > self.limits.line_chars:
            return Bad(index + 1, 0, f"the line has {len(text)} characters, the limit is {self.limits.line_chars}", text[:80])
        if "\0" in text:
            what = "NUL character (is this a UTF-16 or a binary file? see --encoding)"
            return Bad(index + 1, text.index("\0") + 1, what, text)
        if "\r" in text and not allow_cr:
            return Bad(index + 1, text.index("\r") + 1, "a carriage return inside a line", text)
        return None


def excerpt(text: str, column: int = 0, width: int = 60) -> str:
    """A short quotation around a 1-based column, with invisible characters escaped."""
    start = max(0, column - 1 - width // 2) if column > width else 0
    shown = text[start : start + width]
    return f"{'...' if start else ''}{shown!r}{'...' if start + width < len(text) else ''}"


def read_lines(path: str | os.PathLike[str], encoding: str, limits: Limits) -> Lines:
    """Read a file (`"-"` is standard input) into lines.

    Raises:
        DataError: the file cannot be read, is empty, too large, or not in the given encoding.
    """
    name = "<stdin>" if os.fspath(path) == "-" else os.fspath(path)
    data = _read_bytes(path, name, limits)
    if not data:
        raise DataError(f"{name}: the file is empty")
    text = decode(data, encoding, name)
    if not text:
        raise DataError(f"{name}: the file holds nothing but a byte order mark")
    texts, ends = split_lines(text)
    return Lines(name, texts, ends, limits)


def _read_bytes(path: str | os.PathLike[str], name: str, limits: Limits) -> bytes:
    try:
        if name == "<stdin>":
            return _read_limited(sys.stdin.buffer, name, limits)
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > limits.file_bytes:
                raise DataError(f"{name}: {status.st_size} bytes, the limit is {limits.file_bytes}; split the file")
            return _read_limited(stream, name, limits)
    except FileNotFoundError:
        folder = Path(path).parent
        siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise DataError(f"{name}: no such file{nearest(Path(path).name, siblings)}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _read_limited(stream: BinaryIO, name: str, limits: Limits) -> bytes:
    """Read in blocks, so that an endless pipe stops at the limit."""
    blocks: list[bytes] = []
    total = 0
    while block := stream.read(_BLOCK):
        total += len(block)
        if total > limits.file_bytes:
            raise DataError(f"{name}: more than {limits.file_bytes} bytes, the limit; split the file")
        blocks.append(block)
    return b"".join(blocks)


def decode(data: bytes, encoding: str, name: str) -> str:
    """Decode strictly; a byte order mark in front of UTF-8 is dropped.

    Raises:
        DataError: not in this encoding; the message names byte, line and column.
        UsageError: unknown encoding.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "ignore").replace("\r\n", "\n").replace("\r", "\n")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        around = data[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"{name}:{line}:{column}: byte {error.start} (0x{data[error.start]:02x}) is not {encoding} ({error.reason}); "
            f"found: {around!r}; {_guess(data)}"
        ) from None
    except UnicodeError as error:
        raise DataError(f"{name}: not {encoding}: {error}; {_guess(data)}") from None
    except LookupError:
        raise UsageError(f"--encoding {encoding!r} is not a text encoding Python knows; try utf-8, latin-1 or utf-16") from None
    return text.removeprefix("\ufeff")


def _guess(data: bytes) -> str:
    """Advice that fits the first bytes; never applied silently."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[1:2] == b"\0" or data[:1] == b"\0":
        return "the first bytes look like UTF-16: try --encoding utf-16"
    return "if you know its encoding, say so, e.g. --encoding cp1252 or --encoding latin-1, or convert the file to UTF-8"


def split_lines(text: str) -> tuple[list[str], list[str]]:
    """Lines and what ended each of them.

    A `\\r` on its own ends lines only in a file without `\\n`; elsewhere it is a stray character that formats refuse.
    """
    if "\n" in text or "\r" not in text:
        texts = text.split("\n")
        ends = ["\n"] * (len(texts) - 1) + [""]
        if "\r\n" in text:
            for i, line in enumerate(texts[:-1]):
                if line.endswith("\r"):
                    texts[i], ends[i] = line[:-1], "\r\n"
    else:
        texts = text.split("\r")
        ends = ["\r"] * (len(texts) - 1) + [""]
    if not texts[-1]:
        texts.pop()
        ends.pop()
    return texts, ends


def check_form(form: str) -> None:
    """Raise UsageError if a normalisation form is unknown."""
    if form not in FORMS:
        raise UsageError(f"normalise={form!r} is not one of {listing(FORMS)}{nearest(form, FORMS)}")


def normalise(text: str, form: str = "NFC") -> str:
    """Unicode normalisation; `"none"` leaves the text alone.

    Cells are normalised one by one and never a whole file, because compatibility forms produce commas, quotes and
    semicolons out of other characters.
    """
    if form == "none" or text.isascii():
        return text
    return unicodedata.normalize(form, text)  # type: ignore[arg-type]
