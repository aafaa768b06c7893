"""Laws of the codec: what goes in comes out, one text per value, nothing unknown gets through."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia import _codec
from intarsia._codec import canonical_json, decode, encode, name_of, parse_json, plain, register
from intarsia.errors import SpecError


class Shape:
    """A base class that is not registered itself."""


@runtime_checkable
class Buildable(Protocol):
    def build(self) -> int: ...


@register("test.square")
@dataclass(frozen=True, slots=True)
class Square(Shape):
    side: int
    scale: float = 1.0
    act: Literal["relu", "gelu", 3] | None = None


@register("test.circle")
@dataclass(frozen=True)
class Circle(Shape):
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.radius is not None and self.radius < 0:
            raise SpecError(f"radius must not be negative, found {self.radius}")

    def build(self) -> int:
        return 1


@register("test.drawing")
@dataclass(frozen=True, slots=True)
class Drawing:
    name: str
    shapes: tuple[Shape, ...] = ()
    pair: tuple[int, str] = (0, "")
    first: Square | Circle | None = None
    built: Buildable | None = None
    filled: bool = False
    number: int | float | str = 0
    by_name: Mapping[str, Square] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)


texts = st.text(st.characters(codec="utf-8"), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
ints = st.integers(*_codec.INT_RANGE)
squares = st.builds(Square, ints, floats | st.integers(-(2**53), 2**53), st.sampled_from(["relu", "gelu", 3, None]))
circles = st.builds(Circle, st.none() | st.floats(0, 1e300))
plains = st.recursive(
    st.none() | st.booleans() | ints | floats | texts,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
drawings = st.builds(
    Drawing, texts, st.lists(squares | circles, max_size=3).map(tuple), st.tuples(ints, texts), st.none() | squares | circles, st.none() | circles,
    st.booleans(), ints | floats | texts, st.dictionaries(texts, squares, max_size=2), st.dictionaries(texts, plains, max_size=3),
)  # fmt: skip


@given(drawings)
def test_what_goes_in_comes_out(drawing: Drawing) -> None:
    text = canonical_json(drawing)
    back = decode(parse_json(text))
    assert back == drawing
    assert canonical_json(back) == text
    assert decode(json.loads(json.dumps(encode(drawing))), Drawing) == drawing


@given(drawings, drawings)
def test_one_text_per_value(a: Drawing, b: Drawing) -> None:
    """Equal text means equal values; the reverse holds but for 0.0 == -0.0 and 1 == 1.0 in untyped places."""
    if canonical_json(a) == canonical_json(b):
        assert a == b


@given(drawings)
def test_typed_numbers_have_one_form(drawing: Drawing) -> None:
    """An integer in a float field is written as the float it equals."""
    for square in drawing.by_name.values():
        same = dataclasses.replace(square, scale=float(square.scale))
        assert canonical_json(square) == canonical_json(same)


@given(st.dictionaries(texts, plains, max_size=6))
def test_order_of_keys_does_not_matter(data: dict[str, Any]) -> None:
    shuffled = dict(reversed(list(data.items())))
    assert canonical_json(data) == canonical_json(shuffled)


def test_same_text_in_other_processes() -> None:
    make = "Drawing('x', (Square(3), Circle(0.1)), notes={'b': 1, 'a': [2.5e-7]})"
    code = f"import sys; from tests.test_codec import *; sys.stdout.buffer.write(canonical_json({make}))"
    root = Path(__file__).parents[1]
    for seed in ("0", "1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, check=True)
        assert done.stdout == canonical_json(Drawing("x", (Square(3), Circle(0.1)), notes={"b": 1, "a": [2.5e-7]}))


def test_canonical_text_is_frozen() -> None:
    """The text below is part of the file format: digests depend on it."""
    drawing = Drawing("é\u2028", (Square(2**64 - 1, 1e-07),), first=Circle(5), notes={"b": [True, None], "a": -0.0})
    assert canonical_json(drawing) == (
        '{"first":{"radius":5.0,"type":"test.circle"},"name":"é\u2028","notes":{"a":-0.0,"b":[true,null]},'
        '"shapes":[{"scale":1e-07,"side":18446744073709551615,"type":"test.square"}],"type":"test.drawing"}'
    ).encode()


def test_added_field_with_default_changes_nothing() -> None:
    @dataclass(frozen=True)
    class Old:
        rank: int
        scale: float = 1.0

    @dataclass(frozen=True)
    class New:
        rank: int
        scale: float = 1.0
        extra: tuple[int, ...] = ()
        more: bool = False

    for cls in (Old, New):
        cls.__annotations__ = {k: eval(v) for k, v in cls.__annotations__.items()}  # local classes have no module to resolve in
    register("test.old")(Old)
    register("test.new")(New)
    old, new = encode(Old(4, 2)), encode(New(4, 2))
    assert {**old, "type": "test.new"} == new
    assert decode({**old, "type": "test.new"}) == New(4, 2)


DRAWING = encode(
    Drawing("d", (Square(8, 2.0, "relu"), Circle(1.5)), (1, "x"), Square(2), Circle(), True, 2, {"a": Square(1)}, {"lr": 0.1, "seeds": [1, 2]})
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["shapes"][0].update(side="eight"), "$.shapes[0].side: expected int, found str 'eight'"),
        (lambda d: d["shapes"][0].update(side=True), "$.shapes[0].side: expected int, found bool True"),
        (lambda d: d["shapes"][0].update(side=8.0), "$.shapes[0].side: expected int, found float 8.0"),
        (lambda d: d["shapes"][0].update(side=None), "$.shapes[0].side: expected int, found None"),
        (lambda d: d["shapes"][0].update(side=2**64), "$.shapes[0].side: the integer does not fit 64 bits"),
        (lambda d: d["shapes"][0].update(scale="2"), "$.shapes[0].scale: expected float, found str '2'"),
        (lambda d: d["shapes"][0].update(scale=True), "$.shapes[0].scale: expected float, found bool"),
        (lambda d: d["shapes"][0].update(scale=math.nan), "$.shapes[0].scale: nan is not a number"),
        (lambda d: d["shapes"][0].update(scale=math.inf), "$.shapes[0].scale: inf is not a number"),
        (lambda d: d["shapes"][0].update(scale=2**53 + 1), "$.shapes[0].scale: expected float, found an integer beyond"),
        (lambda d: d["shapes"][0].update(act="gelo"), "$.shapes[0].act: expected one of 'relu', 'gelu', 3 or None, found str 'gelo'"),
        (lambda d: d["shapes"][0].update(act=3.0), "$.shapes[0].act: expected"),
        (lambda d: d["shapes"][0].update(sid=8), "$.shapes[0]: 'test.square' has no field 'sid'; did you mean 'side'?"),
        (lambda d: d["shapes"][0].pop("side"), "$.shapes[0]: 'test.square' lacks the field 'side'"),
        (lambda d: d["shapes"][0].pop("type"), "$.shapes[0]: expected Shape; the key 'type' is missing"),
        (lambda d: d["shapes"][0].update(type=["x"]), "$.shapes[0]: expected Shape; the key 'type' is missing or not a string"),
        (lambda d: d["shapes"][0].update(type="test.squre"), "$.shapes[0]: unknown type 'test.squre'; did you mean 'test.square'?"),
        (lambda d: d["shapes"][0].update(type="os.system"), "$.shapes[0]: unknown type 'os.system'"),
        (lambda d: d["shapes"][0].update(type="test.drawing"), "$.shapes[0]: expected Shape, found type 'test.drawing'"),
        (lambda d: d["shapes"].append(7), "$.shapes[2]: expected Shape, found int 7"),
        (lambda d: d.update(shapes="ab"), "$.shapes: expected a tuple of Shape, found str 'ab'"),
        (lambda d: d.update(shapes={"0": 1}), "$.shapes: expected a tuple of Shape, found dict with 1 keys"),
        (lambda d: d["shapes"][1].update(radius=-1.0), "$.shapes[1]: 'test.circle': radius must not be negative"),
        (lambda d: d.update(pair=[1]), "$.pair: expected 2 values, found 1"),
        (lambda d: d.update(pair=["x", 1]), "$.pair[0]: expected int, found str"),
        (lambda d: d["first"].update(type="test.drawing"), "$.first: expected {'type': 'test.square', ...} or {'type': 'test.circle', ...}"),
        (lambda d: d.update(first=1), "$.first: expected {'type': 'test.square', ...} or {'type': 'test.circle', ...} or None, found int 1"),
        (lambda d: d["built"].update(type="test.square"), "$.built: expected Buildable"),
        (lambda d: d.update(filled=1), "$.filled: expected bool, found int 1"),
        (lambda d: d.update(number=None), "$.number: expected int or float or str, found None"),
        (lambda d: d["by_name"]["a"].update(side=[]), "$.by_name.a.side: expected int, found list of 0"),
        (lambda d: d.update(by_name=[["a", 1]]), "$.by_name: expected Mapping[str"),
        (lambda d: d["notes"].update({"b c": {"x": math.inf}}), "$.notes['b c'].x: inf is not"),
        (lambda d: d["notes"].update({"x": {1: 2}}), "$.notes.x: keys are strings, found int 1"),
        (lambda d: d["notes"].update({"x": {3}}), "$.notes.x: expected a plain value"),
        (lambda d: d.update(name="\ud800"), "$.name: the string is not valid Unicode"),
        (lambda d: d.update(name="x" * (_codec.MAX_STRING + 1)), "$.name: a string of 1,000,001 characters"),
        (lambda d: d.update(type="test.square"), "$: expected {'type': 'test.drawing', ...}, found type 'test.square'"),
        (lambda d: d.clear(), "$: expected {'type': 'test.drawing', ...}; the key 'type' is missing"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: Any, expected: str) -> None:
    data = copy.deepcopy(DRAWING)
    assert decode(data, Drawing)
    change(data)
    with pytest.raises(SpecError) as caught:
        decode(data, Drawing)
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 600


@given(drawings, st.data())
@settings(max_examples=200)
def test_random_damage_raises_nothing_but_spec_error(drawing: Drawing, data: st.DataObject) -> None:
    """Put an arbitrary plain value somewhere: the result decodes to something that encodes again, or SpecError."""
    tree: Any = json.loads(canonical_json(drawing))
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = json.loads(json.dumps(data.draw(plains)))
        break
    try:
        back = decode(tree, Drawing)
    except SpecError as error:
        assert str(error).startswith("$")
    else:
        assert decode(parse_json(canonical_json(back)), Drawing) == back


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Drawing("x", [Square(1)]), "$.shapes: expected a tuple of Shape, found list of 1"),  # type: ignore[arg-type]
        (Drawing("x", (Square(1.0),)), "$.shapes[0].side: expected int, found float 1.0"),  # type: ignore[arg-type]
        (Drawing("x", (Shape(),)), "$.shapes[0]: tests.test_codec.Shape cannot be stored: it has no registered name"),
        (Drawing("x", notes={"f": Square(1)}), "$.notes.f: expected a plain value"),
        (Drawing("x", number=math.nan), "$.number: nan is not"),
        (Shape(), "$: tests.test_codec.Shape cannot be stored"),
    ],
)
def test_what_cannot_be_read_is_not_written(value: object, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        encode(value)
    assert str(caught.value).startswith(expected)


def test_subclasses_do_not_inherit_a_name() -> None:
    class Sub(Circle):
        pass

    with pytest.raises(SpecError, match="cannot be stored"):
        encode(Sub())


def test_depth_and_size_are_bounded() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SpecError, match="nested more than 32 levels"):
        plain(deep)
    with pytest.raises(SpecError, match="nested more than 32 levels"):
        decode({"type": "test.drawing", "name": "x", "notes": {"a": deep}})
    while isinstance(deep, list):  # take it apart: its destructor would recurse
        deep = deep[0]
    with pytest.raises(SpecError, match="more than 200,000 values"):
        plain([0] * 200_001)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"a":1,"a":2}', "key 'a' stands twice"),
        (b'{"x":{"a":1,"b":2,"a":1}}', "key 'a' stands twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "1e999 is not a number"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1,]", "Expecting value|Illegal trailing comma"),
        (b"", "Expecting value"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (b"\xef\xbb\xbf{}", "BOM|Expecting value"),
    ],
)
def test_json_is_strict(text: bytes, expected: str) -> None:
    with pytest.raises(SpecError, match=expected) as caught:
        parse_json(text, "the card")
    assert str(caught.value).startswith("the card: ")


def test_registration_refuses_what_could_not_be_stored() -> None:
    frozen = dataclass(frozen=True)
    with pytest.raises(SpecError, match="already registered"):
        register("test.square")(frozen(type("Other", (), {})))
    with pytest.raises(SpecError, match=r"already 'test\.square'"):
        register("test.square2")(Square)
    with pytest.raises(SpecError, match="not a frozen dataclass"):
        register("test.mutable")(dataclass(type("Mutable", (), {})))
    with pytest.raises(SpecError, match="reserved"):
        register("test.typed")(frozen(type("Typed", (), {"__annotations__": {"type": int}})))
    with pytest.raises(SpecError, match="lower case"):
        register("Test Name")(frozen(type("Named", (), {})))
    assert name_of(Square) == name_of(Square(1)) == "test.square"


@pytest.mark.parametrize("hint", [set, list[int], bytes, complex | None, Mapping[int, str]])
def test_a_hint_the_codec_does_not_know_is_an_error_of_its_author(hint: Any) -> None:
    cls = dataclass(frozen=True)(type("Odd", (), {"__annotations__": {"x": hint}}))
    register(f"test.odd-{abs(hash(str(hint)))}")(cls)
    with pytest.raises(SpecError):
        encode(cls({1: "a"}))


def test_third_parties_register_by_entry_point(tmp_path: Any) -> None:
    """A package installed beside this one is imported when a file names what it registers, and not before."""
    (tmp_path / "thirdparty.py").write_text(
        "from dataclasses import dataclass\nfrom intarsia._codec import register\n"
        "@register('third.party')\n@dataclass(frozen=True)\nclass Third:\n    x: int = 1\n"
    )
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[intarsia.spec]\nthird.party = thirdparty:Third\n")
    code = (
        "import sys; from intarsia._codec import decode, encode; assert 'thirdparty' not in sys.modules;"
        "obj = decode({'type': 'third.party', 'x': 2}); assert obj.x == 2; print(encode(obj)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.strip() == "{'type': 'third.party', 'x': 2}", done.stderr
