from __future__ import annotations

import random
from pathlib import Path

import pytest

from intarsia.bases import Base, load
from intarsia.languages.corpus.build import Corpus, Plan, build
from intarsia.languages.corpus.duplicates import Duplicates
from intarsia.languages.corpus.filters import Normalise
from intarsia.languages.corpus.sources import Source
from tests.cli.bases import make_base
from tests.cli.run import Here

SYLLABLES = ("ka", "to", "mi", "lu", "ne", "sha", "ro", "bi", "wen", "dol")
BOOKS = {"MAT": 60, "ROM": 40, "TIT": 6, "JUD": 5, "REV": 30}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Here:
    return Here(capfd)


def verses(seed: int, syllables: tuple[str, ...] = SYLLABLES) -> dict[str, str]:
    """A toy New Testament: verse id -> text, words made of syllables."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(80)]
    return {
        f"{book}.{1 + n // 10}.{1 + n % 10}": " ".join(draw.choices(lexicon, k=draw.randint(6, 12))) + "."
        for book, count in BOOKS.items()
        for n in range(count)
    }


def write_bible(path: Path, found: dict[str, str]) -> Path:
    path.write_text("".join(f"b.{ident}\t{text}\n" for ident, text in found.items()), "utf-8")
    return path


@pytest.fixture(scope="session")
def bibles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same verses in two toy languages."""
    folder = tmp_path_factory.mktemp("bibles")
    return write_bible(folder / "new.tsv", verses(0)), write_bible(folder / "known.tsv", verses(1, ("an", "the", "of", "in", "er", "st", "ou", "al")))


@pytest.fixture(scope="session")
def corpus(bibles: tuple[Path, Path]) -> Corpus:
    new, known = bibles
    sources = (Source(str(new), "bible", "CC0-1.0"),)
    return build(Plan("kab", sources, (Normalise(), Duplicates()), parallel=Source(str(known), "bible", "CC0-1.0"), parallel_language="en"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def base(folder: Path) -> Base:
    """With its masked-LM head."""
    return load(folder)


@pytest.fixture(scope="session")
def bare(folder: Path) -> Base:
    """Without a head."""
    return load(folder, head="none")
