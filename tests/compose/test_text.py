"""The text form round-trips, agrees with Python's operators and refuses what it cannot read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.compose import Expr, Mix, Ref, Seq, average, expr, parse, show
from intarsia.errors import CompositionError

names = st.one_of(
    st.sampled_from(["a", "swh", "ner-2", "de.v1", "x@1", "task:ner", "base2", "average", "base", "1st", "mit leer", "ʼn"]),
    st.text(min_size=1, max_size=8).filter(lambda s: not ('"' in s and "'" in s)),
)
weights = st.floats(-10, 10, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


def expressions() -> st.SearchStrategy[Expr]:
    leaf = names.map(Ref)

    def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(
            st.tuples(inner, inner).map(lambda p: p[0] >> p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
            st.tuples(weights, inner).map(lambda p: p[0] * p[1]),
            st.lists(inner, min_size=1, max_size=3).map(lambda m: average(*m)),
        )

    return st.recursive(leaf | st.just(Seq(())), grow, max_leaves=6)


@given(expressions())
def test_round_trip(e: Expr) -> None:
    assert parse(show(e)) == e


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("swh >> ner", Ref("swh") >> Ref("ner")),
        ("0.6*de + 0.4*nl", 0.6 * Ref("de") + 0.4 * Ref("nl")),
        ("a + b >> c", (Ref("a") + Ref("b")) >> Ref("c")),
        ("a - 2*b", Ref("a") - 2 * Ref("b")),
        ("(a >> b) / 4", (Ref("a") >> Ref("b")) / 4),
        ("-a", -Ref("a")),
        ("a-b", Ref("a-b")),
        ("'two words' >> \"x\"", Ref("two words") >> Ref("x")),
        ("average(a, b, c)", average("a", "b", "c")),
        ("base", Seq(())),
        ("a >> (b >> c)", Ref("a") >> Ref("b") >> Ref("c")),
        ("2*3dim", Mix((Ref("3dim"),), (2.0,))),
        ("1e-3*a", 1e-3 * Ref("a")),
    ],
)
def test_text_and_operators_agree(text: str, same: Expr) -> None:
    assert expr(text) == same


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("a >>", "expected a module name"),
        ("a b", "expected an operator"),
        ("0.5", "'*' behind the weight"),
        ("0.5 a", "'*' behind the weight"),
        ("(a", r"'\)'"),
        ("a ** b", "column 4"),
        ("a / 0", "division by zero"),
        ("a; b", "unexpected ';' at column 2"),
        ("average()", "expected a module name"),
        ("__import__('os').system('x')", "column"),
        ("(" * 100 + "a" + ")" * 100, "deeper"),
        ("a" * 30_000, "limit"),
    ],
)
def test_refusals_say_where(text: str, complaint: str) -> None:
    with pytest.raises(CompositionError, match=complaint):
        parse(text)


def test_weights_are_checked() -> None:
    with pytest.raises(CompositionError, match="2 members has 1 weights"):
        Mix((Ref("a"), Ref("b")), (1.0,))
    for weight in (float("nan"), float("inf")):
        with pytest.raises(CompositionError, match="not a number"):
            weight * Ref("a")
    with pytest.raises(CompositionError, match="expected an expression"):
        expr(3)  # type: ignore[arg-type]
