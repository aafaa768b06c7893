"""Every error a user can meet, and the helper that suggests the nearest known name.

An error says what failed, where, what was found and what to type next.  The command line prints it as one line and
exits with `exit_code`; a library user sees an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntarsiaError(Exception):
    """Base class of all errors raised on purpose.  `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(IntarsiaError):
    """An option, a configuration key or a combination of them is not legal."""

    exit_code = 2


class SpecError(UsageError):
    """A method, patch or other specification is malformed or names something unknown."""


class CompositionError(UsageError):
    """An expression over modules is malformed, unknown or not legal."""


class DataError(IntarsiaError):
    """Input data is malformed; the message names file, line and column."""

    exit_code = 3


class SiteError(IntarsiaError):
    """A place in the model was not found, or the model lacks the port a method needs."""

    exit_code = 4


class ModuleError(IntarsiaError):
    """A module file is damaged, does not belong to this base, or does not fit it."""

    exit_code = 4


class BaseError(IntarsiaError):
    """A base model cannot be found, built or verified."""

    exit_code = 4


class StoreError(IntarsiaError):
    """Reading or writing a file or a store failed."""

    exit_code = 5


class TrainingError(IntarsiaError):
    """Training cannot start, cannot resume or had to stop."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    hits = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {hits[0]!r}?" if hits else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Join names for a message, cutting long lists: `a, b, c, ... (12 in all)`."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown
