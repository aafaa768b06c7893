"""YAML keeps text as text, and refuses what is ambiguous."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import UsageError
from intarsia.train import strict_yaml


@pytest.mark.parametrize(
    "text",
    ["no", "No", "NO", "yes", "on", "off", "y", "n", "012", "0o17", "0x1F", "12:30", "1:30:00", "2026-11-25", ".inf", "-.inf", ".nan", "1_000",
     "nan", "NA", "None", "+", ".", "e5", "1e", "007", "+-1", "1.2.3", "NULL_", "null_"],
)  # fmt: skip
def test_text_stays_text(text: str) -> None:
    assert strict_yaml.loads(f"key: {text}") == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E3", 5e3), ("1.", 1.0), (".5", 0.5), ("-0.25e+2", -25.0), ("12", 12), ("-3", -3), ("+7", 7), ("0", 0), ("true", True),
     ("False", False), ("null", None), ("~", None), ("", None), ("1e999", "1e999"), ('"12"', "12"), ("'true'", "true"), ("99999999999999999999", "99999999999999999999")],
)  # fmt: skip
def test_numbers_are_numbers(text: str, value: object) -> None:
    found = strict_yaml.loads(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_keys_are_text() -> None:
    assert strict_yaml.loads("{no: 1, 12: 2, true: 3, 1e3: 4}") == {"no": 1, "12": 2, "true": 3, "1e3": 4}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", r"file:3:1: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}", r"file:1:11: the key 'b' stands twice"),
        ("a: !!python/object/apply:os.system [ls]", r"file:1:4: tags are not allowed"),
        ("a: !!str 12", r"tags are not allowed"),
        ("a: &x {b: 1}\nc: {<<: *x}", r"file:2:5: merge keys"),
        ("a: &x [*x]", r"nested more than"),
        ("? [1, 2]\n: 3", r"a key is a single word"),
        ("a: [1, 2", r"file:1:9"),
        ("a: 1\n---\nb: 2", r"document"),
        ("a:\n\t- b", r"file:2:1"),
        ("[" * 40 + "]" * 40, r"nested more than"),
        ("[" * 600 + "]" * 600, r"nested too deeply"),
        ("a: " + "x" * strict_yaml.MAX_BYTES, r"at most"),
    ],
)
def test_refused_with_line_and_column(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        strict_yaml.loads(text, "file")


def test_aliases_cannot_explode() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UsageError, match="aliases count at every place"):
        strict_yaml.loads("\n".join(lines))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcno\"':é,[]{}#&*! -0123", max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_json_is_read_as_what_it_is(value: object) -> None:
    """So a configuration saved as JSON comes back the same."""
    assert strict_yaml.loads(json.dumps(value, ensure_ascii=False)) == value


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**18), 10**18) | st.booleans())
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    found = strict_yaml.loads(yaml.safe_dump({"key": value}))["key"]
    assert found == value and type(found) is type(value) and not (isinstance(found, float) and math.isnan(found))
