"""Routers that are computed instead of trained: from the members themselves, from their data, or from gates trained apart.

    arrow(host, "r", ["a", "b"])                    from the members' own matrices
    centroids / gaussians(host, "r", {"a": batches})    from examples of each member's task or domain, as the base sees them
    phatgoose(host, "r", {"a": "gate_a"})           from one gate per member
    closest(host, {"a": batches}, batches, k)       names of the members whose examples are nearest (AdapterSoup)

What is not here: routers that look at a loss or at the model's uncertainty (`adapting.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from intarsia.compose import Expr, Mix, Ref, expr
from intarsia.errors import CompositionError, UsageError
from intarsia.host.host import Host
from intarsia.host.probe import Batch, evaluating, inputs_of
from intarsia.patches import Affine, Delta, RouterForm, WhyNot
from intarsia.patches.factors import LowRankFactor
from intarsia.patches.scores import GateScorer, GaussianScorer, Looking, PrototypeScorer
from intarsia.sites.address import Site


def arrow(host: Host, name: str, members: Sequence[Expr | str], **settings: Any) -> Host:
    """A new router with the top right singular vector of every member's matrix, at every site (Arrow).

    Raises:
        CompositionError: a member is no linear map of the layer's input somewhere.
    """
    with computed(host, name, "arrow", members, settings):
        for site, form in routers(host, name):
            assert isinstance(form.scorer, PrototypeScorer)
            for row, part in enumerate(form.spec.parts):
                matrix = top_vector(host, part, site)
                if matrix is not None:
                    form.scorer.prototypes[row] = matrix.to(form.scorer.prototypes)
    return host


@contextmanager
def computed(host: Host, name: str, kind: str, members: Sequence[Expr | str], settings: Mapping[str, Any]) -> Iterator[None]:
    """A new router, whose tensors this block sets; it is gone again if that fails."""
    host.router(name, kind, members, **settings)
    try:
        with torch.no_grad():
            yield
    except BaseException:
        host.remove(name)
        raise


@torch.no_grad()
def top_vector(host: Host, part: str, site: Site) -> Tensor | None:
    """The top right singular vector, [d_in], of what a member adds to a layer; None if it has nothing there."""
    member = expr(part)
    if not isinstance(member, Ref):
        raise CompositionError(f"{part} is no single module, so it has no matrix of its own")
    deltas = next((found for place, found in host.deltas(member.name) if place.name == site.name), [])
    if not deltas:
        return None
    if len(deltas) == 1 and isinstance(factor := _factor(deltas[0]), LowRankFactor):
        outer, inner = torch.linalg.qr(factor.up.double()), torch.linalg.qr(factor.down.double().T)
        _, _, right = torch.linalg.svd(outer.R @ inner.R.T)  # r x r, never d x d
        return (inner.Q @ right[0]).float()
    total: Tensor | None = None
    for delta in deltas:
        found = delta.form.as_linear()
        if isinstance(found, WhyNot) or found.weight is None:
            reason = found.reason if isinstance(found, WhyNot) else "it adds a constant"
            raise CompositionError(f"member {part!r} at {site.name} is no linear map of the layer's input ({reason}), so it has no prototype; use another router")
        weight = found.weight * getattr(delta.op, "scale", 1.0)
        total = weight if total is None else total + weight
    assert total is not None
    return torch.linalg.svd(total.double(), full_matrices=False).Vh[0].float()


def _factor(delta: Delta) -> object:
    return getattr(delta.form, "factor", None) if isinstance(getattr(delta.form, "spec", None), Affine) else None


def routers(host: Host, name: str) -> Iterator[tuple[Site, RouterForm]]:
    """The router's form at every site."""
    for site, deltas in host.deltas(name):
        for delta in deltas:
            if isinstance(delta.form, RouterForm):
                yield site, delta.form


def phatgoose(host: Host, name: str, gates: Mapping[str, str], **settings: Any) -> Host:
    """A new router from gates on this host that were trained one member at a time: `{"a": "gate_a", "b": "gate_b"}`.

    Raises:
        CompositionError: a gate is not one of its member, or looks at something else.
    """
    for member, other in gates.items():
        found = [form for _, form in routers(host, other) if isinstance(form.scorer, GateScorer) and form.spec.parts == (member,)]
        if not found:
            raise CompositionError(f"{other!r} is no gate of {member!r}; make it with host.router({other!r}, 'gate', [{member!r}]) and train it")
    with computed(host, name, "phatgoose", list(gates), settings):
        for site, form in routers(host, name):
            assert isinstance(form.scorer, GateScorer)
            for row, (member, other) in enumerate(gates.items()):
                at = next((f for s, f in routers(host, other) if s.name == site.name), None)
                if at is not None:
                    assert isinstance(at.scorer, GateScorer)
                    if at.scorer.what != form.scorer.what:
                        raise CompositionError(f"the gate of {member!r} looks at {at.scorer.what!r} at {site.name}, the router at {form.scorer.what!r}; give read= alike")
                    form.scorer.gate[row] = at.scorer.gate[0]
    return host


