"""Where reference data and fixtures lie beside the repository; tests that need them skip without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("INTARSIA_SHARED", Path(__file__).parents[2] / "shared"))


def shared(path: str) -> Path:
    """Path of a reference file or folder, or skip the test with the reason."""
    found = ROOT / path
    if not found.exists():
        pytest.skip(f"reference material {path!r} is not beside the repository (set INTARSIA_SHARED)")
    return found
