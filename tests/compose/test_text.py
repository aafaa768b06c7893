"""The text form round-trips, agrees with Python's operators and refuses what it cannot read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.compose import Expr, Mix, Ref, Seq, average, expr, fuse, parse, phi, show
from intarsia.errors import CompositionError

words = st.one_of(
    st.sampled_from(["a", "swh", "ner-2", "de.v1", "x@1", "task:ner", "base2", "average", "base", "1st", "mit leer", "ʼn"]),
    st.text(min_size=1, max_size=8).filter(lambda s: not ('"' in s and "'" in s)),
)
weights = st.floats(-10, 10, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


def routed(drawn: tuple[list[Expr], str, int | None, Any]) -> Expr:
    members, router, top, space = drawn
    name = f"router of {router}"
    while any(ref.name == name for member in members for ref in member.refs()):  # a mixture inside may have drawn the same
        name += "+"
    return fuse(*members, router=name, top=top, space=space)


def expressions() -> st.SearchStrategy[Expr]:
    leaf = words.map(Ref)

    def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(
            st.tuples(inner, inner).map(lambda p: p[0] >> p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
            st.tuples(weights, inner).map(lambda p: p[0] * p[1]),
            st.lists(inner, min_size=1, max_size=3).map(lambda m: average(*m)),
            inner.map(phi),
            st.tuples(st.lists(inner, min_size=1, max_size=3), words, st.sampled_from((None, 1)), st.sampled_from(("out", "phi"))).map(routed),
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
        ("fuse(a, b >> c; router=f)", Mix((Ref("a"), Ref("b") >> Ref("c")), router="f")),
        ("route(a, b; router='f g', top=1)", Mix((Ref("a"), Ref("b")), router="f g", top=1)),
        ("0.5 * fuse(a, b; router=f, space=phi) >> c", 0.5 * Mix((Ref("a"), Ref("b")), router="f", space="phi") >> Ref("c")),
        ("phi(0.5*a + 0.5*b)", Mix((Ref("a"), Ref("b")), (0.5, 0.5), None, "phi")),
        ("fuse >> phi", Ref("fuse") >> Ref("phi")),
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
        ("a; b", "found ';' at column 2"),
        ("a & b", "unexpected '&' at column"),
        ("fuse(a, b)", "names the module that gives the weights"),
        ("fuse(a; router=f, router=g)", "one of the options top, space"),
        ("fuse(a; by=f)", "one of the options router, top, space"),
        ("fuse(a, b; router=f, top=1.5)", "whole number"),
        ("fuse(a, b; router=f, top=3)", "top=3 of 2 members"),
        ("fuse(a, b; router=f, space=inner)", "out or phi"),
        ("fuse(a, f; router=f)", "both|and a member"),
        ("phi(a, b)", "one sum inside"),
        ("average(a; router=f)", r"'\)'"),
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
