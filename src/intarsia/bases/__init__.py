"""Bases: pretrained models from embedded packages, local folders and hub ids -> model, tokenizer and facts.

`load` and `trim_vocabulary` need torch and are imported when first asked for; `list_bases` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from intarsia.bases.catalogue import BaseInfo, list_bases
from intarsia.bases.rows import BASES, EmbeddedBase

if TYPE_CHECKING:
    from intarsia.bases.loading import Base, Head, load
    from intarsia.bases.trim import trim_vocabulary

__all__ = ["BASES", "Base", "BaseInfo", "EmbeddedBase", "Head", "list_bases", "load", "trim_vocabulary"]

_LATER = {
    "Base": "intarsia.bases.loading",
    "Head": "intarsia.bases.loading",
    "load": "intarsia.bases.loading",
    "trim_vocabulary": "intarsia.bases.trim",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
