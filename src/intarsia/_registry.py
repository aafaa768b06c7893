"""Names for objects: one small registry per axis, open to third parties through entry points.

A package adds to the registry of kind `k` by an entry point in the group `intarsia.k`; it is imported only when a name
is asked for that is not known yet, or when all names are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from intarsia.errors import SpecError, listing, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """An ordered mapping from a public name to an object, with helpful errors.

    Args:
        kind: singular word used in messages and in the entry-point group, e.g. `"method"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._plugins_loaded = False

    def add(self, name: str, item: T) -> T:
        """Register `item` under `name`; a name can be taken once."""
        if name in self._items and self._items[name] is not item:
            raise SpecError(f"{self.kind} {name!r} is already registered as {self._items[name]!r}")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda item: self.add(name, item)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group=f"intarsia.{self.kind}"):
            if point.name not in self._items:
                self.add(point.name, point.load())

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            self._load_plugins()
        try:
            return self._items[name]
        except KeyError:
            raise SpecError(
                f"unknown {self.kind} {name!r}{nearest(name, self._items)} known: {listing(self._items, 40)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        if name not in self._items:
            self._load_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(self._items)

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._items)
