"""How specifications read in a table: where a patch sits, what form and op it has, in few words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from intarsia._codec import encode
from intarsia.methods import Method, Patch
from intarsia.methods.rows import NORMS

#: long site patterns that have a name
SHORT = {NORMS: "layer norms", "**": "every parameter", "**.bias": "biases", "#": "blocks"}


def where_text(patch: Patch) -> str:
    """The sites of a patch: pattern, port where it is not the output, layers."""
    where = SHORT.get(patch.at, patch.at)
    port = {"in": " (input)"}.get(patch.port, "")
    return f"{where}{port}{f' [{patch.layers}]' if patch.layers else ''}"


def spec_text(spec: Any, *, settings: bool = True) -> str:
    """A form, factor or op: its registered name, its settings that are not the defaults, and what it is made of.

    Args:
        settings: False for the names alone.
    """
    coded = encode(spec)
    parts = {f.name: _parts(getattr(spec, f.name)) for f in fields(spec)}
    inner = dict.fromkeys(spec_text(part, settings=settings) for name in sorted(parts) for part in parts[name])
    plain = ", ".join(f"{k}={_value(v)}" for k, v in coded.items() if k != "type" and not parts[k])
    shown = f"({plain})" if plain and settings else ""
    return f"{coded['type']}{shown}" + (f" of {' and '.join(inner)}" if inner else "")


def _parts(value: object) -> tuple[Any, ...]:
    """The specifications that a field holds: itself, or the members of a tuple."""
    members = value if isinstance(value, tuple) else (value,)
    return tuple(member for member in members if is_dataclass(member))


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def patch_rows(method: Method, *, settings: bool = True) -> Iterator[tuple[str, str, str]]:
    """(where, form, op) of every patch."""
    for patch in method.patches:
        yield where_text(patch), spec_text(patch.form, settings=settings), spec_text(patch.op, settings=settings)


def method_cells(method: Method) -> tuple[str, str, str]:
    """(where, form, op) of a whole method, by name; equal entries are shown once."""
    rows = list(patch_rows(method, settings=False))
    if not rows:
        return "logits", "head", "replace"
    return tuple("; ".join(dict.fromkeys(column)) for column in zip(*rows))  # type: ignore[return-value]


def settings_text(settings: Mapping[str, object]) -> str:
    """`rank=8, alpha=16`, as one would type it behind `--set`."""
    return ", ".join(f"{key}={_value(value)}" for key, value in settings.items())
