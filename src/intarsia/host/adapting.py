"""Weights found after training, with few examples or none: black-box search, entropy on test batches, one gradient.

| function | what moves | by | source |
|---|---|---|---|
| `search` | a router's table | a score of few examples, without gradients, kept in bounds | LoraHub (Huang et al. 2024, arXiv 2307.13269) |
| `least_entropy` | a router's table, and stays | entropy of several tasks' test batches | AdaMerging (Yang et al. 2024, arXiv 2310.02575) |
| `Emea` | a router's table, for one batch | entropy of that batch | EMEA (Wang et al. 2021, arXiv 2109.04877) |
| `inferred` | nothing: the member that one gradient names | entropy at equal weights | SupSup (Wortsman et al. 2020, arXiv 2006.14769) |

All are transductive but the first: they look at the inputs that are then answered, never at labels.  Everything but the
router's tensors stays as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intarsia.compose import Expr
from intarsia.errors import SpecError, UsageError
from intarsia.host.host import Host
from intarsia.host.probe import Batch, evaluating, inputs_of
from intarsia.host.prototypes import routers
from intarsia.methods import routing


def tables(host: Host, name: str) -> list[nn.Parameter]:
    """The trainable tables of a router, each once, in model order.

    Raises:
        SpecError: it has none.
    """
    scorers = routing.tables([form for _, form in routers(host, name)])
    found = [scorer.table for _, scorer in scorers if isinstance(scorer.table, nn.Parameter)]
    if not found:
        raise SpecError(f"{name!r} has no table of weights to move; make it with host.router({name!r}, 'soup', [...])")
    return found


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the answers, []: over rows [R, C], or over the real tokens of [R, T, C]."""
    logs = logits.float().log_softmax(-1)
    each = -(logs.exp() * logs).sum(-1)
    if each.dim() == 2 and mask is not None and mask.shape == each.shape:
        return (each * mask).sum() / mask.sum().clamp(min=1)
    return each.mean()


