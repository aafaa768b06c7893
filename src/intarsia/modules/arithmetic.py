"""Arithmetic of modules: `add`, `subtract`, `analogy`, `average`, `scale`, `negate`, each from modules to a module.

The change of the weights is what is calculated with: (1/2)(B1 A1 + B2 A2), never (B1 + B2)/2 (A1 + A2)/2.  The result is
exact: low-rank products are laid side by side (the ranks add up; `merging.svd` makes them smaller), see `terms.py`.  With w_i
the weights of an expression, `weighted_sum` gives the module that does what the expression `w_1*a + w_2*b` does.  Task
arithmetic after Ilharco et al. 2023 (arXiv 2212.04089).

A head is new output and no change of a weight: it is not scaled.  If exactly one module has a head, the result has it;
heads over the same labels are averaged by `average`; otherwise `head=` names the one to keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError, listing, nearest
from intarsia.methods.method import Method, Patch, Policy
from intarsia.modules.derived import derived_card
from intarsia.modules.module import Module
from intarsia.modules.names import MAX_NAME
from intarsia.modules.terms import Term, layer_of, patches_from, terms, total
from intarsia.patches import Head


def add(*modules: Module, name: str | None = None, head: str | None = None) -> Module:
    """a + b + ...: all changes at once."""
    return weighted_sum(modules, [1.0] * len(modules), name=name, head=head, operation="add")


def subtract(a: Module, b: Module, *, name: str | None = None, head: str | None = None) -> Module:
    """a - b: what a knows beyond b. `subtract(a, a)` is the base."""
    return weighted_sum((a, b), (1.0, -1.0), name=name, head=head, operation="subtract")


def analogy(a: Module, b: Module, c: Module, *, name: str | None = None, head: str | None = None) -> Module:
    """c + (b - a): what stands to c as b stands to a."""
    return weighted_sum((c, b, a), (1.0, 1.0, -1.0), name=name, head=head, operation="analogy")


def average(
    modules: Sequence[Module], weights: Sequence[float] | None = None, *, name: str | None = None, head: str | None = None
) -> Module:
    """The weighted mean; weights are divided by their sum, None for equal ones.

    Raises:
        UsageError: there are more or fewer weights than modules, or they sum to zero.
    """
    weights = [1.0] * len(modules) if weights is None else list(weights)
    check_weights(modules, weights)
    whole = math.fsum(weights)
    if whole == 0:
        raise UsageError(f"the weights {weights} sum to zero, so there is no mean; use weighted_sum for plain sums")
    return weighted_sum(modules, [w / whole for w in weights], name=name, head=head, operation="average")


def scale(module: Module, factor: float, *, name: str | None = None) -> Module:
    """factor * a."""
    return weighted_sum((module,), (factor,), name=name, operation="scale")


def negate(module: Module, *, name: str | None = None) -> Module:
    """-a: unlearn what a has learnt."""
    return weighted_sum((module,), (-1.0,), name=name, operation="negate")


def weighted_sum(
    modules: Sequence[Module],
    weights: Sequence[float],
    *,
    name: str | None = None,
    head: str | None = None,
    operation: str = "weighted_sum",
) -> Module:
    """w_1 a_1 + w_2 a_2 + ... on the changes of the weights; the weights need not sum to one.

    Args:
        name: of the result; None for the names put together.
        head: name of the module whose head the result has.

    Raises:
        ModuleError: a module is not additive, belongs to another base or was trained in another context; or a product and
            a sum meet at one layer.
        UsageError: the weights do not fit.
    """
    check_weights(modules, weights)
    check_together(modules)
    merged: dict[str, tuple[Module, float]] = {}
    for module, weight in zip(modules, weights):  # equal modules count once, so that a - a is the base exactly
        merged[module.digest] = (module, weight + merged[module.digest][1] if module.digest in merged else weight)
    found = combine([(weight, term) for module, weight in merged.values() for term in terms(module, alone=len(merged) == 1)])
    patches, tensors = patches_from(found)
    head_patches, head_tensors, labels = _head(modules, weights, head, operation)
    return assemble(modules, (*patches, *head_patches), {**tensors, **head_tensors}, labels, name, operation, {"weights": list(weights)})


def combine(parts: Sequence[tuple[float, Term]]) -> list[tuple[Term, Sequence[Term]]]:
    """One term per place for weighted terms, with the terms it was made of."""
    places: dict[tuple[str, str], list[tuple[float, Term]]] = {}
    for weight, term in parts:
        places.setdefault((term.site, term.form), []).append((weight, term))
    check_layers(term for _, term in parts)
    found: list[tuple[Term, Sequence[Term]]] = []
    for members in places.values():
        first = members[0][1]
        if len(members) == 1:  # the op scales, tensors stay as they are
            result = replace(first, scale=first.scale * members[0][0])
        else:
            factor, tensors = total([(weight * term.scale, term.factor, term.tensors) for weight, term in members])
            result = replace(first, factor=factor, tensors=tensors, scale=1.0)
        found.append((result, [term for _, term in members]))
    return found


def assemble(
    modules: Sequence[Module],
    patches: Sequence[Patch],
    tensors: Mapping[str, Tensor],
    labels: tuple[str, ...] | None,
    name: str | None,
    operation: str,
    settings: Mapping[str, Any],
) -> Module:
    """The module made of these parts, with what it inherits from its parents.

    Raises:
        UsageError: the result would be called like one of its parents.
    """
    first = modules[0]
    if name in [module.name for module in modules]:
        raise UsageError(f"the result cannot be called {name!r} like a module it is made of; give another name=")
    kinds = {module.method.name for module in modules}
    method = Method(
        first.method.name if len(kinds) == 1 else "mixed",
        tuple(patches),
        Policy(learning_rate=min(m.method.policy.learning_rate for m in modules)),
        "; ".join(dict.fromkeys(m.method.source for m in modules if m.method.source)),
    )
    roles = {k: v for k, v in first.roles.items() if all(m.roles.get(k) == v for m in modules)}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return Module(
        name=name or _name(operation, modules),
        method=method,
        tensors=whole,
        base=first.base,
        labels=labels,
        roles=roles,
        requires=tuple(dict.fromkeys(digest for m in modules for digest in m.requires)),
        card=derived_card(modules, operation, settings, nbytes=sum(t.numel() * t.element_size() for t in whole.values())),
        context=dict(first.context),
    )


def _name(operation: str, modules: Sequence[Module]) -> str:
    text = f"{operation} of {' and '.join(module.name for module in modules)}"
    return text if len(text) <= MAX_NAME else f"{operation} of {len(modules)} modules"


def check_weights(modules: Sequence[Module], weights: Sequence[float]) -> None:
    if isinstance(modules, Module) or not modules:
        raise UsageError("expected a list of one or more modules")
    if len(weights) != len(modules):
        raise UsageError(f"{len(modules)} modules and {len(weights)} weights: give one weight for each module ({listing(m.name for m in modules)})")
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"weights are finite numbers, found {weight}")


def check_together(modules: Sequence[Module]) -> None:
    """Refuse modules of different bases or contexts.

    Raises:
        ModuleError: names the field that differs.
    """
    first = modules[0]
    for other in modules[1:]:
        difference = other.base.difference(first.base)
        if difference:
            raise ModuleError(f"{other.name!r} and {first.name!r} belong to different bases: {difference}")
        if dict(other.context) != dict(first.context):
            keys = sorted(k for k in {*other.context, *first.context} if other.context.get(k) != first.context.get(k))
            raise ModuleError(
                f"{other.name!r} and {first.name!r} were made for different settings of {listing(keys)}: a single module "
                "cannot be used with both; run them in an expression, or align the settings by retraining"
            )


def check_layers(found: Iterable[Term]) -> None:
    """Refuse a layer at which a rescaling meets anything else: (W + D) diag(l) is no sum of the two changes."""
    layers: dict[str, dict[tuple[str, str, bool], Term]] = {}
    for term in found:
        layers.setdefault(layer_of(term.site), {})[(term.site, term.form, term.relative)] = term
    for layer, kinds in layers.items():
        odd = next((t for t in kinds.values() if t.relative or t.patch.port == "in"), None)
        if odd is not None and len(kinds) > 1:
            others = ", ".join(f"{t.patch.name!r} at {t.site}" for t in kinds.values() if t is not odd)
            raise ModuleError(
                f"layer {layer}: patch {odd.patch.name!r} at {odd.site} and {others} do not make one change of its weight "
                "(a product and a sum); use an expression instead, e.g. '0.5*a + 0.5*b'"
            )


def _head(
    modules: Sequence[Module], weights: Sequence[float], name: str | None, operation: str
) -> tuple[tuple[Patch, ...], dict[str, Tensor], tuple[str, ...] | None]:
    """Patch, tensors and labels of the result's head."""
    owners = head_owners(modules, name)
    if not owners:
        return (), {}, None
    parts = [head_of(module) for module in owners]
    first = parts[0]
    if all(_same(part, first) for part in parts[1:]):
        return (first[0],), first[1], owners[0].labels
    kinds = {_kind(part[0]) for part in parts}
    if operation == "average" and len(kinds) == 1 and None not in kinds:
        shares = [weight for module, weight in zip(modules, weights) if module.method.head is not None]
        return (*_mean_head(parts, shares), owners[0].labels)
    raise UsageError(
        f"{listing(repr(m.name) for m in owners)} each have a head of their own; name the one the result has: head={owners[0].name!r}"
        + ("" if operation == "average" else " (average() averages heads over the same labels)")
    )


