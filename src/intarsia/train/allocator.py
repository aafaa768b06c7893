"""`pages_kept`: glibc keeps the memory of a training step for the next one.

By default glibc asks the kernel for every large tensor and gives it back at once; each step then pays for mapping and zeroing
the same pages again.  In this block it keeps them, so the resident size stays at its peak.  `INTARSIA_KEEP_PAGES=0` switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters, see malloc.h."""
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 * 1024}
SWITCH = "INTARSIA_KEEP_PAGES"


@cache
def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    except (OSError, AttributeError):
        return None
    return library


@contextlib.contextmanager
def pages_kept(wanted: bool = True) -> Iterator[bool]:
    """Gives whether pages are kept in this block; afterwards glibc's defaults hold again and free memory goes back."""
    library = _glibc() if wanted and os.environ.get(SWITCH, "1") != "0" else None
    kept = library is not None and bool(library.mallopt(MMAP_MAX, 0)) and bool(library.mallopt(TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        if library is not None:
            for option, value in DEFAULTS.items():
                library.mallopt(option, value)
            library.malloc_trim(0)
