"""Where a module comes from: a file, or `store:REFERENCE` of the store (environment variable INTARSIA_STORE).

A reference is pinned to the hash of the file when the command is read, so that a stored configuration means the same bytes later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from intarsia.errors import StoreError

if TYPE_CHECKING:
    from intarsia.compose import Expr
    from intarsia.modules import Header, Module
    from intarsia.store.store import Store

PREFIX = "store:"


def pinned(files: Mapping[str, str], expression: str | Expr | None = None) -> dict[str, str]:
    """Files by name with every `store:REFERENCE` replaced by `store:SHA256`.

    Args:
        expression: the names in it that begin with `store:` are modules of the store, under that name.

    Raises:
        StoreError: the store has no such module.
    """
    from intarsia.compose import expr, names

    found = dict(files)
    if expression is not None:
        found |= {name: name for name in sorted(names(expr(expression))) if name.startswith(PREFIX) and name not in found}
    if not any(where.startswith(PREFIX) for where in found.values()):
        return found
    from intarsia.store.store import Store

    store = Store()
    return {name: PREFIX + store.resolve(where.removeprefix(PREFIX)) if where.startswith(PREFIX) else where for name, where in found.items()}


def header_of(where: str) -> Header:
    """What a module says of itself; its tensors are not read."""
    from intarsia.modules import read_header

    if not where.startswith(PREFIX):
        return read_header(where)
    from intarsia.store.store import Store

    return Store().header(where.removeprefix(PREFIX))


def read_modules(files: Mapping[str, str]) -> dict[str, Module]:
    """The modules of a command by name, every byte verified.

    A module of the store that was trained on top of another brings a warning where no module stands in for that one: of two
    language modules one may stand for the other.

    Raises:
        ModuleError, StoreError: a file is damaged or missing, or the store lacks what a module requires.
        CompositionError: two of them must not be used together.
    """
    from intarsia.modules import load
    from intarsia.store.lineage import check_together
    from intarsia.store.store import Store

    store = Store()
    found = {name: store.get(where.removeprefix(PREFIX)).rename(name) if where.startswith(PREFIX) else load(where, name=name) for name, where in files.items()}
    check_together(found)
    for name, module in found.items():
        if files[name].startswith(PREFIX):
            _check_required(store, name, module, found)
    return found


def _check_required(store: Store, name: str, module: Module, given: Mapping[str, Module]) -> None:
    from intarsia.cli.console import Console

    absent = [digest for digest in module.requires if digest not in {each.digest for each in given.values()}]
    if not absent:
        return
    here = store.by_digest()
    for digest in absent:
        if digest not in here:
            raise StoreError(
                f"store {store.path}: {name!r} requires the module with digest {digest[:12]}..., which is not in the store; "
                "add or pull it, or take the module out as a file: intarsia store export"
            )
        header = store.header(here[digest][0])
        if not any(header.roles and header.roles.keys() <= other.roles.keys() for key, other in given.items() if key != name):
            Console().warn(f"{name!r} was trained on top of {header.name!r} ({PREFIX}{here[digest][0][:12]}), which is not among the modules given")
