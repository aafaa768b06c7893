"""YAML for configuration files, read strictly: a small part of YAML 1.2's core schema, so that text stays text.

    no, yes, on, off, 007, 0o17, 0x1F, 12:30, 2026-01-01, .inf     strings
    true, false        booleans        null, ~, empty     null
    12, -3             integers        1e-4, 1.5, .5      floats

Refused, with line and column: a key that stands twice, tags (`!!python/...`), merge keys, keys that are not scalars,
aliases to themselves, and files whose aliases expand beyond a limit.  PyYAML parses the text; nothing is constructed by it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from intarsia.errors import UsageError

MAX_BYTES = 200_000
MAX_VALUES = 20_000
MAX_DEPTH = 30

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain (unquoted) scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def loads(text: str, name: str = "configuration") -> Any:
    """The value of a YAML document.

    Args:
        name: of the file, for messages.

    Raises:
        UsageError: with line and column.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{name}: {len(text):,} characters; a configuration has at most {MAX_BYTES:,}")
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken):
                raise UsageError(f"{_at(name, token.start_mark)}: tags are not allowed; quote a string, write a value plainly")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise UsageError(f"{_at(name, error.problem_mark)}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: {error}") from None
    except RecursionError:
        raise UsageError(f"{name}: nested too deeply") from None
    return None if node is None else _Reader(name).read(node, 0)


def _at(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"


class _Reader:
    """One pass over the composed nodes; an alias is read again at each place, and counts each time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def fail(self, node: Any, problem: str) -> UsageError:
        return UsageError(f"{_at(self.name, node.start_mark)}: {problem}")

    def read(self, node: Any, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise self.fail(node, f"more than {MAX_VALUES:,} values; aliases count at every place they stand")
        if depth > MAX_DEPTH:  # also where an anchor contains itself
            raise self.fail(node, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.ScalarNode):
            return scalar(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, depth + 1) for item in node.value]
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key is a single word or quoted string")
            if key.value == "<<" and key.style is None:
                raise self.fail(key, "merge keys (<<) are not allowed; write the values out")
            if key.value in found:
                raise self.fail(key, f"the key {key.value!r} stands twice")
            found[key.value] = self.read(value, depth + 1)
        return found
