"""The pure explanation: order per site keeps the value, laws that are promised hold on numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given

from intarsia.compose import Expr, Ref, parse
from intarsia.compose.explain import Carried, Nature, Place, Step, explain, laws, restrict
from tests.compose.test_laws import Toy, close, exprs, values


def step(nature: Nature = "adds", size: int = 1) -> Step:
    return Step("p", "add", "Form", nature, size, size)


@given(exprs, values)
def test_leaving_out_what_is_absent_changes_nothing(e: Expr, h: float) -> None:
    here = restrict(e, {"a": 1, "b": 1, "c": 1})
    assert here is None or "absent" not in {ref.name for ref in here.refs()}
    assert close(e.run(h, Toy()), h if here is None else here.run(h, Toy()))
    assert [r.name for r in e.refs() if r.name != "absent"] == [] if here is None else [r.name for r in here.refs()]


MADE: dict[Nature, tuple[Callable[[float], float], ...]] = {
    "adds": (lambda h: 2.0, lambda h: 3.0), "scales": (lambda h: h, lambda h: 2 * h), "other": (lambda h: h * h, lambda h: 1 - h * h)
}  # fmt: skip


class Numbers(Toy):
    """Modules that add 2, add 3, double, triple, and square."""

    def __init__(self, kinds: dict[str, tuple[Nature, int]]) -> None:
        self.kinds = kinds

    def deltas(self, name: str) -> Sequence[Any]:
        nature, number = self.kinds[name]
        return (MADE[nature][number],)


@pytest.mark.parametrize(("one", "two"), list(product(("adds", "scales", "other"), repeat=2)))
def test_commuting_is_promised_exactly_where_it_holds(one: Nature, two: Nature) -> None:
    at = Numbers({"a": (one, 0), "b": (two, 1)})
    same = all(close((Ref("a") >> Ref("b")).run(h, at), (Ref("b") >> Ref("a")).run(h, at)) for h in (-1.5, 0.5, 2.0))
    assert laws(Place("s", "out"), {"a": (step(one),), "b": (step(two),)})["commute"].holds == same


@pytest.mark.parametrize("port", ["out", "in", "weight", "mem", "seq", "logits"])
def test_laws_by_port(port: str) -> None:
    two = laws(Place("s", port, rows="once for all"), {"a": (step(),), "b": (step(),)})
    assert two["commute"].holds == (port in ("out", "in", "weight"))
    assert two["associate"].holds == (port != "logits")
    assert not two["rows"].holds and two["rows"].reason == "once for all"
    one = laws(Place("s", port), {"a": (step("other"),)})
    assert all(law.holds and law.reason for law in one.values())


def test_sites_orders_sizes_and_heads() -> None:
    places = [Place("0.q", "out"), Place("1.q", "out"), Place("logits", "logits")]
    carried = {
        "a": Carried({"0.q": (step(size=3),), "1.q": (step(size=4),)}, 2, 7, 7),
        "b": Carried({"1.q": (step(size=5),), "logits": (step(size=6),)}, 2, 11, 11),
        "c": Carried({"0.q": (step(),)}, 1, 1, 1),
    }
    found = explain(parse("a >> 0.5*(b >> a)"), carried, places, folds="no", refusal="never")
    assert [(s.site, s.order, s.trainable, s.stored) for s in found.sites] == [
        ("0.q", "a >> 0.5*a", 3, 3), ("1.q", "a >> 0.5*(b >> a)", 9, 9), ("logits", "0.5*b", 6, 6)
    ]  # fmt: skip
    assert [name for name, _ in found.sites[1].steps] == ["a", "b", "a"]
    assert (found.unused, found.heads, found.forwards, found.folds, found.refusal) == (("c",), ("b",), 1, "no", "never")
    headed = explain(parse("a >> b"), carried, places, head="a")
    assert [s.site for s in headed.sites] == ["0.q", "1.q"]
    assert explain(parse("base"), carried, places).sites == ()
