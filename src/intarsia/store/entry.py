"""What a store says of its modules: `Stored`, `Collected`, and `Label`, a name on its way between stores."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.modules import Header


@dataclass(frozen=True, slots=True)
class Stored:
    """A module in a store, without its tensors.

    Attributes:
        sha256: hash of the file.
        names: `name@version` and `name@tag` that point at it.
        header: what the file says of itself, None if it cannot be read.
        problem: why not, else "".
    """

    sha256: str
    names: tuple[str, ...]
    header: Header | None
    problem: str = ""

    @property
    def title(self) -> str:
        """Its first name, else the first digits of its sha256."""
        return self.names[0] if self.names else self.sha256[:12]


@dataclass(frozen=True, slots=True)
class Collected:
    """What `gc` removed.

    Attributes:
        removed: sha256 of the blobs removed.
        kept: number of blobs that stay.
        freed: bytes of the blobs removed.
    """

    removed: tuple[str, ...]
    kept: int
    freed: int


@dataclass(frozen=True, slots=True)
class Label:
    """A name of a module as it travels between stores.

    Attributes:
        name: the module's name.
        label: a version or a tag of it.
        sha256: hash of the file it points at.
    """

    name: str
    label: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}@{self.label}"
