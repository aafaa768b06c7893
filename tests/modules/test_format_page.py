"""The specification page says what the code does: its own verifier runs, its limits and lists are the code's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from intarsia.modules import DTYPES, coding, container, file, save
from tests.modules.make import module, one_of_each, sparse

PAGE = (Path(__file__).parents[2] / "docs" / "module-format.md").read_text("utf-8")


def verifier() -> Any:
    code = PAGE.split("## Checking a file without intarsia", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(code, names)  # the page's own text
    return names["verify"]


def test_the_pages_verifier_agrees(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for made in (module(), module(tensors=one_of_each(), labels=None), module(tensors={}), module(tensors=sparse())):
        for dtype in (None, "bf16", "int8"):
            digest = save(made, path, dtype=dtype)  # type: ignore[arg-type]
            assert verifier()(path) == digest


def test_the_pages_verifier_sees_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(module(), path)
    data = path.read_bytes()
    for position in (9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises((AssertionError, ValueError, KeyError)):
            verifier()(path)


def test_numbers_and_lists() -> None:
    assert f"at most {container.MAX_HEADER:,}" in PAGE
    assert f"at most {container.MAX_TENSORS:,} tensors, at most {container.MAX_DIMENSIONS} dimensions" in PAGE
    assert f"JSON elements ({container.MAX_STRUCTURE:,})" in PAGE
    assert " ".join(DTYPES) in PAGE
    table = PAGE.split("## Metadata", 1)[1].split("### Coded", 1)[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, re.M)) == file._KEYS | {"coding"}
    codes = PAGE.split("### Coded tensors", 1)[1].split("### Specification", 1)[0]
    assert set(re.findall(r"^\| `([a-z0-9]+)` \|", codes, re.M)) == set(coding.CODES)
    assert f"first release of intarsia that reads this version (`{file.NEEDS}`)" in PAGE
