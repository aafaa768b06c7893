"""A `weight` site for every parameter of a model, named by role where its module has one."""

from __future__ import annotations

from dataclasses import replace

from transformers.pytorch_utils import Conv1D

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.address import Site
from intarsia.sites.anatomy import ROWLESS
from intarsia.sites.draft import Draft, Role
from intarsia.sites.structure import join, parent


def add_weights(draft: Draft, idle: str = "") -> None:
    """Add the weight sites to a draft that has all its activations and roles.

    Args:
        idle: path of a shared embedding that holds a tied weight but is never executed.

    Each Parameter object gets one site without a view.  Tied owners are named by the one whose role comes first, and
    `missing` says so for the others.  Parts of fused parameters get further sites, with a view.

    Raises:
        SiteError: two parameters would have the same name.
    """
    rank = {path: number for number, path in enumerate(draft.roles)}
    found = [_weight(draft, owned, rank, idle) for owned in structure.parameters(draft.model)]
    for _, site in sorted(found, key=lambda entry: entry[0]):
        if (other := draft.sites.get(site.name)) is not None:
            raise SiteError(
                f"{draft.name}: the parameters at {site.path!r} and {other.path!r} would both be called {site.name!r}; "
                "the anatomy gives one role to two modules"
            )
        draft.add(site)
        for word, view in draft.views.get(site.path, {}).items():
            draft.add(replace(site, name=join(parent(parent(site.name)), word, site.param or ""), view=view))
        for path, param in site.owners:
            alias = join(draft.roles[path].name, param) if path in draft.roles else site.name
            if alias != site.name:
                draft.missing[alias] = f"it is tied to {site.name!r}"


def _weight(draft: Draft, owned: structure.Owned, rank: dict[str, int], idle: str) -> tuple[int, Site]:
    """(place of its role in the model's order, weight site) of one Parameter."""
    last = len(rank)
    owners = sorted(owned.owners, key=lambda owner: rank.get(owner[0], last))
    path, param = owners[0]
    role = draft.roles.get(path) or _without_role(draft, path)
    if path == idle:  # it gives the name, but what is executed must come first
        owners = [*owners[1:], owners[0]]
    module = draft.need(path, "a parameter")
    site = Site(
        name=join(role.name, param),
        path=owners[0][0],
        port="weight",
        layer=role.layer,
        stack=role.stack,
        param=owners[0][1],
        shape=tuple(owned.parameter.shape),
        transposed=isinstance(module, Conv1D) and owned.parameter.dim() == 2,
        owners=tuple(owners),
        lend_at=role.lend_at,
        reused=any(other.reused and other.path == owners[0][0] for other in draft.sites.values()),
        rowless=role.lend_at is not None or any(role.name == r or role.name.endswith(f".{r}") for r in ROWLESS),
    )
    return rank.get(path, last), site


def _without_role(draft: Draft, path: str) -> Role:
    """`head.<path>` outside the base, `other.<path below the base>` inside; layer and stack of the block around."""
    if draft.prefix and path != draft.prefix and not path.startswith(draft.prefix + "."):
        return Role(join("head", path), None, "")
    name = join("other", path[len(draft.prefix) + 1 :] if draft.prefix else path)
    around = path
    while around:
        if around in draft.blocks:
            return Role(name, *draft.blocks[around])
        around = parent(around)
    stacks = {stack for _, stack in draft.blocks.values() if stack}
    first = name.split(".")[1] if "." in name else ""
    return Role(name, None, first if first in stacks else "")
