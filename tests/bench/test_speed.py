"""The comparison refuses unequal answers, and its page says what was met."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.bench.speed import CASES, Case, Pair, measure
from intarsia.bench.speed.page import newest, write
from intarsia.bench.speed.pairs import apart
from intarsia.errors import TrainingError


def case(error: float = 0.0, signal: float = 1.0, **more: Any) -> Case:
    @contextlib.contextmanager
    def make() -> Iterator[Pair]:
        yield Pair(lambda: sum(range(20_000)), lambda: sum(range(200_000)), error, signal)

    return Case("x", "adding", "more adding", 0.5, make, **more)


def test_less_work_has_a_smaller_ratio() -> None:
    line = measure(case(), rounds=5)
    assert line["low"] <= line["ratio"] <= line["high"] and line["ratio"] < 0.5 and line["rounds"] == 5


@pytest.mark.parametrize(("error", "signal", "words"), [(1e-2, 1.0, "differ"), (float("nan"), 1.0, "differ"), (1e-5, 5e-5, "missing module")])
def test_unequal_or_unseen_answers_are_not_timed(error: float, signal: float, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        measure(case(error, signal))


def test_bytes_are_given_by_the_sides() -> None:
    @contextlib.contextmanager
    def make() -> Iterator[Pair]:
        yield Pair(lambda: 30, lambda: 60, 0.0)

    assert measure(Case("x", "a", "b", 1.0, make, unit="bytes"))["ratio"] == 0.5


def test_differences_are_in_units_of_what_is_wanted() -> None:
    assert apart(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)


def test_the_page_says_what_is_missed_and_what_was_not_measured(tmp_path: Path) -> None:
    lines = [
        {"case": "lora-qv", "unit": "time", "ratio": 0.9, "low": 0.8, "high": 1.0, "ours": 0.9, "theirs": 1.0, "on": "here"},
        {"case": "fold", "unit": "time", "ratio": 3.0, "low": 2.0, "high": 4.0, "ours": 3.0, "theirs": 1.0, "on": "here"},
        {"case": "no longer there", "unit": "time"},
        {"case": "load", "failed": "ValueError: no\nmore"},
    ]
    write(lines, tmp_path / "speed.md")
    text = (tmp_path / "speed.md").read_text()
    assert f"Missed: {CASES['fold'].work}." in text and "| met |" in text and text.count("not measured") == len(CASES) - 3
    assert "| failed: ValueError: no |" in text
    assert (tmp_path / "speed.csv").read_text().count("\n") == 3 and (tmp_path / "speed.png").stat().st_size > 1000
    assert set(newest(lines)) == {"lora-qv", "fold"}


def test_a_host_at_rest_and_one_module_give_equal_answers() -> None:
    pytest.importorskip("peft", reason="the package peft is not installed (extra `peft`)")
    for name in ("idle", "small-lora"):
        assert measure(CASES[name], rounds=1)["error"] < 1e-4
