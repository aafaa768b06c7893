"""What modules of a store are to one another: made from (`parents`), trained on top of (`requires`), not together (`conflicts`).

All of it is in the headers of the files: cards name parents and conflicts, modules what they require, each by digest.  Data
hashes and seeds are those of the card.

What is not here: languages (`families.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import CompositionError
from intarsia.modules import Header
from intarsia.store.entry import Stored
from intarsia.store.finding import method_name
from intarsia.store.store import Store


@dataclass(frozen=True, slots=True)
class Kin:
    """A module that another one names.

    Attributes:
        digest: the digest it is named by.
        sha256: hash of a file with that digest in the store, None if there is none.
        names: its names in the store.
        title: what it is called where it is named, or in its file; "" if unknown.
    """

    digest: str
    sha256: str | None
    names: tuple[str, ...]
    title: str

    def __str__(self) -> str:
        if self.sha256 is None:
            return f"{self.title or 'a module'} (digest {self.digest[:12]}..., not in this store)"
        return self.names[0] if self.names else f"{self.title} ({self.sha256[:12]}, no name)"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a drawn tree.

    Attributes:
        depth: 0 for a root.
        relation: "", "made from" or "requires".
        kin: the module.
        header: what it says of itself, None if it is not in the store.
        seen: it was drawn above with all below it.
    """

    depth: int
    relation: str
    kin: Kin
    header: Header | None
    seen: bool


class Lineage:
    """The relations in a store at one moment; of every file the header is read.

    Attributes:
        problems: why files could not be read; what their modules name is unknown.
    """

    def __init__(self, store: Store) -> None:
        self.problems: list[str] = []
        self._of: dict[str, tuple[Stored, Header]] = {}
        for entry in store.entries():
            if entry.header is None:
                self.problems.append(entry.problem)
            elif (held := self._of.get(entry.header.digest)) is None or (entry.names and not held[0].names):
                self._of[entry.header.digest] = (entry, entry.header)

    def kin(self, digest: str, title: str = "") -> Kin:
        """What the store knows of a digest."""
        if digest not in self._of:
            return Kin(digest, None, (), title)
        entry, header = self._of[digest]
        return Kin(digest, entry.sha256, entry.names, title or header.name)

    def parents(self, header: Header) -> list[Kin]:
        """What a module was made from, by its card."""
        return [self.kin(digest, name) for name, digest in header.card.named_parents()]

    def requires(self, header: Header) -> list[Kin]:
        """What a module was trained on top of."""
        return [self.kin(digest) for digest in header.requires]

    def conflicts(self, header: Header) -> list[Kin]:
        """What a module must not be used together with: its own card says so, or that of the other."""
        other = [digest for digest, (_, held) in self._of.items() if header.digest in held.card.conflicts]
        return [self.kin(digest) for digest in dict.fromkeys((*header.card.conflicts, *other))]

    def children(self, digest: str) -> list[Kin]:
        """What was made from a module, or trained on top of it."""
        return [self.kin(other) for other, (_, header) in self._of.items() if digest in _named(header)]

    def lines(self, digest: str | None = None) -> Iterator[Line]:
        """The tree below one module, or below all from which nothing was made; a module drawn before is not drawn out again.

        Cards can be written by anybody, so that the relation may go round in a circle: the walk ends at a module it is at.
        """
        roots = [digest] if digest is not None else self._roots()
        drawn: set[str] = set()
        waiting: list[tuple[int, str, Kin]] = [(0, "", self.kin(root)) for root in reversed(roots)]
        while waiting:
            depth, relation, kin = waiting.pop()
            header = self._of[kin.digest][1] if kin.digest in self._of else None
            seen = kin.digest in drawn
            yield Line(depth, relation, kin, header, seen)
            if header is None or seen:
                continue
            drawn.add(kin.digest)
            below = [("made from", parent) for parent in self.parents(header)] + [("requires", needed) for needed in self.requires(header)]
            waiting += [(depth + 1, what, each) for what, each in reversed(below)]

    def _roots(self) -> list[str]:
        """Digests of modules that no other one names; of a circle, which has none, the first one."""
        named = {digest for _, header in self._of.values() for digest in _named(header)}
        order = sorted(self._of, key=lambda d: (self._of[d][0].names or ("~",), d))
        roots = [digest for digest in order if digest not in named]
        reached = set(roots)
        while True:
            reached = self._reach(reached)
            rest = [digest for digest in order if digest not in reached]
            if not rest:
                return roots
            roots.append(rest[0])
            reached.add(rest[0])

    def _reach(self, start: set[str]) -> set[str]:
        reached: set[str] = set()
        waiting = list(start)
        while waiting:
            digest = waiting.pop()
            if digest not in reached and digest in self._of:
                reached.add(digest)
                waiting += _named(self._of[digest][1])
        return reached


def _named(header: Header) -> tuple[str, ...]:
    """Digests of what a module was made from and trained on top of."""
    return (*header.card.parents, *header.requires)


def origin(header: Header) -> dict[str, Any]:
    """How a module came about, from its card: operation or method, seeds, data with their hashes."""
    card = header.card
    recipe = card.recipe
    seeds = [value for key, value in recipe.items() if key in ("seed", "seeds", "method_seed")]
    return {
        "operation": recipe.get("operation"),
        "method": method_name(header),
        "seeds": [seed for value in seeds for seed in (value if isinstance(value, Sequence) and not isinstance(value, str) else (value,))],
        "data": [{"name": source.name, "sha256": source.sha256} for source in card.data],
        "recipe": {key: value for key, value in recipe.items() if key != "operation"},
    }


def check_together(modules: Mapping[str, Any]) -> None:
    """Refuse modules that must not be used together; what was made from a module counts as that module.

    Args:
        modules: modules or their headers by the names they are used under.

    Raises:
        CompositionError: names both.
    """
    for (name, each), (other, held) in itertools.permutations(modules.items(), 2):
        if not set(each.card.conflicts).isdisjoint((*held.card.parents, held.digest)):
            raise CompositionError(f"{name!r} must not be used together with {other!r}: its card names it among its conflicts; leave one of them out")
