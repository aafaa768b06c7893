"""`choose`: carries out a method's program before its module is trained, so that it trains the entries it should.

A phase looks at the base's entries through a *twin*: a module with a dense zero change at the same sites.  The gradient of its
tensors is that of the base's weights, and training it is full fine-tuning of these; the base itself is never written to.
The twin is taken off again, so what remains of a phase is which entries were chosen: the module starts anew (rewinding).
A warm-up trains another twin, of the module's other parts, which stands for the module until the program ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from intarsia.compose import Expr, Ref, Seq
from intarsia.errors import TrainingError
from intarsia.host import Host
from intarsia.methods import Method, Policy
from intarsia.methods.program import Explore, Probe, WarmUp
from intarsia.patches import Dense, Matrix
from intarsia.patches.factors import DenseFactor
from intarsia.patches.sparse import SparseFactor, best
from intarsia.train.batches import evaluation_batches, moved
from intarsia.train.frozen import evaluating
from intarsia.train.order import steps
from intarsia.train.task import Features, Task, context_of

Explorer = Callable[[str, Expr, Explore | WarmUp], None]
"""Trains a twin under an expression as a phase says: for its steps, at its learning rate."""


def sparse_factors(host: Host, name: str) -> dict[str, SparseFactor]:
    """The factors of a module whose entries a program may choose, by `<site>/<patch>`."""
    found: dict[str, SparseFactor] = {}
    for key, form in host.forms(name).items():
        parts = [part for part in form.modules() if isinstance(part, SparseFactor)]
        if parts and not (len(parts) == 1 and getattr(form, "factor", None) is parts[0]):
            raise TrainingError(f"{key}: a program chooses entries of the base's own tensors, and here a sparse factor is a part of another form")
        if parts:
            found[key] = parts[0]
    return found


def replaced(expression: Expr, old: str, new: str) -> Expr:
    """An expression with another module in the place of one."""
    if isinstance(expression, Ref):
        return Ref(new) if expression.name == old else expression
    parts = getattr(expression, "parts", ())
    return replace(expression, parts=tuple(replaced(part, old, new) for part in parts)) if parts else expression  # type: ignore[type-var]


def choose(
    host: Host, name: str, task: Task, features: Sequence[Features], expression: Expr, seed: int, explore: Explorer
) -> dict[str, int]:
    """Run the program of a module's method.

    Returns:
        Number of entries chosen, by phase; empty for a method without a program.
    """
    chosen: dict[str, int] = {}
    stand_in = name
    with ExitStack() as until_the_end:
        for phase in host.method(name).policy.program:
            if isinstance(phase, WarmUp):
                stand_in = until_the_end.enter_context(_others(host, name))
                explore(stand_in, replaced(expression, name, stand_in), phase)
                continue
            factors, spent = sparse_factors(host, name), 0
            with _twin(host, name, whole=isinstance(phase, Explore)) as twin:
                if isinstance(phase, Probe):
                    here = replaced(expression, name, stand_in)
                    scores = squares(host, twin, stand_in, task, features, Seq((here, Ref(twin))), phase, seed)
                    spent = _head_size(host, name) if phase.head_counts else 0
                elif isinstance(phase, Explore):
                    explore(twin, replaced(expression, name, twin), phase)
                    scores = {key: value.abs() for key, value in _dense(host, twin).items()}
                else:
                    raise TrainingError(f"no way to carry out the phase {phase!r}")
                apply(factors, {key: scores[key].detach().cpu() for key in factors}, spent)
            chosen[type(phase).__name__.lower()] = sum(len(factor.index) for factor in factors.values())
    return chosen


def _head_size(host: Host, name: str) -> int:
    """Parameters of a module's head."""
    return sum(parameter.numel() for parameter in host.tagged(name).get("head", {}).values())


def apply(factors: dict[str, SparseFactor], scores: dict[str, Tensor], spent: int = 0) -> None:
    """Choose as many entries as there are now: the best of all factors of scope `all` together, of the others each its own.

    Args:
        spent: entries of those of scope `all` that something else takes.
    """
    together = {key: scores[key] for key, factor in factors.items() if factor.spec.scope == "all"}
    if together:
        count = sum(len(factors[key].index) for key in together)
        if count <= spent:
            raise TrainingError(f"a head of {spent:,} parameters leaves none of the {count:,} entries that may be trained; raise density")
        for key, index in best(together, count - spent).items():
            factors[key].choose(index)
    for key, factor in factors.items():
        if key not in together:
            factor.choose(best({key: scores[key]}, len(factor.index))[key])


def _others(host: Host, name: str) -> AbstractContextManager[str]:
    """A module of everything but the sparse patches of one."""
    method, sparse = host.method(name), _sparse_patches(host, name)
    patches = tuple(patch for patch in method.patches if patch.name not in sparse)
    return _beside(host, f"{name}-warm", Method(f"{method.name}_warmed", patches, replace(method.policy, program=()), method.source))


def _twin(host: Host, name: str, *, whole: bool) -> AbstractContextManager[str]:
    """A module with a dense change wherever one has a sparse one.

    Args:
        whole: it stands for the module itself and brings its head, its other patches and its policy.
    """
    method, sparse = host.method(name), _sparse_patches(host, name)
    patches = tuple(replace(p, form=Matrix(Dense())) if p.name in sparse else p for p in method.patches if whole or p.name in sparse)
    policy = replace(method.policy, program=()) if whole else Policy()
    return _beside(host, f"{name}-twin", Method(f"{method.name}_explored", patches, policy, method.source))


def _sparse_patches(host: Host, name: str) -> set[str]:
    return {key.split("/", 1)[1] for key in sparse_factors(host, name)}


@contextmanager
def _beside(host: Host, name: str, method: Method) -> Iterator[str]:
    """A module for the time of a phase."""
    host.add(name, method)
    try:
        yield name
    finally:
        host.remove(name)


def _dense(host: Host, twin: str) -> dict[str, Tensor]:
    """The dense change of a twin by `<site>/<patch>`."""
    factors = {key: getattr(form, "factor", None) for key, form in host.forms(twin).items()}
    return {key: factor.value for key, factor in factors.items() if isinstance(factor, DenseFactor)}


def squares(
    host: Host, twin: str, head: str, task: Task, features: Sequence[Features], expression: Expr, phase: Probe, seed: int
) -> dict[str, Tensor]:
    """Mean over examples (or batches) of the squared gradient of every entry: the empirical Fisher information's diagonal."""
    order = steps([0] * len(features), min(phase.rows, len(features)), seed, -2, grouped=False)[0]
    values = _dense(host, twin)
    total = {key: torch.zeros_like(value, requires_grad=False) for key, value in values.items()}
    size = 1 if phase.by == "example" else phase.batch_size
    device = host.model.device
    answering = head if task.head is not None else None
    count = 0
    with evaluating(host.model):
        for batch in evaluation_batches(task, [features[i] for i in order], size):
            with torch.enable_grad(), host.using(expression, head=answering, **context_of(task, batch)) as model:
                here = moved(batch, device)
                outputs = model(**{key: here[key] for key in task.keys if key in here})
                loss, terms = task.loss(outputs, here)
                gradients = torch.autograd.grad(loss / max(int(terms), 1), list(values.values()), allow_unused=True)
            for key, gradient in zip(values, gradients):
                if gradient is not None:
                    total[key].addcmul_(gradient, gradient)
            count += 1
    return {key: value / max(count, 1) for key, value in total.items()}
