"""The text form of expressions: parsed by hand, never evaluated.

    sum     = product { ("+" | "-") product }              lowest but ">>"
    chain   = sum { ">>" sum }                             `a + b >> c` is `(a + b) >> c`, as in Python
    product = [ "-" ] ( number "*" atom | atom [ "*" number ] | atom [ "/" number ] )
    atom    = name | quoted name | "(" chain ")" | "base" | call
    call    = "average" "(" chain { "," chain } ")" | "phi" "(" chain ")"
            | "fuse" "(" chain { "," chain } ";" "router" "=" name { "," option } ")"       also written `route`
    option  = "top" "=" number | "space" "=" ( "out" | "phi" )
    name    = letters, digits and _ . @ : / -              minus and slash need blanks: `a - b`, `a / 4`
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from intarsia.compose.expr import Expr, Mix, Ref, Seq, average, fuse, phi
from intarsia.errors import CompositionError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)(?![\w@:/])|(?P<name>[A-Za-z_0-9](?:[\w.@:/-]*[\w@:/])?)"
    r"|\"(?P<double>[^\"]+)\"|'(?P<single>[^']+)'|(?P<sign>>>|[-+*/(),;=]))",
)
_PLAIN = re.compile(r"[A-Za-z_](?:[\w.@:/-]*[\w@:/])?\Z", re.ASCII)
_FUNCTIONS = ("average", "fuse", "route", "phi")
_OPTIONS = ("router", "top", "space")
LIMIT = 20_000
DEPTH = 50


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip())
    while position < end:
        found = _TOKEN.match(text, position)
        if not found or found.lastgroup is None:
            raise CompositionError(f"expression {text!r}: unexpected {text[position:].strip()[0]!r} at column {position + 1}")
        kind = {"double": "quoted", "single": "quoted"}.get(found.lastgroup, found.lastgroup)
        yield _Token(kind, found.group(found.lastgroup), found.start(found.lastgroup))
        position = found.end()
    yield _Token("end", "", end)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.at = 0
        self.depth = 0

    @property
    def now(self) -> _Token:
        return self.tokens[self.at]

    def fail(self, expected: str) -> CompositionError:
        found = f"{self.now.text!r} at column {self.now.position + 1}" if self.now.kind != "end" else "the end"
        return CompositionError(f"expression {self.text!r}: expected {expected}, found {found}")

    def take(self, *signs: str) -> str | None:
        if self.now.kind == "sign" and self.now.text in signs:
            self.at += 1
            return self.tokens[self.at - 1].text
        return None

    def chain(self) -> Expr:
        self.depth += 1
        if self.depth > DEPTH:
            raise CompositionError(f"expression is nested deeper than {DEPTH}")
        first = self.sum()
        while self.take(">>"):
            first = first >> self.sum()
        self.depth -= 1
        return first

    def sum(self) -> Expr:
        total = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            total = total + term if sign == "+" else total - term
        return total

    def number(self) -> float:
        if self.now.kind != "number":
            raise self.fail("a number")
        self.at += 1
        return float(self.tokens[self.at - 1].text)

    def product(self) -> Expr:
        negative = bool(self.take("-"))
        if self.now.kind == "number":
            weight = self.number()
            if not self.take("*"):
                raise self.fail("'*' behind the weight")
            value: Expr = weight * self.atom()
        else:
            value = self.atom()
            if sign := self.take("*", "/"):
                factor = self.number()
                if sign == "/" and factor == 0:
                    raise CompositionError(f"expression {self.text!r}: division by zero")
                value = value * factor if sign == "*" else value / factor
        return -value if negative else value

    def atom(self) -> Expr:
        token = self.now
        if self.take("("):
            inner = self.chain()
            if not self.take(")"):
                raise self.fail("')'")
            return inner
        if token.kind == "quoted":
            self.at += 1
            return Ref(token.text)
        if token.kind != "name":
            raise self.fail("a module name or '('")
        self.at += 1
        if token.text in _FUNCTIONS and self.now.text == "(" and self.now.kind == "sign":
            return self.call(token.text)
        return Seq(()) if token.text == "base" else Ref(token.text)

    def call(self, function: str) -> Expr:
        self.take("(")
        members = [self.chain()]
        while self.take(","):
            members.append(self.chain())
        options = self.options() if function in ("fuse", "route") else {}
        if not self.take(")"):
            raise self.fail("')'")
        if function == "average":
            return average(*members)
        if function == "phi":
            if len(members) > 1:
                raise CompositionError(f"expression {self.text!r}: phi() has one sum inside, e.g. phi(0.5*a + 0.5*b)")
            return phi(members[0])
        if "router" not in options:
            raise CompositionError(f"expression {self.text!r}: {function}() names the module that gives the weights: {function}(a, b; router=NAME)")
        return fuse(*members, **options)

    def options(self) -> dict[str, Any]:
        """`; router=f, top=2`."""
        found: dict[str, Any] = {}
        if not self.take(";"):
            return found
        while True:
            key = self.now.text
            if self.now.kind != "name" or key not in _OPTIONS or key in found:
                raise self.fail(f"one of the options {', '.join(o for o in _OPTIONS if o not in found)}")
            self.at += 1
            if not self.take("="):
                raise self.fail("'='")
            found[key] = self.option(key)
            if not self.take(","):
                return found

    def option(self, key: str) -> str | int:
        if key == "top":
            value = self.number()
            if value != int(value):
                raise CompositionError(f"expression {self.text!r}: top= is a whole number, found {value}")
            return int(value)
        if self.now.kind not in ("name", "quoted"):
            raise self.fail("a name")
        self.at += 1
        return self.tokens[self.at - 1].text


def parse(text: str) -> Expr:
    """An expression from its text.

    Raises:
        CompositionError: with the column of the first thing that does not fit.
    """
    if len(text) > LIMIT:
        raise CompositionError(f"expression has {len(text)} characters, the limit is {LIMIT}")
    parser = _Parser(text)
    if parser.now.kind == "end":
        raise CompositionError("the expression is empty; write 'base' for the model without modules")
    result = parser.chain()
    if parser.now.kind != "end":
        raise parser.fail("an operator (>>, +, -) or the end")
    return result


def _name(name: str) -> str:
    if _PLAIN.match(name) and name != "base" and name not in _FUNCTIONS:
        return name
    if '"' not in name:
        return f'"{name}"'
    if "'" not in name:
        return f"'{name}'"
    raise CompositionError(f"module name {name!r} holds both kinds of quotes and has no text form; rename it")


def show(e: Expr, inside: bool = False) -> str:
    """The text of an expression; `parse(show(e))` equals `e`."""
    if isinstance(e, Ref):
        return _name(e.name)
    if isinstance(e, Seq):
        if not e.parts:
            return "base"
        text = " >> ".join(f"({show(p)})" if isinstance(p, Seq) and p.parts else show(p) for p in e.parts)
        return f"({text})" if inside and len(e.parts) > 1 else text
    if isinstance(e, Mix) and e.router is not None:
        top = "" if e.top is None else f", top={e.top}"
        space = "" if e.space == "out" else f", space={e.space}"
        return f"fuse({', '.join(show(p) for p in e.parts)}; router={_name(e.router)}{top}{space})"
    if isinstance(e, Mix) and not e.plain:
        return f"phi({show(Mix(e.parts, e.weights))})"
    if isinstance(e, Mix):
        pieces = []
        for i, (part, weight) in enumerate(zip(e.parts, e.weights)):
            sign = "-" if weight < 0 else "+"
            body = show(part, inside=True) if not (isinstance(part, Mix) and part.plain) else f"({show(part)})"
            plain = abs(weight) == 1 and (len(e.parts) > 1 or weight < 0)  # one member of weight 1 is a Mix all the same
            term = body if plain else f"{abs(weight)!r}*{body}"
            pieces.append((("-" if weight < 0 else "") if i == 0 else f" {sign} ") + term)
        text = "".join(pieces)
        return f"({text})" if inside else text
    raise CompositionError(f"{type(e).__name__} has no text form")
