"""Names of modules: what a name may be, and when an expression must quote it.

A name is for people and expressions.  It is never used as a path and is not part of a module's identity.
"""

from __future__ import annotations

import re
import unicodedata

from intarsia.errors import SpecError

MAX_NAME = 200
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:/-]*")


def check_name(name: str) -> str:
    """Return the name in Unicode normal form C, or refuse it.

    Any script is allowed.  Refused are: the empty name, more than 200 characters, control and invisible characters (zero
    width, bidirectional marks, line ends, NUL), lone surrogates, white space or a slash at an end, a backslash, a double
    quote, and the path words `.` and `..`.

    Raises:
        SpecError: with the reason and, for a character, its code point and position.
    """
    if not isinstance(name, str):
        raise SpecError(f"a module name is a string, found {type(name).__name__}")
    shown = ascii(name[:60])
    if not name:
        raise SpecError("a module name is empty")
    if len(name) > MAX_NAME:
        raise SpecError(f"module name {shown}... has {len(name)} characters; at most {MAX_NAME} are allowed")
    name = unicodedata.normalize("NFC", name)
    for position, char in enumerate(name):
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or char in '\\"':
            what = "a character that cannot be seen" if char not in '\\"' else "a backslash or double quote"
            raise SpecError(f"module name {shown} contains {what}: U+{ord(char):04X} at position {position}")
    if name != name.strip() or name.startswith("/") or name.endswith("/"):
        raise SpecError(f"module name {shown} begins or ends with white space or a slash")
    if any(word in ("", ".", "..") for word in name.split("/")):
        raise SpecError(f"module name {shown} looks like a path: '.', '..' and '//' are not allowed")
    return name


def quoted(name: str) -> str:
    """The name as it stands in an expression: plain if it is of `[A-Za-z0-9_.@:/-]`, else in double quotes."""
    return name if _PLAIN.fullmatch(name) else f'"{name}"'
