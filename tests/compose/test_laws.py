"""Laws of the algebra on numbers: a module is a function of h, as a Seq element; a Mix member sees the same h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.compose import BLOCKS, LOGITS, TENSORS, Algebra, Expr, Mix, Ref, Seq, average, names
from intarsia.compose.legality import Traits, check
from intarsia.errors import CompositionError
from tests.compose.test_text import weights


class Toy:
    """A site whose modules multiply: change = (factor - 1) * h, and `c` adds 3.  Nothing for other names."""

    algebra: Algebra = TENSORS

    def deltas(self, name: str) -> Sequence[Any]:
        return {"a": (lambda h: h,), "b": (lambda h: 0.5 * h, lambda h: h + 1), "c": (lambda h: 3.0,)}.get(name, ())

    def change(self, delta: Any, h: Any) -> Any:
        return delta(h)


leaves = st.sampled_from([Ref("a"), Ref("b"), Ref("c"), Ref("absent"), Seq(())])
exprs: st.SearchStrategy[Expr] = st.recursive(
    leaves,
    lambda x: st.one_of(
        st.tuples(x, x).map(lambda p: p[0] >> p[1]),
        st.tuples(weights, x, weights, x).map(lambda p: p[0] * p[1] + p[2] * p[3]),
    ),
    max_leaves=5,
)
values = st.floats(-5, 5)


def run(e: Expr, h: float) -> float:
    return e.run(h, Toy())


def close(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-6 * max(1.0, abs(x), abs(y))


@given(exprs, values)
def test_unit(e: Expr, h: float) -> None:
    assert run(Seq(()), h) == h
    assert close(run(Seq((Seq(()), e)), h), run(e, h)) and close(run(Seq((e, Seq(()))), h), run(e, h))


@given(exprs, exprs, exprs, values)
def test_sequences_associate(a: Expr, b: Expr, c: Expr, h: float) -> None:
    assert close(run(Seq((Seq((a, b)), c)), h), run(Seq((a, Seq((b, c)))), h))
    assert close(run(a >> b, h), run(b, run(a, h)))


@given(exprs, st.integers(1, 5), values)
def test_average_of_equals(e: Expr, n: int, h: float) -> None:
    assert close(run(average(*[e] * n), h), run(e, h))


@given(exprs, exprs, weights, weights, values)
def test_mixtures(a: Expr, b: Expr, v: float, w: float, h: float) -> None:
    mixed = run(Mix((a, b), (v, w)), h)
    assert close(mixed, h + v * (run(a, h) - h) + w * (run(b, h) - h)), "h + sum of w * change"
    assert close(mixed, run(Mix((b, a), (w, v)), h)), "order does not matter"
    assert close(run(Mix((a, b), (1.0, 0.0)), h), run(a, h)), "one-hot"
    assert close(run(a - a, h), h)
    assert close(run(v * (w * a), h), run((v * w) * a, h)), "nesting"


@given(exprs)
def test_names(e: Expr) -> None:
    assert names(e) == {r.name for r in e.refs()}


class Block:
    def __init__(self, length: int, value: float = 1.0) -> None:
        self.length, self.value = length, value

    def scaled(self, weight: float) -> Block:
        return Block(self.length, self.value * weight)

    def __add__(self, other: Block) -> Block:
        return Block(self.length, self.value + other.value)


class Blocks:
    algebra = BLOCKS

    def deltas(self, name: str) -> Sequence[Any]:
        return {"a": ((Block(3, 1.0),),), "b": ((Block(3, 5.0),),), "long": ((Block(4),),)}.get(name, ())

    def change(self, delta: Any, h: Any) -> Any:
        return delta


def test_blocks_concatenate_and_mix_only_at_equal_length() -> None:
    at = Blocks()
    assert [b.value for b in (Ref("a") >> Ref("b")).run((), at)] == [1.0, 5.0]
    assert [b.value for b in (0.25 * Ref("a") + 0.75 * Ref("b")).run((), at)] == [4.0]
    assert [b.value for b in (Ref("a") + Ref("absent")).run((), at)] == [1.0]
    for illegal in (0.5 * Ref("a") + 0.5 * Ref("long"), 0.5 * Ref("a") + 0.5 * Ref("absent")):
        with pytest.raises(CompositionError, match="equal length"):
            illegal.run((), at)


KNOWN = {
    "lang": Traits(),
    "ner": Traits(labels=("O", "B")),
    "ner2": Traits(labels=("O", "B")),
    "topic": Traits(labels=("x", "y")),
    "p3": Traits(blocks={"0.attn.mem": 3}),
    "p4": Traits(blocks={"0.attn.mem": 4}),
}


@pytest.mark.parametrize("text", ["lang >> ner", "0.5*ner + 0.5*ner2", "lang >> (ner + ner2)", "p3 >> p4", "p3 + lang", "base", "2*ner"])
def test_legal(text: str) -> None:
    from intarsia.compose import parse

    check(parse(text), KNOWN)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nre", "no module 'nre' on this host; did you mean 'ner'"),
        ("ner >> topic", "two modules of this expression have a head"),
        ("0.5*ner + 0.5*topic", "labels differ"),
        ("ner - ner2", "sum to zero"),
        ("0.5*p3 + 0.5*p4", "equal length"),
        ("0.5*p3 + 0.5*lang", "equal length"),
    ],
)
def test_illegal_before_anything_runs(text: str, complaint: str) -> None:
    from intarsia.compose import parse

    with pytest.raises(CompositionError, match=complaint):
        check(parse(text), KNOWN)


def test_a_named_head_answers() -> None:
    check(Ref("ner") >> Ref("topic"), KNOWN, head="topic")
    with pytest.raises(CompositionError, match="not a module with a head"):
        check(Ref("ner") >> Ref("topic"), KNOWN, head="lang")


def test_logits_are_averaged_with_normalised_weights() -> None:
    class Heads:
        algebra = LOGITS

        def deltas(self, name: str) -> Sequence[Any]:
            return {"a": (2.0,), "b": (6.0,)}.get(name, ())

        def change(self, delta: Any, h: Any) -> Any:
            return delta

    assert (3 * Ref("a") + 1 * Ref("b")).run(None, Heads()) == 3.0
    assert (0.1 * Ref("a")).run(None, Heads()) == 2.0, "a lone head is not scaled"