def head_owners(modules: Sequence[Module], name: str | None) -> list[Module]:
    """The modules with a head, or the one of them that is called so.

    Raises:
        UsageError: none with a head is called so.
    """
    owners = [module for module in modules if module.method.head is not None]
    if name is None:
        return owners
    chosen = next((module for module in owners if module.name == name), None)
    if chosen is None:
        raise UsageError(f"head={name!r} is none of these modules with a head: {listing(m.name for m in owners) or 'none'}{nearest(name, [m.name for m in owners])}")
    return [chosen]


def head_of(module: Module) -> tuple[Patch, dict[str, Tensor]]:
    """The patch and the tensors of a module's head."""
    patch = next(p for p in module.method.patches if p.port == "logits")
    return patch, {k: t for k, t in module.tensors.items() if k.partition("/")[2].startswith(f"{patch.name}.")}


def _same(one: tuple[Patch, dict[str, Tensor]], other: tuple[Patch, dict[str, Tensor]]) -> bool:
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(torch.equal(t, other[1][k]) for k, t in one[1].items())


def _kind(patch: Patch) -> tuple[object, ...] | None:
    """What must agree for heads to be averaged; None for heads that are no linear map."""
    form = patch.form
    return (form.labels, form.pooling, form.problem) if isinstance(form, Head) else None


