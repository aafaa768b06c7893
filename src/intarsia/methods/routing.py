"""More routers of the literature, one row each, and what is added to the loss for the weights they give.

| router | weights |
|---|---|
| `fixed` | numbers, or by a key of the call (`keys`), not trained |
| `soup` | one number per member and layer (or site, or model): LoRA soups (CAT), AdaMerging, LoraHub, EMEA start from here |
| `polytropon` | per task a relaxed Bernoulli of every member (skill), over tensors |
| `experts` | a linear gate per site, the k largest (mixture of LoRAs) |
| `arrow` | prototypes computed from the members |
| `phatgoose` | standardised gates that were trained one member at a time (`gate`) |
| `basis` | a map of a vector of the call (typology) |
| `gaussians` | responsibilities of a mixture model |
| `centroids` | nearness to the members' mean states |

What is not here: AdapterFusion (`fusion.py`), and what computes weights without training (`host/adapting.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.methods.fusion import Where, router, weighing
from intarsia.methods.method import Method, Penalty, Policy, RoutePenalty
from intarsia.patches import Basis, Gate, Gaussian, Prototype, Router, RouterForm, Table
from intarsia.patches.scores import TableScorer

_OUT: Where = {"out": "ffn"}


def tables(parts: Sequence[nn.Module]) -> list[tuple[Router, TableScorer]]:
    """The tables among the forms and tied parts of a router, each once."""
    found: dict[int, tuple[Router, TableScorer]] = {}
    for form in parts:
        if isinstance(form, RouterForm) and isinstance(form.scorer, TableScorer):
            found.setdefault(id(form.scorer), (form.spec, form.scorer))
    return list(found.values())


@register("ibp_prior")
@dataclass(frozen=True, slots=True)
class IndianBuffet:
    """-weight * log p(Z) of an Indian buffet process over the tables' chances sigmoid(Z), [K keys, S skills].

    Polytropon (Ponti et al. 2022, arXiv 2202.13914) eq. 4, in its form for finitely many skills (Griffiths & Ghahramani
    2011, eq. 11), which is defined for soft counts: sum over skills of log B(m_s + alpha/S, K - m_s + 1), m_s the expected
    number of keys that have skill s.  The released code counts unique columns instead, of which a soft table has none.
    """

    alpha: float = 5.0
    weight: float = 1.0

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        terms = [self.log_prior(scorer.table.sigmoid()) for _, scorer in tables(parts) if scorer.table.dim() == 2]
        return -self.weight * torch.stack(terms).sum() if terms else None

    def log_prior(self, chances: Tensor) -> Tensor:
        """Up to a constant; chances [K, S]."""
        keys, skills = chances.shape
        counts, share = chances.sum(0), self.alpha / skills
        return (torch.lgamma(counts + share) + torch.lgamma(keys - counts + 1.0) - math.lgamma(keys + 1.0 + share)).sum()


@register("balance")
@dataclass(frozen=True, slots=True)
class Balance:
    """weight * n * sum_i (share of tokens whose largest weight is i) * (mean weight of i), mean over sites: 1 when even.

    Switch transformers (Fedus et al. 2021, arXiv 2101.03961) eq. 4.
    """

    weight: float = 0.01

    def routed(self, notes: Sequence[Any]) -> Tensor | None:
        def term(weights: Tensor) -> Tensor:
            flat = weights.reshape(-1, weights.shape[-1])
            size = flat.shape[-1]
            share = torch.bincount(flat.argmax(-1), minlength=size).to(flat) / len(flat)
            return size * (share * flat.mean(0)).sum()

        return _mean(term, notes, self.weight)


@register("route_entropy")
@dataclass(frozen=True, slots=True)
class Entropy:
    """weight * mean entropy of the weights over their sum: sharp choices where positive, spread ones where negative."""

    weight: float = 0.01

    def routed(self, notes: Sequence[Any]) -> Tensor | None:
        def term(weights: Tensor) -> Tensor:
            shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=1e-12)
            return -(shares * shares.clamp(min=1e-12).log()).sum(-1).mean()

        return _mean(term, notes, self.weight)


@register("route_l1")
@dataclass(frozen=True, slots=True)
class L1:
    """weight * mean of abs(w)."""

    weight: float = 0.05

    def routed(self, notes: Sequence[Any]) -> Tensor | None:
        return _mean(lambda weights: weights.abs().mean(), notes, self.weight)


def _mean(term: Any, notes: Sequence[Any], weight: float) -> Tensor | None:
    return weight * torch.stack([term(note.weights) for note in notes]).mean() if notes else None


def penalties(balance: float, entropy: float, l1: float) -> tuple[RoutePenalty, ...]:
    """Those that are not zero."""
    chosen: list[RoutePenalty] = []
    if balance:
        chosen.append(Balance(balance))
    if entropy:
        chosen.append(Entropy(entropy))
    if l1:
        chosen.append(L1(l1))
    return tuple(chosen)


def fewer(top: int | None, parts: Sequence[str]) -> int | None:
    """How many members are kept; None for all."""
    return None if top is None or top >= len(parts) else top


@router("fixed", equation="w fixed, or by a key of the call", source="-")
def fixed(
    parts: tuple[str, ...] = (), where: Where = _OUT, weights: tuple[float, ...] = (), keys: tuple[str, ...] = (), context: str = "task"
) -> Method:
    """Weights that are not trained: numbers, or the i-th member for the i-th key (routing by language, domain, task)."""
    if weights and keys:
        raise SpecError("a fixed router has weights, or keys that choose a member each, not both")
    start = tuple(float(w) for w in weights) or 1.0 / max(len(parts), 1)
    table = Table(keys=keys, context=context, frozen=True, identity=True) if keys else Table(start=start, frozen=True)
    return weighing("fixed", Router(parts, table, squash="free", scope="shared"), where, Policy())


@router("soup", equation="W' = W + sum_i a_i^l D_i", source="Prabhakar et al. 2025, arXiv 2410.13025; Yang et al. 2024, arXiv 2310.02575")
def soup(
    parts: tuple[str, ...] = (), where: Where = _OUT, squash: str = "free", scope: str = "layer", start: float | None = None,
    keys: tuple[str, ...] = (), context: str = "task", l1: float = 0.0,
) -> Method:  # fmt: skip
    """One trained number per member and layer, nothing else: LoRA soups (CAT), with `squash="softmax"` as its released code.

    AdaMerging is `squash="clamp", scope="site", start=0.3`, LoraHub `scope="shared", start=0`, EMEA `squash="softmax"`.
    """
    count = max(len(parts), 1)
    begin = start if start is not None else 0.0 if squash in ("softmax", "bernoulli") else 1.0 / count
    spec = Router(parts, Table(keys=keys, context=context, start=begin), squash=squash, scope=scope)  # type: ignore[arg-type]
    return weighing("soup", spec, where, Policy(learning_rate=1e-2, penalties=penalties(0.0, 0.0, l1)))


@router("polytropon", equation="(sum_s a_s A_s, sum_s a_s B_s), a = z / sum z, z = sigmoid((Z_t + noise) / tau)", source="Ponti et al. 2022, arXiv 2202.13914")
def polytropon(
    parts: tuple[str, ...] = (), where: Where = _OUT, tasks: tuple[str, ...] = (), context: str = "task", scope: str = "site",
    temperature: float = 1.0, alpha: float = 5.0, prior: float = 0.0, rate: float = 10.0,
) -> Method:  # fmt: skip
    """Every task has its share of every skill (the members, of one kind), in `space=phi`; noise of a relaxed Bernoulli in training.

    Two-speed learning: the table's rate is `rate` times that of the skills (Z 1e-1 ... 1e-2 beside skills of 1e-2 ... 1e-4).
    `prior` > 0 adds the Indian buffet prior with that weight (the paper's alternative).
    """
    spec = Router(
        parts, Table(keys=tasks, context=context, spread=1e-3), squash="bernoulli", sampler="relaxed", temperature=temperature, scope=scope  # type: ignore[arg-type]
    )  # fmt: skip
    terms: tuple[Penalty, ...] = (IndianBuffet(alpha, prior),) if prior else ()
    return weighing("polytropon", spec, where, Policy(learning_rate=1e-3 * rate, penalties=terms))


@router("experts", equation="w = softmax(top_k(G x))", source="mixture of LoRAs; Shazeer et al. 2017, arXiv 1701.06538")
def experts(
    parts: tuple[str, ...] = (), where: Where = _OUT, read: str = "auto", by: str = "token", top: int | None = 2, sampler: str = "none", hard: bool = False,
    scope: str = "site", balance: float = 0.01, entropy: float = 0.0,
) -> Method:  # fmt: skip
    """A linear gate over the members, the k largest, with the balance term of switch transformers."""
    spec = Router(parts, Gate(read, by, bias=False), sampler=sampler, top=fewer(top, parts), hard=hard, scope=scope)  # type: ignore[arg-type]
    return weighing("experts", spec, where, Policy(learning_rate=1e-3, penalties=penalties(balance, entropy, 0.0)))


@router("gate", equation="h' = h + sum_i sigmoid(g_i . x) d_i", source="Muqeeth et al. 2024, arXiv 2402.05859")
def gate(parts: tuple[str, ...] = (), where: Where = _OUT, read: str = "auto", by: str = "token") -> Method:
    """A sigmoid gate per member: the post-hoc stage of PHATGOOSE (one member, frozen, 100 steps), whose gates `phatgoose` then compares."""
    return weighing("gate", Router(parts, Gate(read, by, std=0.0), squash="sigmoid"), where, Policy(learning_rate=5e-3))  # type: ignore[arg-type]


@router("phatgoose", equation="w = softmax(top_k(std(g_i) . std(x) / sqrt(n)))", source="Muqeeth et al. 2024, arXiv 2402.05859")
def phatgoose(parts: tuple[str, ...] = (), where: Where = _OUT, read: str = "auto", top: int | None = 2) -> Method:
    """Gates that were trained one member at a time, standardised, the two largest per token (`phatgoose` of `intarsia.host` fills them in)."""
    return weighing("phatgoose", Router(parts, Gate(read, standardise=True, std=0.0), top=fewer(top, parts)), where, Policy())  # type: ignore[arg-type]


@router("arrow", equation="w = softmax(top_k(abs(v_i . x))), v_i the top right singular vector of D_i", source="Ostapenko et al. 2024, arXiv 2405.11157")
def arrow(parts: tuple[str, ...] = (), where: Where = _OUT, top: int | None = 4, temperature: float = 1.0, normalise: bool = False) -> Method:
    """Prototypes computed from the members themselves, per token (`arrow` of `intarsia.host` fills them in); nothing is trained."""
    return weighing("arrow", Router(parts, Prototype("input", "token", True, normalise), temperature=temperature, top=fewer(top, parts)), where, Policy())


@router("basis", equation="w = W c + b, c a vector of the call", source="Platanios et al. 2018, arXiv 1808.08493; Ustun et al. 2020, arXiv 2004.14327")
def basis(
    parts: tuple[str, ...] = (), where: Where = _OUT, size: int = 103, context: str = "typology", hidden: int = 0, bias: bool = True,
    squash: str = "free", scope: str = "shared",
) -> Method:  # fmt: skip
    """Members as a basis, weights from a vector such as a language's typology; in `space=phi` this is a linear generator."""
    return weighing("basis", Router(parts, Basis(size, context, hidden, bias), squash=squash, scope=scope), where, Policy(learning_rate=1e-3))  # type: ignore[arg-type]


@router("gaussians", equation="w_i = p(i) N(x; m_i, S_i) / sum", source="Chronopoulou et al. 2022, arXiv 2112.08786")
def gaussians(parts: tuple[str, ...] = (), where: Where = _OUT, read: str = "self", by: str = "example", temperature: float = 1.0) -> Method:
    """Responsibilities of one Gaussian per member for the mean state of an example (`gaussians` of `intarsia.host` fits them)."""
    return weighing("gaussians", Router(parts, Gaussian(read, by), temperature=temperature), where, Policy())  # type: ignore[arg-type]


@router("centroids", equation="w = softmax(top_k(m_i . x / abs(x) / tau)), m_i the direction of a mean state", source="-")
def centroids(parts: tuple[str, ...] = (), where: Where = _OUT, temperature: float = 0.1, top: int | None = None, read: str = "self") -> Method:
    """Cosines between an example's mean state and the mean state of each member's data (`centroids` of `intarsia.host` computes them)."""
    spec = Router(parts, Prototype(read, "example", False, True), temperature=temperature, top=fewer(top, parts))  # type: ignore[arg-type]
    return weighing("centroids", spec, where, Policy())


__all__ = [
    "L1", "Balance", "Entropy", "IndianBuffet", "arrow", "basis", "centroids", "experts", "fixed", "gate", "gaussians", "penalties", "phatgoose", "polytropon", "soup", "tables"
]  # fmt: skip
