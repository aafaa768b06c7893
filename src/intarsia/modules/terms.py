"""A module as terms of a sum, and a sum of terms as a module: what `arithmetic.py` and `merging.py` calculate with.

A term is what one patch does at one site, seen as `scale * F` with a factor F whose tensor enters linearly: a change of a
layer's weight (`Affine`, `Matrix` under `Add`), of its bias or output (`Const` under `Add`), or the relative change of its
rows or columns (`Mul`, `Gain`; a multiplier v stands for the relative change v - 1).  Nothing is multiplied out: low-rank
products are laid side by side (rank r1 + r2), dense tensors are added, chosen entries and columns stay the entries and
columns that any of them has, and any other factors become a `Sum`.  Each factor has one leaf in which it is linear, and
weights go there.

What is not a sum of changes of weights has no terms and is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.modules.module import Module
from intarsia.patches import (
    Add,
    Affine,
    Blocks,
    Circulant,
    Columns,
    Concat,
    Const,
    Core,
    Dense,
    Diag,
    FactorSpec,
    Fourier,
    Gain,
    Hadamard,
    HardConcrete,
    KeptMask,
    Kron,
    KronPair,
    LowRank,
    Matrix,
    Mul,
    Pattern,
    Principal,
    Renorm,
    Rot,
    Seeded,
    Sketch,
    Sparse,
    Sum,
    Ticket,
    TopMask,
)

Form = Literal["affine", "matrix", "const"]
_LEAF: Mapping[type, str] = {Dense: "value", LowRank: "up", Sketch: "up", Diag: "value", Fourier: "value", Circulant: "kernel",
                             KronPair: "up", Pattern: "value", Sparse: "values", Columns: "values"}  # fmt: skip
_SAME_BASIS = (Dense, Fourier, Circulant, Diag, Sketch)
"""Factors that are linear in all they store: equal specifications add tensor by tensor."""
_NOT_PLAIN = (Principal, HardConcrete)
"""Factors that `extract(..., flatten=True)` turns into others."""
_ADVICE = "use an expression instead, e.g. '0.5*a + 0.5*b'"


@dataclass(frozen=True, slots=True)
class Term:
    """scale * F at a site.

    Attributes:
        site: name of the site.
        patch: the patch it comes from (its name, pattern, layers, port, tag).
        form: what the factor stands for.
        relative: the change is a share of what is there (`Mul`, `Gain`) instead of an addition.
        factor: specification of F.
        tensors: F's tensors by leaf.
    """

    site: str
    patch: Patch
    form: Form
    relative: bool
    factor: FactorSpec
    scale: float
    tensors: Mapping[str, Tensor]


def terms(module: Module, *, alone: bool = False) -> list[Term]:
    """All terms of a module, without its head.

    Args:
        alone: they will be scaled only, not put together with others', so that factors may keep what they share.

    Raises:
        ModuleError: the module is not additive, or it is in a form whose tensors all sites share; says what to do instead.
    """
    by_name = {patch.name: patch for patch in module.method.patches}
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in module.tensors.items():
        site, _, rest = key.partition("/")
        if site == "tied":
            raise ModuleError(
                f"{module.name!r} ({module.method.name}): the tensor {key!r} is shared by all sites, so that no site has a change of its own "
                f"to calculate with; {_ADVICE}"
            )
        name, _, leaf = rest.partition(".")
        if name not in by_name:
            raise ModuleError(f"{module.name!r}: tensor {key!r} belongs to no patch of its method; patches are {', '.join(by_name)}")
        grouped.setdefault((site, name), {})[leaf] = tensor
    return [_term(module, site, by_name[name], found, alone) for (site, name), found in grouped.items() if by_name[name].port != "logits"]


def _term(module: Module, site: str, patch: Patch, tensors: Mapping[str, Tensor], alone: bool) -> Term:
    reason = _why_not(patch, alone)
    if reason:
        raise ModuleError(f"{module.name!r} ({module.method.name}), patch {patch.name!r} at {site}: {reason}; {_ADVICE}")
    scale = patch.op.scale if isinstance(patch.op, Add | Gain) else 1.0
    if isinstance(patch.form, Const):
        term = Term(site, patch, "const", False, Dense(), scale, tensors)
    else:
        assert isinstance(patch.form, Affine | Matrix)
        inner = {leaf.removeprefix("factor."): tensor for leaf, tensor in tensors.items()}
        term = Term(site, patch, "affine" if isinstance(patch.form, Affine) else "matrix", False, patch.form.factor, scale, inner)
    if isinstance(patch.op, Mul):
        term = replace(term, tensors={"value": term.tensors["value"].float() - 1.0})
    return replace(term, relative=isinstance(patch.op, Mul | Gain))


def _why_not(patch: Patch, alone: bool) -> str | None:
    """Why a patch is not a sum of changes, None if it is."""
    form, op = patch.form, patch.op
    if isinstance(op, Concat):
        return "tokens in front of the sequence or of a memory are no change of a weight, and half of one is no half change"
    if isinstance(form, Renorm):
        return "its row norms depend on the base's weight, so that changes do not add up"
    if isinstance(form, Ticket):
        return "it takes entries of the base away and moves those that stay, which is no change of its own"
    if isinstance(op, Rot):
        return "it turns the weight, and rotations multiply instead of adding"
    if isinstance(form, Const):
        return "its vector is generated from others" if form.factor is not None else None
    if isinstance(form, Affine | Matrix):
        if isinstance(form, Affine) and form.read != "input":
            return "it maps the layer's output, so that what it changes depends on the modules before it"
        if isinstance(form.factor, TopMask | KeptMask):
            return "it says which weights count, and a mask has no sum with other changes"
        if isinstance(op, Mul) and not isinstance(form.factor, Dense):
            return f"a multiplier given by {type(form.factor).__name__} has no relative change of the same kind"
        return None if alone and isinstance(form.factor, Core) else why_not_linear(form.factor)
    return f"a {type(form).__name__} is a function of what it reads and no change of a weight"


def why_not_linear(factor: FactorSpec) -> str | None:
    """Why a factor cannot be part of a sum away from its module, None if it can."""
    if isinstance(factor, Core):
        if isinstance(factor.frame, Seeded):
            return "its frozen sides follow from all the sites of its module"
        return why_not_linear(factor.core)
    if isinstance(factor, Kron):
        return "its left matrices are shared" if factor.share else None
    if isinstance(factor, Blocks):
        return why_not_linear(factor.factor)
    if isinstance(factor, Hadamard | Sum):
        return next((reason for part in factor.parts if (reason := why_not_linear(part))), None)
    if type(factor) in _LEAF:
        return None
    what = type(factor).__name__.lower()
    if isinstance(factor, _NOT_PLAIN):
        return f"a {what!r} factor is not plain yet; take the module with host.extract(name, flatten=True)"
    return f"a {what!r} factor has no tensor that enters linearly"


def weighted(factor: FactorSpec, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Tensors of `weight * F`: the leaf in which F is linear, times the weight; at least in single precision."""
    if weight == 1.0:
        return dict(tensors)
    out = dict(tensors)
    for leaf in _linear_leaves(factor):
        out[leaf] = _wide(tensors[leaf]) * weight
    return out


