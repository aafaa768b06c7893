"""`docs/faults.md`: every row of the tables of faults and laws is there, and the tests they name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (L?\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> dict[str, tuple[str, str, list[tuple[str, str]]]]:
    text = (ROOT / "docs" / "faults.md").read_text("utf-8")
    return {number: (fault, outcome, TEST.findall(tests)) for number, fault, outcome, tests in ROW.findall(text)}


def defined(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_its_row() -> None:
    found = ROW.findall((ROOT / "docs" / "faults.md").read_text("utf-8"))
    assert [row[0] for row in found] == [*map(str, range(1, 18)), *(f"L{number}" for number in range(1, 17))]


def test_every_row_names_tests_that_exist() -> None:
    for number, (fault, outcome, tests) in rows().items():
        assert fault.strip() and outcome.strip() and tests, f"row {number} names no test"
        for file, name in tests:
            assert (ROOT / file).is_file(), f"row {number}: {file} does not exist"
            assert name in defined(ROOT / file), f"row {number}: {file} has no {name}"


def test_every_test_named_is_read_and_exists() -> None:
    """In the second table too; a name that the pattern above does not match would go unchecked."""
    text = (ROOT / "docs" / "faults.md").read_text("utf-8")
    named = TEST.findall(text)
    assert text.count("::") == len(named) > sum(len(tests) for _, _, tests in rows().values())
    for file, name in set(named):
        assert name in defined(ROOT / file), f"{file} has no {name}"
