"""`check`: look at the data before training on it.

Counts rows, labels, duplicates, overlap between splits, contradictions, lengths, characters; and with a tokenizer what it
does to the words.  Errors are findings that make a result meaningless, warnings are findings to look at.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from intarsia.data.characters import code_point, invisible, name_of, scripts, word_spans
from intarsia.data.labels import flatten, twins
from intarsia.data.pieces import Span, Tokenizer, lacking, measure, special_tokens
from intarsia.data.report import CharacterUse, DataReport, Lengths, Overlap, PieceReport, SplitReport, percent
from intarsia.data.spans import detect_scheme, irregularities
from intarsia.data.table import Cell, Table
from intarsia.errors import DataError, UsageError, listing, nearest

#: shares above which a finding is a warning, an error
OVERLAP = (0.01, 0.50)
UNKNOWN_WORDS = (0.05, 0.20)
DUPLICATES = 0.01
PLACES = 3


@dataclass(frozen=True, slots=True)
class View:
    """A split as `check` sees it: per text column its texts and their words; per row its keys."""

    name: str
    table: Table
    texts: tuple[tuple[str, ...], ...]
    words: tuple[tuple[tuple[Span, ...], ...], ...]
    exact: tuple[tuple[str, ...], ...]
    normal: tuple[tuple[str, ...], ...]


def check(
    train: Table,
    dev: Table | None = None,
    test: Table | None = None,
    *,
    text: str | Sequence[str] = "text",
    label: str | None = None,
    numeric_label: bool = False,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
) -> DataReport:
    """Look at up to three splits.

    Args:
        train, dev, test: tables.
        text: the column of texts (or of tokens), or several, e.g. `("premise", "hypothesis")`.
        label: the column of labels (or of tags).
        numeric_label: the labels are numbers of a regression, not classes.
        tokenizer: a transformers fast tokenizer, or a callable like it.
        max_length: pieces (special tokens included) that a row may have before it is cut.

    Raises:
        DataError: a column is missing, or tokens and tags differ in number.
        UsageError: `max_length` without a tokenizer.
    """
    if max_length is not None and tokenizer is None:
        raise UsageError("max_length counts pieces: give a tokenizer too")
    columns = (text,) if isinstance(text, str) else tuple(text)
    tables = [(name, table) for name, table in (("train", train), ("dev", dev), ("test", test)) if table is not None]
    for name, table in tables:
        if not len(table):
            raise DataError(f"{name} ({table.source}) has no rows")
    views = [_view(name, table, columns) for name, table in tables]
    splits = tuple(_split(view, label, numeric_label, tokenizer, max_length) for view in views)
    overlaps = tuple(_overlap(first, second) for first, second in combinations(views, 2))
    warnings: list[str] = []
    errors: list[str] = []
    _judge_overlaps(overlaps, warnings, errors)
    if label and not numeric_label:
        _judge_labels(splits, warnings, errors)
        for view in views:
            _judge_tags(view, columns[0], label, warnings)
    for split in splits:
        _judge_split(split, max_length, warnings, errors)
    return DataReport(splits, overlaps, max_length, tuple(warnings), tuple(errors))


def normal_form(text: str) -> str:
    """NFKC, case folded, without white space, punctuation and control characters; combining marks stay."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_DROP) or folded


class _Dropped(dict[int, int | None]):
    """Translation table, filled as characters are met: None for what `normal_form` drops."""

    def __missing__(self, point: int) -> int | None:
        self[point] = None if unicodedata.category(chr(point))[0] in "ZPC" else point
        return self[point]


_DROP = _Dropped()


def _view(name: str, table: Table, columns: Sequence[str]) -> View:
    texts, words = [], []
    for column in columns:
        joined = [_joined(cell) for cell in table.column(column)]
        texts.append(tuple(text for text, _ in joined))
        words.append(tuple(spans for _, spans in joined))
    exact = tuple(zip(*texts))
    normal = tuple(tuple(map(normal_form, key)) for key in exact)
    return View(name, table, tuple(texts), tuple(words), exact, normal)


def _joined(cell: Cell) -> tuple[str, tuple[Span, ...]]:
    """Text of a cell and where its words are; tokens are words, joined by blanks."""
    if isinstance(cell, str):
        return cell, tuple(word_spans(cell))
    spans, at = [], 0
    for token in cell:
        spans.append((at, at + len(token)))
        at += len(token) + 1
    return " ".join(cell), tuple(spans)


