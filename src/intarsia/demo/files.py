"""Where the demo's bundled data lie.  Their source and licence: `data/LICENSE-DATA.md`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath

from intarsia.errors import DataError, listing


def data_path(name: str = "") -> Path:
    """Path of a bundled file or folder, e.g. `eng_Latn/train.tsv`; the data folder itself without a name.

    Raises:
        DataError: there is no such file, or the package was not unpacked when it was installed.
    """
    root = files("intarsia.demo") / "data"
    if not isinstance(root, Path):
        raise DataError("the demo's data are inside an archive; install intarsia as an ordinary package")
    parts = PurePosixPath(name)
    found = root / parts
    if parts.is_absolute() or ".." in parts.parts or not found.exists():
        known = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tsv"))
        raise DataError(f"the demo has no data {name!r}; it has: {listing(known, 40)}")
    return found
