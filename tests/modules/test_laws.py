"""Property laws of arithmetic over every additive method, and examples of merging worked out by hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import UsageError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Module
from intarsia.modules.arithmetic import add, analogy, average, negate, scale, subtract, weighted_sum
from intarsia.modules.informed import fisher, regmean
from intarsia.modules.merging import aligned, dare, dense, magnitude, sparse_union, svd, ties
from tests import zoo
from tests.host.kit import disturb, small
from tests.modules.test_arithmetic import ADDITIVE, same

#: methods whose change follows from more than the tensors, which `dense` refuses
SEEDED = ("fourierft", "svft", "lora_xs", "lora_fa", "miss", "c3a")


@lru_cache
def three(method: str) -> tuple[Host, dict[str, Tensor], tuple[Module, Module, Module]]:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, name in enumerate("abc"):
        host.add(name, small(method, "bert"), seed=seed)
        disturb(host, name, seed)
    a, b, c = (host.extract(name, flatten=host.method(name).policy.flatten) for name in "abc")
    return host, inputs, (a, b, c)


def close(one: Module, other: Module) -> None:
    """Equal changes, within 1e-6 of the largest; the change itself is compared where it can be written down."""
    left, right = aligned([one, other])
    assert left.keys() == right.keys()
    for place, (_, value) in left.items():
        bound = 1e-6 * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        torch.testing.assert_close(value, right[place][1], atol=bound, rtol=0)


WEIGHT = st.floats(-4, 4, allow_nan=False)


@pytest.mark.parametrize("method", [m for m in ADDITIVE if m not in SEEDED])
def test_laws(method: str) -> None:
    _, _, (a, b, c) = three(method)

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(WEIGHT, WEIGHT)
    def laws(v: float, w: float) -> None:
        close(add(a, b), add(b, a))
        close(add(add(a, b), c), add(a, add(b, c)))
        close(weighted_sum([a, b], [v, w]), weighted_sum([b, a], [w, v]))
        close(scale(scale(a, v), w), scale(a, v * w))
        close(scale(add(a, b), v), weighted_sum([a, b], [v, v]))
        close(add(scale(a, v), scale(a, w)), scale(a, v + w))

    laws()
    close(scale(a, 1.0), a)
    close(analogy(a, b, c), add(c, subtract(b, a)))
    close(negate(a), scale(a, -1.0))
    assert all(not value.any() for _, value in aligned([subtract(a, a)])[0].values()), "a - a is the base exactly"


@pytest.mark.parametrize("method", SEEDED)
def test_laws_where_the_change_needs_the_model(method: str) -> None:
    """By what the model answers: in any order, grouped in any way."""
    host, inputs, (a, b, c) = three(method)
    equal = [(add(a, b), add(b, a)), (add(add(a, b), c), add(a, add(b, c))), (scale(add(a, b), 0.5), weighted_sum([a, b], [0.5, 0.5]))]
    for one, other in equal:
        host.insert(other, name="other")
        try:
            same(host, inputs, one, "other", 1e-6)
        finally:
            host.remove("other")


@pytest.mark.parametrize("method", ADDITIVE)
def test_analogy_is_the_expression(method: str) -> None:
    host, inputs, (a, b, c) = three(method)
    same(host, inputs, analogy(a, b, c), "c + b - a")
    same(host, inputs, analogy(a, a, c), "c", 1e-5)
    same(host, inputs, analogy(a, b, a), "b", 1e-5)


@pytest.mark.parametrize("method", ADDITIVE)
def test_a_wrong_number_of_weights_is_refused(method: str) -> None:
    _, _, (a, b, _) = three(method)
    for weights in ([], [1.0], [1.0, 1.0, 1.0]):
        for merge in (weighted_sum, average):
            with pytest.raises(UsageError, match=f"2 modules and {len(weights)} weights"):
                merge([a, b], weights)


OPERATIONS: dict[str, Any] = {
    "add": lambda a, b: add(a, b, name="a"), "subtract": lambda a, b: subtract(a, b, name="b"), "scale": lambda a, b: scale(a, 2.0, name="a"),
    "negate": lambda a, b: negate(a, name="a"), "analogy": lambda a, b: analogy(a, b, a, name="b"), "average": lambda a, b: average([a, b], name="a"),
    "ties": lambda a, b: ties([a, b], name="b"), "dare": lambda a, b: dare(a, 0.5, name="a"), "magnitude": lambda a, b: magnitude(a, 0.5, name="a"),
    "union": lambda a, b: sparse_union([a, b], name="a"), "svd": lambda a, b: svd(a, 1, name="a"),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_result_is_never_called_like_a_module_it_is_made_of(operation: str) -> None:
    _, _, (a, b, _) = three("lora")
    with pytest.raises(UsageError, match="cannot be called"):
        OPERATIONS[operation](a, b)


# --- merging by hand ----------------------------------------------------------------------------------------------------


def written(*rows: list[float]) -> list[Module]:
    """Modules that change one layer norm's vector by these values."""
    model, _ = zoo.make("bert")
    host = Host(model)
    made = []
    for i, row in enumerate(rows):
        name = "mnopq"[i]
        module = host.add(name, build("ln")).extract(name)
        tensors = {k: torch.zeros_like(t) for k, t in module.tensors.items()}
        key = sorted(tensors)[0]
        flat = tensors[key].flatten()
        flat[: len(row)] = torch.tensor(row)
        made.append(Module(name, module.method, {**tensors, key: flat.view_as(tensors[key])}, module.base))
    return made


