"""Sources of text: plain text, Bibles by verse, the Universal Declaration of Human Rights, treebanks.  Each line keeps its origin.

| kind | files | one line is | its id |
|---|---|---|---|
| `text` | `.txt` | a line; blank lines are skipped and counted | line number |
| `bible` | `.tsv` (verse id, text), `.xml` of christos-c/bible-corpus (`<seg id type="verse">`) | a verse | `MAT.1.1` |
| `udhr` | `.html`, `.xml` | a paragraph | number of the paragraph |
| `treebank` | `.conllu` | a sentence: its `# text`, else its words | `sent_id`, else its number |

XML with a document type is refused: no entity is ever expanded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from intarsia._registry import Registry
from intarsia.data.source import Limits, Lines, read_lines
from intarsia.errors import DataError, UsageError, listing

LIMITS = Limits()
_VERSE = re.compile(r"(?:b\.)?([1-4]?[A-Z][A-Z0-9]{1,3})\.(\d+)\.(\d+[a-z]?)")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text.

    Attributes:
        text: as in the file.
        ident: what it is called in its source, see the table above.
        source: position of its source.
    """

    text: str
    ident: str
    source: int = 0

    @property
    def book(self) -> str:
        """The book of a verse (`MAT`); empty for everything else."""
        return book_of(self.ident)


def book_of(ident: str) -> str:
    """`MAT` of `MAT.1.1`; empty for what is no verse."""
    found = _VERSE.fullmatch(ident)
    return found.group(1) if found else ""


@dataclass(frozen=True, slots=True)
class Source:
    """One file.

    Attributes:
        path: where it lies.
        kind: see the table above.
        licence: of its text; `unknown` if nobody said.
        name: for the manifest and the card; the file's if nobody said.
    """

    path: str
    kind: str
    licence: str = "unknown"
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or Path(self.path).name


@dataclass(frozen=True, slots=True)
class Read:
    """What came out of a source.

    Attributes:
        source: the file.
        sha256: of its bytes.
        lines: its lines, in order.
        skipped: what was no line and why, with counts.
    """

    source: Source
    sha256: str
    lines: tuple[Line, ...]
    skipped: dict[str, int]