def _linear_leaves(factor: FactorSpec) -> list[str]:
    if isinstance(factor, Core):
        return ["gain"] if factor.gain is not None else [f"core.{leaf}" for leaf in _linear_leaves(factor.core)]
    if isinstance(factor, Kron):
        return ["up"]
    if isinstance(factor, Blocks):
        return [f"parts.{i}.{leaf}" for i in range(factor.rows * factor.columns) for leaf in _linear_leaves(factor.factor)]
    if isinstance(factor, Hadamard):
        return [f"parts.0.{leaf}" for leaf in _linear_leaves(factor.parts[0])]
    if isinstance(factor, Sum):
        return [f"parts.{i}.{leaf}" for i, part in enumerate(factor.parts) for leaf in _linear_leaves(part)]
    return [_LEAF[type(factor)]]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def total(parts: Sequence[tuple[float, FactorSpec, Mapping[str, Tensor]]]) -> tuple[FactorSpec, dict[str, Tensor]]:
    """sum of weight * F as one factor: low-rank ones side by side, equal bases added, entries united, the rest as a `Sum`."""
    found: list[tuple[FactorSpec, dict[str, Tensor]]] = []
    for weight, factor, tensors in parts:
        now = weighted(factor, tensors, weight)
        for i, (other, held) in enumerate(found):
            both = _together(other, held, factor, now)
            if both is not None:
                found[i] = both
                break
        else:
            found.append((factor, now))
    dense = next((held for f, held in found if isinstance(f, Dense)), None)
    if dense is not None:  # beside a whole tensor a product or some entries of it save nothing
        value, rest = _wide(dense["value"]), []
        for factor, held in found:
            if isinstance(factor, LowRank):
                value = value + _wide(held["up"]) @ _wide(held["down"])
            elif isinstance(factor, Sparse | Columns):
                value = value + scattered(factor, held, tuple(value.shape))
            elif not isinstance(factor, Dense):
                rest.append((factor, held))
        found = [(Dense(), {"value": value}), *rest] if len(found) > 1 else found
    if len(found) == 1:
        return found[0]
    return Sum(tuple(f for f, _ in found)), {f"parts.{i}.{leaf}": t for i, (_, ts) in enumerate(found) for leaf, t in ts.items()}