def entries(module: Module, count: int) -> list[float]:
    tensors = dense(module).tensors
    first = tensors[sorted(tensors)[0]].flatten()
    rest = [t for k, t in tensors.items() if k != sorted(tensors)[0]]
    assert not any(t.any() for t in rest) and not first[count:].any()
    return [round(value, 5) for value in first[:count].tolist()]


#        both agree | mass is with the second | two against one | one alone | they cancel
M = [2.0, 1.0, 1.0, 5.0, 3.0]
N = [4.0, -3.0, 1.0, 0.0, -3.0]
O = [6.0, 0.0, -4.0, 0.0, 0.0]  # noqa: E741


def test_ties_by_mass() -> None:
    assert entries(ties(written(M, N, O), 1.0), 5) == [4.0, -3.0, -4.0, 5.0, 0.0]


def test_ties_by_count() -> None:
    """(1, -3): one for each sign, no majority; (1, 1, -4): the two are more."""
    assert entries(ties(written(M, N, O), 1.0, elect="count"), 5) == [4.0, 0.0, 1.0, 5.0, 0.0]


def test_ties_trims_before_it_elects() -> None:
    """Of 10 entries the 3 largest stay: |5|, |3| and |2| of M."""
    size = dense(written(M)[0]).n_parameters
    keep = 3 / size
    assert entries(ties(written(M, N), keep), 5) == [3.0, -3.0, 0.0, 5.0, 0.0]  # N keeps 4, -3 and -3
    assert entries(ties(written(M, N), keep, weight=0.5), 5) == [1.5, -1.5, 0.0, 2.5, 0.0]


def test_ties_with_weights_of_peft_and_mergekit() -> None:
    modules, weights = written(M, N, O), [1.0, 2.0, 0.5]
    # peft: elected without weights, weights multiplied in, divided by how many agree
    assert entries(ties(modules, 1.0, weights=weights, variant="peft"), 5) == [round((2 + 8 + 3) / 3, 5), -6.0, -2.0, 5.0, 3.0]
    # mergekit: weights before the election (1 + 2 - 2 > 0; 3 - 6 < 0), divided by the weights of those that agree
    assert entries(ties(modules, 1.0, weights=weights, variant="mergekit"), 5) == [round(13 / 3.5, 5), -3.0, 1.0, 5.0, -3.0]


def test_ties_variants_agree_without_weights() -> None:
    """But for an undecided election (3, -3), which both peers take for the positive sign and the paper leaves out."""
    modules = written(M, N, O)
    paper = entries(ties(modules, 1.0), 5)
    peft = entries(ties(modules, 1.0, variant="peft"), 5)
    assert peft == entries(ties(modules, 1.0, variant="mergekit"), 5)
    assert (paper[:4], paper[4], peft[4]) == (peft[:4], 0.0, 3.0)
    with pytest.raises(UsageError, match="no weight for each module"):
        ties(modules, 1.0, weights=[1, 1, 1])
    with pytest.raises(UsageError, match="variant"):
        ties(modules, 1.0, variant="other")  # type: ignore[arg-type]
    for variant in ("peft", "mergekit"):
        with pytest.raises(UsageError, match="3 modules and 2 weights"):
            ties(modules, 1.0, weights=[1, 1], variant=variant)  # type: ignore[arg-type]


def test_sparse_union_is_the_mean_of_those_that_changed_something() -> None:
    assert entries(sparse_union(written(M, N, O)), 5) == [4.0, -1.0, round(-2 / 3, 5), 5.0, 0.0]
    apart = written([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0])
    assert entries(sparse_union(apart), 3) == [1.0, 2.0, 3.0], "nothing is divided where modules do not meet"
    assert entries(sparse_union(written(M)), 5) == M and entries(sparse_union(written(M, M)), 5) == M


@pytest.mark.parametrize("merge", [fisher, regmean])
def test_statistics_of_another_number_of_modules_are_refused(merge: Any) -> None:
    _, _, (a, b, _) = three("lora")
    with pytest.raises(UsageError):
        merge([a, b], [{}])