Reader = Callable[[Path], tuple[list[tuple[str, str]], dict[str, int]]]
KINDS: Registry[Reader] = Registry("kind of source")


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind that a file's name and first line suggest.

    Raises:
        UsageError: none.
    """
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix == ".txt":
        return "text"
    if suffix == ".conllu":
        return "treebank"
    if suffix in (".html", ".htm"):
        return "udhr"
    if suffix in (".tsv", ".xml"):
        try:
            with place.open("rb") as handle:
                start = handle.read(4096).decode("utf-8", "ignore")
        except OSError as error:
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from None
        if suffix == ".tsv" and _VERSE.match(start.lstrip("\ufeff")):
            return "bible"
        if suffix == ".xml":
            return "udhr" if "<udhr" in start else "bible"
    raise UsageError(f"{place}: the name does not say what this is; say it: {listing(f'--{kind} {place}' for kind in KINDS)}")


def load(source: Source, number: int = 0) -> Read:
    """Read a source.

    Raises:
        DataError: the file cannot be read, is malformed or holds no line.
        UsageError: unknown kind.
    """
    reader = KINDS[source.kind]
    path = Path(source.path)
    found, skipped = reader(path)
    if not found:
        raise DataError(f"{path}: no lines ({', '.join(f'{n} {why}' for why, n in skipped.items()) or 'the file holds none'})")
    with path.open("rb") as handle:
        digest = hashlib.sha256(handle.read()).hexdigest()
    seen: dict[str, int] = {}
    lines = []
    for ident, text in found:
        seen[ident] = seen.get(ident, 0) + 1
        lines.append(Line(text, ident if seen[ident] == 1 else f"{ident}#{seen[ident]}", number))
    return Read(source, digest, tuple(lines), skipped)


def _add(kind: str) -> Callable[[Reader], Reader]:
    def put(reader: Reader) -> Reader:
        KINDS.add(kind, reader)
        return reader

    return put


def _sound(lines: Lines) -> Iterator[tuple[int, str]]:
    for index, text in enumerate(lines.texts):
        bad = lines.problem(index)
        if bad is not None:
            raise DataError(bad.message(lines.name))
        yield index + 1, text


@_add("text")
def _text(path: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    lines = list(_sound(read_lines(path, "utf-8", LIMITS)))
    found = [(str(number), text) for number, text in lines if text.strip()]
    return found, _counts(blank=len(lines) - len(found))


@_add("bible")
def _bible(path: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    if path.suffix.lower() == ".xml":
        pairs = _segments(path)
    else:
        pairs = []
        for number, text in _sound(read_lines(path, "utf-8", LIMITS)):
            ident, tab, verse = text.partition("\t")
            if not tab:
                raise DataError(f"{path}:{number}: expected a verse id, a tab and the verse; found: {text[:60]!r}")
            pairs.append((ident, verse, f"{path}:{number}"))
    seen: set[str] = set()
    found = []
    for ident, verse, place in pairs:
        match = _VERSE.fullmatch(ident.strip())
        if match is None:
            raise DataError(f"{place}: {ident[:40]!r} is no verse id; expected BOOK.CHAPTER.VERSE such as 'b.MAT.1.1'")
        name = ".".join(match.groups())
        if name in seen:
            raise DataError(f"{place}: the verse {name} occurs twice")
        seen.add(name)
        if verse.strip():
            found.append((name, verse.strip()))
    return found, _counts(blank=len(pairs) - len(found))


def _segments(path: Path) -> list[tuple[str, str, str]]:
    root = _xml(path)
    found = []
    for segment in root.iter():
        if segment.tag.rpartition("}")[2] == "seg" and segment.get("type", "verse") == "verse" and segment.get("id"):
            found.append((str(segment.get("id")), " ".join("".join(segment.itertext()).split()), str(path)))
    return found


def _xml(path: Path) -> ElementTree.Element:
    text = "\n".join(read_lines(path, "utf-8", LIMITS).texts)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path}: XML with a document type or entities is not read; take the declaration out")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: malformed XML: {error}") from None


class _Paragraphs(HTMLParser):
    """Texts of paragraphs, list items and headings."""

    TAGS = ("p", "li", "h1", "h2", "h3", "h4")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.TAGS:
            self.end()
            self.open = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.TAGS:
            self.end()

    def handle_data(self, data: str) -> None:
        if self.open is not None:
            self.open.append(data)

    def end(self) -> None:
        if self.open is not None:
            text = " ".join("".join(self.open).split())
            if text:
                self.found.append(text)
            self.open = None


@_add("udhr")
def _udhr(path: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    if path.suffix.lower() == ".xml":
        root = _xml(path)
        texts = [" ".join("".join(e.itertext()).split()) for e in root.iter() if e.tag.rpartition("}")[2] in ("para", "title")]
    else:
        parser = _Paragraphs()
        parser.feed("\n".join(read_lines(path, "utf-8", LIMITS).texts))
        parser.end()
        texts = parser.found
    return [(str(i + 1), text) for i, text in enumerate(texts) if text], {}


@_add("treebank")
def _treebank(path: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    found: list[tuple[str, str]] = []
    block: list[str] = []
    for _, text in [*_sound(read_lines(path, "utf-8", LIMITS)), (0, "")]:
        if text.strip():
            block.append(text)
        elif block:
            found.append(_sentence(block, len(found) + 1))
            block = []
    return [(ident, text) for ident, text in found if text], _counts(blank=sum(not text for _, text in found))


def _sentence(block: Sequence[str], number: int) -> tuple[str, str]:
    """Id and text of a sentence of a treebank."""
    comments = dict(line[1:].strip().partition("=")[::2] for line in block if line.startswith("#") and "=" in line)
    named = {key.strip(): value.strip() for key, value in comments.items()}
    return named.get("sent_id") or str(number), named.get("text") or _joined(block)


def _joined(block: Sequence[str]) -> str:
    """The words of a sentence; those of a range (`3-4`) stand for their parts."""
    parts: list[str] = []
    covered = 0
    for line in block:
        fields = line.split("\t")
        if line.startswith("#") or len(fields) < 2 or "." in fields[0]:
            continue
        first, dash, last = fields[0].partition("-")
        if not first.isdecimal() or (not dash and int(first) <= covered):
            continue
        covered = int(last) if dash and last.isdecimal() else covered
        glued = len(fields) > 9 and "SpaceAfter=No" in fields[9].split("|")
        parts.append(fields[1] + ("" if glued else " "))
    return "".join(parts).strip()


def _counts(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