def _mean_head(
    parts: Sequence[tuple[Patch, dict[str, Tensor]]], shares: Sequence[float]
) -> tuple[tuple[Patch, ...], dict[str, Tensor]]:
    """The mean of linear heads: centres and scales folded into the maps, then averaged."""
    whole = math.fsum(shares)
    if whole == 0:
        raise UsageError(f"the weights of the modules with heads sum to zero ({listing(map(str, shares))}), so their mean does not exist; name one with head=")
    weight: Tensor | None = None
    bias: Tensor | None = None
    for (_, tensors), share in zip(parts, shares):
        leaves = {key.rpartition(".")[2]: tensor.float() for key, tensor in tensors.items()}
        w, b = leaves["weight"], leaves["bias"]
        if "mean" in leaves:
            w = w * leaves["scale"]
            b = b - w @ leaves["mean"]
        w, b = w * (share / whole), b * (share / whole)
        weight, bias = (w, b) if weight is None or bias is None else (weight + w, bias + b)
    assert weight is not None and bias is not None
    patch = parts[0][0]
    assert isinstance(patch.form, Head)
    lead = next(iter(parts[0][1])).rpartition(".")[0]
    return (replace(patch, form=replace(patch.form, standardise=False)),), {f"{lead}.weight": weight, f"{lead}.bias": bias}
