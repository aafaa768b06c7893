"""Token files: CoNLL (columns separated by tabs or spaces), IOB2 with comments and numbers, and CoNLL-U.

A sentence is a block of lines between blank lines, a row of the table: by default the columns `tokens` and `tags`,
tuples of strings.  A sentence with one malformed line is one malformed row.

* `conll`: two or more columns; tabs if the first line has one, otherwise runs of spaces (only U+0020; other spaces are
  text).  Token is the first, tag the last column.  There are no comments, `#` is a token.  `-DOCSTART-` lines of
  CoNLL-2003 are no sentences.
* `iob2`: `#` comments, a token number, the token, its tag, perhaps more (Universal NER).
* `conllu`: https://universaldependencies.org/format.html; token is FORM, tag is UPOS; the columns `heads` (HEAD) and
  `relations` (DEPREL) come along, and `skipped`: the ids of lines that are no words, of multiword tokens (`3-4`) and of empty
  nodes (`3.1`).  Whether heads form a tree is a matter of the task that reads them.
  In both, the comments `sent_id` and `text` are columns of text that can be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from intarsia.data.layout import Columns, Format, Options, Parsed, Row, choose, choose_positions
from intarsia.data.source import Bad, Lines
from intarsia.data.table import Cell
from intarsia.errors import DataError, UsageError

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
COMMENTS = ("sent_id", "text")
SKIPPED = "skipped"
_NUMBER = re.compile(r"[0-9]{1,9}")
_NOT_A_WORD = re.compile(r"[0-9]{1,9}(-|\.)[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Block:
    """A sentence: index of its first line, its token lines as fields with their indices, its comments."""

    index: int
    tokens: tuple[tuple[int, tuple[str, ...]], ...]
    comments: dict[str, str]
    skipped: tuple[str, ...] = ()


def _parse_conll(files: Sequence[Lines], options: Options) -> Parsed:
    (lines,) = files
    first = next((text for text in lines.texts if text.strip(" \t") and not text.startswith("-DOCSTART-")), "")
    separator = options.delimiter or ("\t" if "\t" in first else " ")
    width = len(_fields(first, separator))
    if width < 2:
        raise DataError(
            f"{lines.name}: the first line {first!r} has one column, a token and a tag were expected "
            f"(a file of sentences is read with --format text)"
        )
    columns: Columns = options.columns or (("tokens", 0), ("tags", -1))
    names, positions = choose_positions(columns, width, lines.name)
    return names, _sentences(lines, separator, width, positions, comments=False, numbered=False)


def _parse_iob2(files: Sequence[Lines], options: Options) -> Parsed:
    (lines,) = files
    first = next((text for text in lines.texts if "\t" in text and not text.startswith("#")), "")
    width = len(first.split("\t"))
    if width < 3:
        raise DataError(
            f"{lines.name}: no line has a number, a token and a tag separated by tabs "
            f"(without the numbers the format is conll)"
        )
    columns: Columns = options.columns or (("tokens", 1), ("tags", 2))
    plain = tuple((new, old) for new, old in columns if old not in COMMENTS)
    if any(isinstance(old, str) and not old.removeprefix("-").isdecimal() for _, old in plain):
        raise UsageError(f"{lines.name}: columns of iob2 are positions or {' or '.join(COMMENTS)}, e.g. --columns tokens=1,tags=2")
    chosen = dict(zip(*choose_positions(plain, width, lines.name))) if plain else {}
    positions = tuple(chosen[new] if new in chosen else str(old) for new, old in columns)
    return tuple(new for new, _ in columns), _sentences(lines, "\t", width, positions, comments=True, numbered=True)


def _parse_conllu(files: Sequence[Lines], options: Options) -> Parsed:
    (lines,) = files
    columns: Columns = options.columns or (
        ("tokens", "form"), ("tags", "upos"), ("heads", "head"), ("relations", "deprel"), (SKIPPED, SKIPPED)
    )  # fmt: skip
    names, found = choose(columns, (*CONLLU, *COMMENTS, SKIPPED), lines.name)
    positions = tuple(p if p < len(CONLLU) else (*COMMENTS, SKIPPED)[p - len(CONLLU)] for p in found)
    return names, _sentences(lines, "\t", len(CONLLU), positions, comments=True, numbered=True)


def _sentences(
    lines: Lines, separator: str, width: int, positions: Sequence[int | str], *, comments: bool, numbered: bool
) -> Iterator[Row | Bad]:
    for start, stop in _spans(lines):
        block = _block(lines, start, stop, separator, width, comments)
        if isinstance(block, Block) and numbered:
            block = _numbered(lines, block)
        if isinstance(block, Block) and block.tokens:
            yield _row(lines, block, positions)
        elif isinstance(block, Bad):
            yield block


def _spans(lines: Lines) -> Iterator[tuple[int, int]]:
    """First and last index (exclusive) of each run of lines that are not blank."""
    start = None
    for index, text in enumerate(lines.texts):
        blank = not text.strip(" \t")
        if not blank and start is None:
            start = index
        elif blank and start is not None:
            yield start, index
            start = None
    if start is not None:
        yield start, len(lines.texts)


def _block(lines: Lines, start: int, stop: int, separator: str, width: int, comments: bool) -> Block | Bad:
    tokens: list[tuple[int, tuple[str, ...]]] = []
    notes: dict[str, str] = {}
    for index in range(start, stop):
        text = lines.texts[index]
        if problem := lines.problem(index):
            return problem
        if comments and text.startswith("#"):
            key, equals, value = text[1:].partition("=")
            if equals and key.strip(" ") in COMMENTS:
                notes[key.strip(" ")] = value.strip(" ")
            continue
        fields = _fields(text, separator)
        if not comments and fields[0] == "-DOCSTART-":
            continue
        if len(fields) != width:
            hint = " (comments are known to --format iob2 and conllu only)" if text.startswith("# ") else ""
            return Bad(index + 1, 1, f"{len(fields)} column{'s' * (len(fields) != 1)} where {width} were expected{hint}", text)
        tokens.append((index, fields))
    if len(tokens) > lines.limits.tokens:
        return Bad(start + 1, 0, f"a sentence of {len(tokens)} tokens, the limit is {lines.limits.tokens}", lines.texts[start])
    return Block(tokens[0][0] if tokens else start, tuple(tokens), notes)


def _fields(text: str, separator: str) -> tuple[str, ...]:
    return tuple(re.split("[ \t]+", text.strip(" \t")) if separator == " " else text.split(separator))


def _numbered(lines: Lines, block: Block) -> Block | Bad:
    """Only the words; their numbers must run 1, 2, 3 ..."""
    words: list[tuple[int, tuple[str, ...]]] = []
    skipped: list[str] = []
    for index, fields in block.tokens:
        if _NOT_A_WORD.fullmatch(fields[0]):
            skipped.append(fields[0])
            continue
        if not _NUMBER.fullmatch(fields[0]) or int(fields[0]) != len(words) + 1:
            return Bad(index + 1, 1, f"the number of the token was expected to be {len(words) + 1}", lines.texts[index])
        words.append((index, fields))
    return Block(block.index, tuple(words), block.comments, tuple(skipped))


def _row(lines: Lines, block: Block, positions: Sequence[int | str]) -> Row | Bad:
    cells: list[Cell] = []
    for position in positions:
        if position == SKIPPED:
            cells.append(block.skipped)
            continue
        if isinstance(position, str):
            if position not in block.comments:
                return Bad(block.index + 1, 0, f"the sentence has no comment '# {position} = ...'", lines.texts[block.index])
            cells.append(block.comments[position])
            continue
        for index, fields in block.tokens:
            if not fields[position]:
                return Bad(index + 1, 1, f"column {position + 1} is empty", lines.texts[index])
        cells.append(tuple(fields[position] for _, fields in block.tokens))
    return block.index + 1, tuple(cells)


CONLL = Format("conll", "a token and its tags per line", (".conll", ".bio", ".iob"), _parse_conll, frozenset({"delimiter"}))
IOB2 = Format("iob2", "number, token, tag, with comments (Universal NER)", (".iob2",), _parse_iob2)
CONLL_U = Format("conllu", "Universal Dependencies", (".conllu",), _parse_conllu)