@contextmanager
def _collected(host: Host, name: str, mixture: Mix) -> Iterator[dict[str, list[Tensor]]]:
    """What the scorers of a router look at while the base runs, by site: [R, n] or [tokens, n] each."""
    found: dict[str, list[Tensor]] = {}
    hooks = []

    def collect(site: Site, scorer: Looking) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            x = scorer.looked(args[0], args[2]).detach().float()
            if scorer.spec.by == "token":
                mask = args[2].tokens(x.shape[-2]).in_prompt() if x.dim() == 3 else None
                x = x[mask] if mask is not None else x
            found.setdefault(site.name, []).append(x.reshape(-1, x.shape[-1]))

        return hook

    for site, form in routers(host, name):
        assert isinstance(form.scorer, Looking)
        hooks.append(form.scorer.register_forward_hook(collect(site, form.scorer)))
    try:
        headed = [ref.name for ref in mixture.refs() if host.labels(ref.name) is not None]  # which one answers does not matter
        # the router looks, and nothing is changed
        with evaluating(host.model), host.using(Mix((mixture,), (0.0,)), head=headed[0] if headed else None):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def states(host: Host, name: str, members: Sequence[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """What a router's scorers see of some batches on the base, by site.

    Raises:
        UsageError: there are no rows.
    """
    with _collected(host, name, Mix(tuple(map(expr, members)), router=name)) as found:
        for batch in batches:
            host.model(**inputs_of(batch))
    if not found:
        raise UsageError("there are no rows to look at")
    return {site: torch.cat(values) for site, values in found.items()}


def gaussians(host: Host, name: str, data: Mapping[str, Iterable[Batch]], *, floor: float = 1e-4, **settings: Any) -> Host:
    """A new router with a Gaussian per member, fitted to examples of each; their numbers are the prior.

    Args:
        data: batches by member.
        floor: smallest variance.
    """

    def fit(scorer: Looking, row: int, x: Tensor) -> None:
        assert isinstance(scorer, GaussianScorer)
        scorer.mean[row] = x.mean(0)
        scorer.variance[row] = x.var(0, correction=0).clamp(min=floor)
        scorer.prior[row] = float(torch.tensor(float(len(x))).log())

    with computed(host, name, "gaussians", list(data), settings):
        _from_data(host, name, data, fit)
        for _, form in routers(host, name):
            form.scorer.prior.sub_(form.scorer.prior.logsumexp(0))  # type: ignore[operator]
    return host


def centroids(host: Host, name: str, data: Mapping[str, Iterable[Batch]], **settings: Any) -> Host:
    """A new router by the cosine between an example's mean state and each member's mean state.

    Args:
        data: batches by member.
    """

    def fit(scorer: Looking, row: int, x: Tensor) -> None:
        assert isinstance(scorer, PrototypeScorer)
        scorer.prototypes[row] = torch.nn.functional.normalize(x.mean(0), dim=0)

    with computed(host, name, "centroids", list(data), settings):
        _from_data(host, name, data, fit)
    return host


def _from_data(host: Host, name: str, data: Mapping[str, Iterable[Batch]], fit: Callable[[Looking, int, Tensor], None]) -> None:
    """Let `fit` set the row of every member in every scorer from what the scorer sees of that member's examples."""
    scorers = {site.name: form.scorer for site, form in routers(host, name)}
    for row, batches in enumerate(data.values()):
        for site, x in states(host, name, list(data), batches).items():
            scorer = scorers[site]
            assert isinstance(scorer, Looking)
            fit(scorer, row, x)


@torch.no_grad()
def embedded(host: Host, batches: Iterable[Batch]) -> Tensor:
    """The mean last state of every row on the base, [rows, d], padding left out."""
    found = []
    with evaluating(host.model), host.using(None) as model:
        for batch in batches:
            given = inputs_of(batch)
            output = model(**given, output_hidden_states=True)
            last = output.get("decoder_hidden_states") or output.get("hidden_states")
            mask = given.get("decoder_attention_mask" if output.get("decoder_hidden_states") else "attention_mask")
            state = last[-1].float()
            real = torch.ones(state.shape[:2], device=state.device) if mask is None or mask.shape != state.shape[:2] else mask.float()
            found.append((state * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1))
    if not found:
        raise UsageError("there are no rows to look at")
    return torch.cat(found)


def closest(host: Host, data: Mapping[str, Iterable[Batch]], target: Iterable[Batch], k: int = 3) -> list[str]:
    """The k members whose examples lie nearest to those of the target, nearest first (AdapterSoup, Chronopoulou et al. 2023).

    By the cosine of mean embeddings on the base.  The soup is the mean of their tensors: `phi(average(...))`.
    """
    if not 1 <= k <= len(data):
        raise UsageError(f"the {k} closest of {len(data)} members")
    wanted = embedded(host, target).mean(0)
    near = {name: float(torch.cosine_similarity(embedded(host, batches).mean(0), wanted, dim=0)) for name, batches in data.items()}
    return sorted(near, key=lambda name: (-near[name], name))[:k]


__all__ = ["arrow", "centroids", "closest", "computed", "embedded", "gaussians", "phatgoose", "routers", "states", "top_vector"]