def _split(
    view: View, label: str | None, numeric_label: bool, tokenizer: Tokenizer | None, max_length: int | None
) -> SplitReport:
    table = view.table
    labels = table.column(label) if label else None
    counts = Counter(flatten(labels)) if labels is not None and not numeric_label else None
    contradictions = _contradictions(view, labels) if counts is not None and labels is not None else []
    hidden = [invisible("\n".join(key)) for key in view.exact]
    changed = sum(any(not unicodedata.is_normalized("NFC", text) for text in key) for key in view.exact)
    return SplitReport(
        name=view.name,
        source=table.source,
        digest=table.digest,
        rows=len(table),
        skipped=table.skipped,
        renormalised=max(table.renormalised, changed),
        empty=sum(not all(text.strip() for text in key) for key in view.exact),
        duplicates=len(table) - len(set(view.exact)),
        near_duplicates=len(table) - len(set(view.normal)),
        contradictions=len(contradictions),
        contradiction_places=tuple(contradictions[:PLACES]),
        labels=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))) if counts is not None else None,
        words=Lengths.of(sum(map(len, row)) for row in zip(*view.words)),
        pieces=_pieces(view, tokenizer, max_length) if tokenizer else None,
        scripts=scripts(text for key in view.exact for text in key),
        invisible=_uses(view, hidden),
        invisible_rows=sum(map(bool, hidden)),
    )


def _contradictions(view: View, labels: Sequence[Cell]) -> list[str]:
    """Texts with more than one label, as the places of the first two rows that disagree."""
    first: dict[tuple[str, ...], tuple[int, Cell]] = {}
    found: dict[tuple[str, ...], str] = {}
    for row, (key, label) in enumerate(zip(view.exact, labels)):
        seen, seen_label = first.setdefault(key, (row, label))
        if seen_label != label and key not in found:
            found[key] = f"{view.table.where(seen)} and {view.table.where(row)}"
    return list(found.values())


def _pieces(view: View, tokenizer: Tokenizer, max_length: int | None) -> PieceReport:
    parts = [measure(tokenizer, texts, words) for texts, words in zip(view.texts, view.words)]
    extra = special_tokens(tokenizer, pair=len(parts) == 2)
    lengths = [sum(row) + extra for row in zip(*(part.lengths for part in parts))]
    pieces = sum(sum(part.lengths) for part in parts)
    words = sum(len(spans) for column in view.words for spans in column)
    lacks = frozenset(lacking(tokenizer, frozenset().union(*(part.suspects for part in parts))))
    return PieceReport(
        lengths=Lengths.of(lengths),
        per_word=pieces / words if words else 0.0,
        unknown_pieces=sum(part.unknown_pieces for part in parts),
        pieces=pieces,
        unknown_words=sum(part.unknown_words for part in parts),
        words=words,
        truncated=None if max_length is None else sum(length > max_length for length in lengths),
        lacking=_uses(view, [[char for text in key for char in text if char in lacks] for key in view.exact] if lacks else []),
    )


def _uses(view: View, found: Iterable[Sequence[str]]) -> tuple[CharacterUse, ...]:
    """Count characters found per row; the most frequent first."""
    counts: Counter[str] = Counter()
    places: defaultdict[str, list[str]] = defaultdict(list)
    for row, chars in enumerate(found):
        counts.update(chars)
        for char in dict.fromkeys(chars):
            if len(places[char]) < PLACES:
                places[char].append(view.table.where(row))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(CharacterUse(code_point(c), name_of(c), count, tuple(places[c])) for c, count in ordered)


def _overlap(first: View, second: View) -> Overlap:
    where: dict[tuple[str, ...], int] = {}
    for row, key in enumerate(first.normal):
        where.setdefault(key, row)
    exact = set(first.exact)
    hits = [(row, where[key]) for row, key in enumerate(second.normal) if key in where]
    places = tuple(f"{second.table.where(b)} = {first.table.where(a)}" for b, a in hits[:PLACES])
    return Overlap(first.name, second.name, sum(key in exact for key in second.exact), len(hits), len(second.table), places)


