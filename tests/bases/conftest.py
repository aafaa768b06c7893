"""Fixtures: a cache of this test's own, a fake installed base, and real bases converted once per session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intarsia.bases import BASES, Base, load
from intarsia.bases.rows import EmbeddedBase
from tests.network import forbid

from . import fakes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is this test's alone."""
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[EmbeddedBase]:
    """A registered, installed fake base `tiny-e5`."""
    row = fakes.install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(BASES._items, row.name, row)
    yield row
    sys.modules.pop(row.module, None)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Base]]:
    """Loads a real embedded base from a cache made once per session, or skips with the reason."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(tmp_path_factory, "_basetemp") and "popen-" in root.name:  # one cache for all workers of xdist
        root = root.parent
    loaded: dict[str, Base] = {}

    def get(name: str) -> Base:
        if BASES[name].locate() is None:
            pytest.skip(f"the package {BASES[name].package!r} is not installed: {BASES[name].install}")
        if name not in loaded:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("INTARSIA_CACHE", str(root / "intarsia-cache"))
                loaded[name] = load(name)
        return loaded[name]

    yield get
    loaded.clear()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection or to look up a host fails the test."""
    forbid(monkeypatch)
