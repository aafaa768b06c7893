"""The list of embedded bases for the command line: what there is, what is here, what to type.  Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intarsia.bases.cache import entries, entry_path
from intarsia.bases.rows import BASES, EmbeddedBase


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """One embedded base, as it stands on this machine.

    Attributes:
        installed: version of the installed package, None if it is not installed.
        cached: folder of the converted copy, None if there is none (or none is needed).
        usable: whether `load(name)` works now, without network.
        size: size of the download and of the converted copy.
        type_next: the command that leads on.
    """

    name: str
    installed: str | None
    cached: Path | None
    usable: bool
    licence: str
    size: str
    languages: str
    architecture: str
    parameters: int
    notes: tuple[str, ...]
    type_next: str


def cached_copy(row: EmbeddedBase) -> Path | None:
    """The converted copy to use: of the installed version, or the newest there is if the package is absent."""
    if not row.converter:
        return None
    if row.locate() is not None:
        entry = entry_path(row.name, row.installed_version() or "0", row.converter_version)
        return entry if entry.is_dir() else None
    found = entries(row.name, row.converter_version)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _info(row: EmbeddedBase) -> BaseInfo:
    here = row.locate() is not None
    cached = cached_copy(row)
    if here or cached:
        command = f"intarsia inspect {row.name}"
    elif row.runs_here:
        command = row.install
    else:
        command = f"intarsia inspect {row.hub_id} --allow-network"
    copy = f", {row.cache_mb} MB converted" if row.converter else ""
    return BaseInfo(
        name=row.name,
        installed=(row.installed_version() or "unknown version") if here else None,
        cached=cached,
        usable=here or cached is not None,
        licence=row.licence,
        size=f"{row.download_mb} MB package{copy}",
        languages=row.languages,
        architecture=row.architecture,
        parameters=row.parameters,
        notes=row.notes,
        type_next=command,
    )


def list_bases() -> list[BaseInfo]:
    """All embedded bases, in the order of their registration."""
    return [_info(row) for row in BASES.values()]