def _judge_overlaps(overlaps: Iterable[Overlap], warnings: list[str], errors: list[str]) -> None:
    for o in overlaps:
        line = (
            f"{o.normalised} of {o.rows} rows of {o.second} ({percent(o.share)}) also occur in {o.first} "
            f"({o.exact} exactly), e.g. {next(iter(o.places), None)}"
        )
        _judge(o.share, OVERLAP, line, warnings, errors)


def _judge_labels(splits: Sequence[SplitReport], warnings: list[str], errors: list[str]) -> None:
    train, *others = splits
    known = set(train.labels or ())
    for split in others:
        here = set(split.labels or ())
        unseen, absent = sorted(here - known), sorted(known - here)
        if unseen:
            hints = (f"{name!r} ({(split.labels or {})[name]}x){nearest(name, known)}" for name in unseen)
            also = f"; train has but {split.name} has not: {listing(map(repr, absent))}" if absent else ""
            errors.append(f"labels of {split.name} that train does not have: {listing(hints)}{also}")
        elif absent:
            warnings.append(f"labels of train that never occur in {split.name}: {listing(map(repr, absent))}")
    pairs = twins({name for split in splits for name in split.labels or ()})
    if pairs:
        shown = listing(" / ".join(map(repr, pair)) for pair in pairs)
        errors.append(f"labels that differ only in case, space or Unicode form: {shown}")
    if len(known) == 1:
        errors.append(f"train has one label only, {listing(map(repr, known))}: there is nothing to learn")
    if "" in known:
        errors.append(f"{(train.labels or {})['']} labels of train are empty")


def _judge_tags(view: View, text: str, label: str, warnings: list[str]) -> None:
    """For token data: as many tags as tokens, and tags that obey their scheme."""
    tags = view.table.column(label)
    if isinstance(tags[0], str):
        return
    tokens = view.table.column(text)
    for row, (a, b) in enumerate(zip(tokens, tags)):
        if isinstance(a, str) or len(a) != len(b):
            raise DataError(f"{view.table.where(row)}: {len(b)} tags for {'a text' if isinstance(a, str) else f'{len(a)} tokens'}")
    column = view.table.tokens(label)
    if detect_scheme(column) == "mixed":
        odd = irregularities(column)
        first = odd[0]
        warnings.append(
            f"{len(odd)} tags of {view.name} break IOB2 (and no other scheme fits), the first: token {first.token + 1} of "
            f"{view.table.where(first.row)}, {first.tag!r}: {first.why}"
        )


def _judge_split(split: SplitReport, max_length: int | None, warnings: list[str], errors: list[str]) -> None:
    name, rows = split.name, split.rows
    findings: list[tuple[bool, Callable[[], str]]] = [
        (split.skipped > 0, lambda: f"{split.skipped} malformed rows of {name} were skipped"),
        (split.empty > 0, lambda: f"{split.empty} rows of {name} have an empty text"),
        (
            split.near_duplicates / rows > DUPLICATES,
            lambda: f"{split.near_duplicates} of {rows} rows of {name} ({percent(split.near_duplicates / rows)}) repeat an earlier one",
        ),
        (
            split.contradictions > 0,
            lambda: f"{split.contradictions} texts of {name} have more than one label, e.g. {next(iter(split.contradiction_places), None)}",
        ),
    ]
    warnings.extend(line() for found, line in findings if found)
    if not split.pieces:
        return
    if split.pieces.truncated:
        warnings.append(
            f"{split.pieces.truncated} of {rows} rows of {name} ({percent(split.pieces.truncated / rows)}) are longer than "
            f"{max_length} pieces (the longest has {split.pieces.lengths.most}) and will be cut"
        )
    line = (
        f"{percent(split.pieces.unknown_share)} of the words of {name} have pieces the tokenizer does not know; it lacks "
        f"{listing(use.code_point for use in split.pieces.lacking) or 'no single character'}"
    )
    _judge(split.pieces.unknown_share, UNKNOWN_WORDS, line, warnings, errors)


def _judge(share: float, limits: tuple[float, float], line: str, warnings: list[str], errors: list[str]) -> None:
    warn, fail = limits
    if share > fail:
        errors.append(f"{line} (more than {percent(fail)})")
    elif share > warn:
        warnings.append(line)
