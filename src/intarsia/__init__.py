"""intarsia: modular and parameter-efficient fine-tuning of transformers.

    base = intarsia.load_base("me5-small")
    host = intarsia.Host(base.model, tokenizer=base.tokenizer)
    host.add("topic", intarsia.lora(rank=8))
    with host.using("swh >> topic"): ...

This is the page of public names.  A name's room is imported when the name is first asked for, so `import intarsia` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.bases import Base, list_bases
    from intarsia.bases import load as load_base
    from intarsia.compose import Expr, Mix, Ref, Seq, average, expr
    from intarsia.data import Table, check, read
    from intarsia.errors import IntarsiaError
    from intarsia.host import Host
    from intarsia.methods import METHODS, Method, Patch, Policy
    from intarsia.methods import build as method
    from intarsia.methods.rows import (
        bitfit,
        freeze_k,
        full,
        head,
        houlsby,
        ia3,
        ln,
        lora,
        parallel,
        pfeiffer,
        prefix,
        prompt,
    )
    from intarsia.modules import Card, Module, load, save
    from intarsia.patches import Head
    from intarsia.sites import Site, SiteMap, fingerprint, resolve
    from intarsia.train import Recipe

#: public name -> (module, name there)
_NAMES = {
    **{name: ("intarsia.methods", name) for name in (
        "METHODS", "Method", "Patch", "Policy", "bitfit", "freeze_k", "full", "head", "houlsby", "ia3", "ln", "lora", "parallel",
        "pfeiffer", "prefix", "prompt",
    )},
    **{name: ("intarsia.compose", name) for name in ("Expr", "Mix", "Ref", "Seq", "average", "expr")},
    **{name: ("intarsia.data", name) for name in ("Table", "check", "read")},
    **{name: ("intarsia.modules", name) for name in ("Card", "Module", "load", "save")},
    **{name: ("intarsia.sites", name) for name in ("Site", "SiteMap", "fingerprint", "resolve")},
    **{name: ("intarsia.bases", name) for name in ("Base", "list_bases")},
    "Head": ("intarsia.patches", "Head"),
    "Host": ("intarsia.host", "Host"),
    "Recipe": ("intarsia.train", "Recipe"),
    "IntarsiaError": ("intarsia.errors", "IntarsiaError"),
    "load_base": ("intarsia.bases", "load"),
    "method": ("intarsia.methods", "build"),
}  # fmt: skip

__all__ = [
    "METHODS",
    "Base",
    "Card",
    "Expr",
    "Head",
    "Host",
    "IntarsiaError",
    "Method",
    "Mix",
    "Module",
    "Patch",
    "Policy",
    "Recipe",
    "Ref",
    "Seq",
    "Site",
    "SiteMap",
    "Table",
    "average",
    "bitfit",
    "check",
    "expr",
    "fingerprint",
    "freeze_k",
    "full",
    "head",
    "houlsby",
    "ia3",
    "list_bases",
    "ln",
    "load",
    "load_base",
    "lora",
    "method",
    "parallel",
    "pfeiffer",
    "prefix",
    "prompt",
    "read",
    "resolve",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("intarsia")
    if name not in _NAMES:
        from intarsia.errors import nearest

        raise AttributeError(f"module 'intarsia' has no name {name!r}{nearest(name, _NAMES)}")
    module, there = _NAMES[name]
    value = getattr(import_module(module), there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, "__version__"})