def _together(
    one: FactorSpec, first: Mapping[str, Tensor], other: FactorSpec, second: Mapping[str, Tensor]
) -> tuple[FactorSpec, dict[str, Tensor]] | None:
    """Two factors as one of the same kind, None where there is none."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        up, down = (torch.cat([_wide(first[leaf]), _wide(second[leaf])], axis) for leaf, axis in (("up", 1), ("down", 0)))
        return LowRank(up.shape[1], one.down_init), {"up": up, "down": down}
    if one == other and isinstance(one, _SAME_BASIS):
        return one, {leaf: _wide(tensor) + _wide(second[leaf]) for leaf, tensor in first.items()}
    if kind_of(one) is not None and kind_of(one) == kind_of(other):
        index = united([first, second])
        values = sum(on_entries(one, held, index) for held in (first, second))
        assert isinstance(values, Tensor)
        return (Sparse() if isinstance(one, Sparse) else one), {"index": index, "values": values}
    return None


def kind_of(factor: FactorSpec) -> tuple[type, bool] | None:
    """What entries a factor holds (single ones, columns or rows), None if it holds whole tensors."""
    if isinstance(factor, Sparse | Columns):
        return type(factor), isinstance(factor, Columns) and factor.rows
    return None


def united(held: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The entries that any of some factors of one kind holds, rising."""
    index = torch.cat([tensors["index"].long() for tensors in held]).unique()
    wide = any(tensors["index"].dtype == torch.int64 for tensors in held)
    return index if wide else index.to(torch.int32)


def on_entries(factor: FactorSpec, tensors: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """A factor's values on more entries than it holds, zero on the others; single precision or better."""
    axis = 1 if isinstance(factor, Columns) and not factor.rows else 0
    values = _wide(tensors["values"])
    shape = (*values.shape[:axis], len(index), *values.shape[axis + 1 :])
    places = torch.searchsorted(index.long(), tensors["index"].long())
    return values.new_zeros(shape).index_copy(axis, places, values)


def scattered(factor: FactorSpec, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The whole tensor of a factor that holds some entries of it."""
    if isinstance(factor, Columns):
        return on_entries(factor, tensors, torch.arange(shape[0 if factor.rows else 1]))
    values = _wide(tensors["values"])
    return values.new_zeros(shape).view(-1).index_copy(0, tensors["index"].long(), values).view(shape)


def layer_of(site: str) -> str:
    """The layer whose map a site changes: `0.ffn.act` and `0.ffn.down.weight` are both about `0.ffn.down`."""
    words = site.split(".")
    words = words[:-1] if words[-1] in ("weight", "bias") else words
    return ".".join([*words[:-1], {"act": "down", "heads": "o"}.get(words[-1], words[-1])])


def patches_from(found: Sequence[tuple[Term, Sequence[Term]]]) -> tuple[tuple[Patch, ...], dict[str, Tensor]]:
    """Patches and tensors for one resulting term per place.

    Args:
        found: per site and kind, the resulting term and the terms it was made of.  Sites with equal patches are put
            together; they keep the pattern they came from where that covers exactly them, and are named one by one otherwise.
    """
    groups: dict[tuple[Any, ...], list[tuple[Term, Sequence[Term]]]] = {}
    for term, sources in found:
        key = (term.form, term.patch.port, term.relative, repr(term.factor), term.scale, term.patch.tag, term.patch.name)
        groups.setdefault(key, []).append((term, sources))
    patches: list[Patch] = []
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    sites_of: dict[int, set[str]] = {}
    for _, sources in found:
        for source in sources:
            sites_of.setdefault(id(source.patch), set()).add(source.site)
    for members in groups.values():
        first = members[0][0]
        name = first.patch.name
        while name in taken:
            stem, _, number = name.rpartition("_")
            name = f"{stem}_{int(number) + 1}" if number.isdecimal() and stem else f"{name}_2"
        taken.add(name)
        here = {term.site for term, _ in members}
        origins = {id(s.patch): s.patch for _, sources in members for s in sources}
        wheres = {(p.at, p.layers, p.optional) for p in origins.values()}
        if len(wheres) == 1 and all(sites_of[i] == here for i in origins):
            at, layers, optional = next(iter(wheres))
        else:
            at, layers, optional = spelled(here), None, False
        op = Gain(first.scale) if first.relative else Add(first.scale)
        patches.append(Patch(name, at, _form(first), op, first.patch.port, layers, first.patch.tag, optional))
        for term, _ in members:
            lead = f"{term.site}/{name}." + ("" if term.form == "const" else "factor.")
            tensors |= {lead + leaf: tensor for leaf, tensor in term.tensors.items()}
    return tuple(patches), tensors


def _form(term: Term) -> Any:
    if term.form == "const":
        return Const("zeros")
    if term.form == "affine":
        return Affine(term.factor, getattr(term.patch.form, "dropout", 0.0))
    return Matrix(term.factor)


def spelled(sites: set[str]) -> str:
    """A pattern that names exactly these sites; layers with the same tail share a brace."""
    tails: dict[tuple[str, str], list[int]] = {}
    rest: list[str] = []
    for site in sorted(sites):
        words = site.split(".")
        number = next((i for i, w in enumerate(words) if w.isdecimal()), None)
        if number is None or number == len(words) - 1:
            rest.append(site)
        else:
            tails.setdefault((".".join(words[:number]), ".".join(words[number + 1 :])), []).append(int(words[number]))
    for (head, tail), layers in sorted(tails.items()):
        numbers = ",".join(map(str, sorted(layers)))
        rest.append(".".join(w for w in (head, f"{{{numbers}}}" if len(layers) > 1 else numbers, tail) if w))
    return ", ".join(rest)
