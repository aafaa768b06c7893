"""What a method costs in lines, and that none has a computation of its own outside a form."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia.methods
from intarsia._codec import decode, encode
from intarsia.errors import SiteError
from intarsia.host import Host
from intarsia.methods import METHODS, build
from intarsia.patches import Delta, Form
from intarsia.patches.factors import Factor
from tests import zoo
from tests.host import kit

SOURCES = Path(inspect.getfile(intarsia.methods)).parent
PATCHES = SOURCES.parent / "patches"


def specifications(value: Any) -> Iterator[type]:
    """The classes of all specifications in a method: forms, factors, ops, rules, phases."""
    if is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in fields(value):
            yield from specifications(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from specifications(item)


def lines(part: Any) -> int:
    """Lines of source, blank ones and docstrings included."""
    return len(inspect.getsource(part).rstrip().splitlines())


def built_by(kind: type) -> set[type]:
    """The modules that a specification builds: what its `build` names of its own file."""
    home = inspect.getmodule(kind)
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(home))) if isinstance(node, ast.Name)}  # type: ignore[arg-type]
    text = inspect.getsource(kind)
    found = {value for name, value in vars(home).items() if name in names and inspect.isclass(value) and value.__module__ == kind.__module__ and name in text}
    return {value for value in found if issubclass(value, torch.nn.Module)}


def own_lines() -> dict[str, int]:
    """Lines of every row: its factory, and the classes of forms, factors and rules that no other row uses."""
    used = {name: set(specifications(row.build())) for name, row in METHODS.items()}
    counts = Counter(kind for kinds in used.values() for kind in kinds)
    found = {}
    for name, row in METHODS.items():
        alone = {kind for kind in used[name] if counts[kind] == 1}
        alone |= {module for kind in alone for module in built_by(kind)}
        found[name] = lines(row.factory) + sum(lines(kind) for kind in alone)
    return found


#: by their first appearance in the history, the last one last
LAST_TEN = ("fish", "lt_sft", "shira", "rosa", "s2ft", "supermask", "diff_pruning", "lottery", "spiel", "madx")


def test_rows_are_short() -> None:
    rows = {name: lines(row.factory) for name, row in METHODS.items()}
    assert max(rows.values()) < 60, rows
    assert statistics.median(rows[name] for name in LAST_TEN) < 20


def test_the_last_ten_methods_cost_little() -> None:
    """With the classes that only they use; docs/own-method.md says how many it was (59.5), some lines more break nothing."""
    found = own_lines()
    assert statistics.median(found[name] for name in LAST_TEN) < 70, {name: found[name] for name in LAST_TEN}
    assert statistics.median(found.values()) < 30


def trees(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.glob("*.py")):
        yield path.name, ast.parse(path.read_text("utf-8"))


def test_methods_have_no_forward() -> None:
    """In the room of methods nothing is a module or defines a forward, a hook or a call; methods are data."""
    for name, tree in trees(SOURCES):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.name not in ("forward", "__call__", "materialise") and "hook" not in node.name, f"{name}: {node.name}"
            if isinstance(node, ast.ClassDef):
                assert not {ast.unparse(base).split(".")[-1] for base in node.bases} & {"Module", "Form", "Factor"}, f"{name}: {node.name}"


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_whatever_a_method_computes_is_a_form_at_a_site(family: str) -> None:
    """What a built method consists of: deltas of one class, each a registered form and op, and shared parts of these."""
    known = registered_factors()
    for name in METHODS:
        host = Host(zoo.make(family)[0])
        try:
            host.add("m", kit.small(name, family))
        except SiteError:
            continue
        for _, deltas in host.deltas("m"):
            for delta in deltas:
                assert type(delta) is Delta and isinstance(delta.form, Form), (name, delta)
                assert list(inspect.signature(type(delta.form).forward).parameters)[1:3] == ["h", "seen"], (name, type(delta.form))
                assert {type(part) for part in delta.form.modules() if isinstance(part, Factor)} <= known, name


def registered_factors() -> set[type]:
    """Factor classes of the room of patches."""
    modules = [importlib.import_module(f"intarsia.patches.{path.stem}") for path in PATCHES.glob("[a-z]*.py")]
    return {value for module in modules for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Factor)}


def test_the_page_of_laws_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "methods-laws.md").read_text("utf-8")
    for line in text.splitlines():
        folder = root / "tests"
        for name in re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)`", line):
            folder = (root / name).parent if "/" in name else folder
            assert (folder / Path(name).name).exists() or list((root / "tests").rglob(Path(name).name)), name
    assert {f"T{n}" for n in range(1, 15)} | {f"A{n}" for n in range(1, 9)} <= set(re.findall(r"^\| ([TA]\d+) \|", text, re.MULTILINE))


def test_every_row_is_data() -> None:
    """A method is made of registered specifications and plain values alone: it is written into files."""
    for name in METHODS:
        method = build(name)
        assert decode(encode(method)) == method, name