@contextmanager
def _moving(host: Host, tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these tensors only, the model in evaluation mode; flags and modes as before afterwards."""
    flags = [(p, p.requires_grad) for p in host.model.parameters()]
    modes = [(m, m.training) for m in host.model.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for tensor in tensors:
            tensor.requires_grad_(True)
        host.model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _answered(host: Host, expression: Expr | str, batch: Batch, head: str | None, context: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """The model's output for a batch, and the mean entropy of its answers."""
    with host.using(expression, head=head, **context) as model:
        output = model(**inputs_of(batch))
    if output.get("logits") is None:
        raise UsageError(f"{expression} gives no logits, so there is no entropy to lower; name a module with a head")
    return output, entropy(output["logits"], batch.get("attention_mask"))


@dataclass(frozen=True)
class Emea:
    """Answers batch by batch under weights that make each batch's answers least uncertain, and then forgets them.

        answer = Emea(host, "r", "fuse(en, hi, ar; router=r) >> ner", steps=10)
        logits = answer(batch)

    The router is a `soup` with `squash="softmax"` (one number per member and layer; the paper starts at 0.5 each).

    Attributes:
        rate: of plain gradient descent (10 in the paper, not transferable to other heads: choose it on source dev data).
        steps: 1 or 10 in the paper; 0 is the plain ensemble.
    """

    host: Host
    router: str
    expression: Expr | str
    rate: float = 10.0
    steps: int = 1
    head: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Any:
        """The model's output for a batch; the router is as it was before."""
        return self.answered(batch)[0]

    def answered(self, batch: Batch) -> tuple[Any, list[float]]:
        """The output, and the entropies before every step and at the end."""
        moving = tables(self.host, self.router)
        before = [p.detach().clone() for p in moving]
        seen = []
        try:
            with _moving(self.host, moving):
                for _ in range(self.steps):
                    _, uncertainty = _answered(self.host, self.expression, batch, self.head, self.context)
                    seen.append(float(uncertainty.detach()))
                    gradients = torch.autograd.grad(uncertainty, moving, allow_unused=True)
                    with torch.no_grad():
                        for parameter, gradient in zip(moving, gradients):
                            if gradient is not None:
                                parameter.sub_(gradient, alpha=self.rate)
                with torch.no_grad():
                    output, uncertainty = _answered(self.host, self.expression, batch, self.head, self.context)
                seen.append(float(uncertainty))
        finally:
            with torch.no_grad():
                for parameter, value in zip(moving, before):
                    parameter.copy_(value)
        return output, seen


def least_entropy(
    host: Host, router: str, tasks: Sequence[tuple[Expr | str, str | None, Iterable[Batch]]], *, steps: int = 500, rate: float = 1e-3,
) -> list[float]:  # fmt: skip
    """Move a router's weights so that the answers to unlabelled batches of several tasks become less uncertain (AdaMerging).

    Args:
        tasks: (expression, the module whose head answers, batches) of every task; batches are used again when they end.
        steps: of Adam, each over one batch of every task.

    Returns:
        The summed entropy at every step.
    """
    moving = tables(host, router)
    optimiser = torch.optim.Adam(moving, lr=rate)
    endless = [(expression, head, _endless(batches)) for expression, head, batches in tasks]
    losses = []
    with _moving(host, moving):
        for _ in range(steps):
            total = torch.stack([_answered(host, e, next(batches), head, {})[1] for e, head, batches in endless]).sum()
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            losses.append(float(total.detach()))
    return losses


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    kept = list(batches)
    if not kept:
        raise UsageError("a task has no batches")
    while True:
        yield from kept


def inferred(host: Host, router: str, expression: Expr | str, batch: Batch, *, head: str | None = None) -> Tensor:
    """-dH/dw of every member at the router's present weights, summed over sites, [N]: the largest names the member.

    The router is a `soup` at equal weights; as in SupSup one gradient decides, and nothing is moved.
    """
    moving = tables(host, router)
    with _moving(host, moving):
        _, uncertainty = _answered(host, expression, batch, head, {})
        gradients = torch.autograd.grad(uncertainty, moving, allow_unused=True)
    found = [g for g in gradients if g is not None]
    if not found:
        raise UsageError(f"{expression} does not depend on the weights of {router!r}")
    return -torch.stack([g.reshape(-1, g.shape[-1]).sum(0) for g in found]).sum(0)


Optimiser = Literal["cma", "scipy"]


def search(
    host: Host, router: str, score: Callable[[], float], *, steps: int = 40, bound: float = 1.5, l1: float = 0.05, seed: int = 0, optimiser: Optimiser | None = None,
) -> float:  # fmt: skip
    """Find a router's weights by a score of few examples, without gradients (LoraHub); the best ones stay in the router.

    Args:
        score: to be made small, with the weights that the router then has; e.g. `few_shot(...)`.
        steps: how often the score is asked.
        bound: weights stay within -bound ... bound; they start at what the router has.
        l1: times mean abs(w) is added.
        optimiser: `cma` (pip install cma) or `scipy`; None for the first that is installed.

    Returns:
        The best score, with its penalty.
    """
    moving = tables(host, router)
    start = torch.cat([p.detach().flatten() for p in moving]).double().clamp(-bound, bound)
    best: tuple[float, Tensor] | None = None

    def put(values: Tensor) -> None:
        with torch.no_grad():
            for parameter, part in zip(moving, values.split([p.numel() for p in moving])):
                parameter.copy_(part.view_as(parameter))

    def ask(point: Any) -> float:
        nonlocal best
        values = torch.as_tensor(point, dtype=torch.float64).clamp(-bound, bound)
        put(values)
        found = score() + l1 * float(values.abs().mean())
        if best is None or found < best[0]:
            best = (found, values.clone())
        return found

    try:
        ask(start)
        _SEARCHES[optimiser or _installed()](ask, start, steps - 1, bound, seed)
    except BaseException:
        put(start)
        raise
    assert best is not None
    put(best[1])
    return best[0]


def few_shot(
    host: Host, expression: Expr | str, batches: Sequence[Batch], *, loss: Callable[[Any, Batch], Tensor] | None = None, head: str | None = None
) -> Callable[[], float]:
    """The mean loss of some labelled batches under an expression, as a function to be asked again and again.

    Args:
        loss: from the output and the batch; None for the loss that the model gives for its `labels`.
    """

    def score() -> float:
        total = 0.0
        with evaluating(host.model), host.using(expression, head=head) as model:
            for batch in batches:
                output = model(**(batch if loss is None else inputs_of(batch)))
                value = output.get("loss") if loss is None else loss(output, batch)
                if value is None:
                    raise UsageError("the model gives no loss for these inputs: put 'labels' into the batches, or give loss=function(output, batch)")
                total += float(value)
        return total / len(batches)

    if not batches:
        raise UsageError("there are no batches to search with")
    return score


def _installed() -> Optimiser:
    for name in ("cma", "scipy"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UsageError("a search without gradients needs an optimiser: pip install cma (or scipy)")


def _cma(ask: Callable[[Any], float], start: Tensor, budget: int, bound: float, seed: int) -> None:
    import cma

    if len(start) < 2:  # CMA-ES has no covariance to adapt in one dimension
        return _scipy(ask, start, budget, bound, seed)
    options = {"bounds": [-bound, bound], "maxfevals": budget, "seed": seed + 1, "verbose": -9, "popsize": min(4 + int(3 * len(start) ** 0.5), max(budget // 4, 4))}
    strategy = cma.CMAEvolutionStrategy(start.tolist(), bound / 3, options)
    asked = 0
    while asked < budget and not strategy.stop():
        points = strategy.ask()
        points = points[: budget - asked] if budget - asked < len(points) else points
        values = [ask(point) for point in points]
        asked += len(points)
        if len(points) < strategy.popsize:
            break
        strategy.tell(points, values)
    return None


def _scipy(ask: Callable[[Any], float], start: Tensor, budget: int, bound: float, seed: int) -> None:
    from scipy.optimize import minimize

    corners = [start.numpy()]
    for i in range(len(start)):
        corner = start.clone()
        corner[i] = corner[i] + bound / 3 if corner[i] <= bound / 2 else corner[i] - bound / 3
        corners.append(corner.numpy())
    minimize(ask, start.numpy(), method="Nelder-Mead", bounds=[(-bound, bound)] * len(start), options={"maxfev": budget, "initial_simplex": corners})


_SEARCHES: Mapping[str, Callable[[Callable[[Any], float], Tensor, int, float, int], None]] = {"cma": _cma, "scipy": _scipy}
