"""Jobs, results and the page of `bench learn`; one real job on a tiny task is `slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.bench.jobs import Job, Results, plan, rates, shots, source
from intarsia.bench.page import interval, write
from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.methods import METHODS
from tests.shared import shared

JOB = Job("sst2", "minilm-l6", "lora", 0, 700, 100)


def table(labels: list[str]) -> Table:
    return Table.of({"text": [f"t{i}" for i in range(len(labels))], "label": labels})


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=60), st.integers(0, 5), st.data())
def test_shots_are_nested_and_spread(labels: list[str], seed: int, data: st.DataObject) -> None:
    rows = table(labels)
    more = data.draw(st.integers(3, len(labels)))
    fewer = data.draw(st.integers(1, more))
    big, small = shots(rows, more, seed), shots(rows, fewer, seed)
    assert list(small.texts("text")) == list(big.texts("text"))[:fewer]
    assert len(set(big.texts("text"))) == more
    assert set(big.texts("label")) == set(labels)
    share = {name: labels.count(name) * more / len(labels) for name in set(labels)}
    assert all(abs(list(big.texts("label")).count(name) - want) <= len(share) for name, want in share.items())


def test_shots_refuse_more_than_there_are() -> None:
    with pytest.raises(DataError, match="9 examples wanted, the table has 2"):
        shots(table(["a", "b"]), 9, 0)


def test_results_survive_a_torn_line(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.add(JOB, {"score": 0.5})
    with results.path.open("a") as file:
        file.write('{"task": "sst')
    assert results.done() == {JOB.key}
    other = Job("sib200", "minilm-l6", "lora", 1, 700, 100)
    with pytest.raises(DataError, match="line 2"):
        results.add(other, {"score": 0.25})
        results.read()


def test_plan_goes_seed_by_seed_and_knows_its_names() -> None:
    jobs = list(plan(["sst2"], "b", ["head", "lora"], [0, 1], [16], 5))
    assert [(j.seed, j.method) for j in jobs] == [(0, "head"), (0, "lora"), (1, "head"), (1, "lora")]
    assert set(rates()) <= set(METHODS)
    with pytest.raises(UsageError, match="sst2"):
        source("sst3")


def test_the_page_says_what_is_below_head_only(tmp_path: Path) -> None:
    common = {"task": "sst2", "base": "b", "steps": 5, "metric": "accuracy", "low": 0.6, "high": 0.8, "rows": 10, "trainable": 1234, "stored": 99,
              "step_ms": 3.0, "peak_mib": 7, "on": "a machine", "rate": None}  # fmt: skip
    lines = [
        {**common, "method": method, "seed": seed, "examples": n, "score": score + seed / 100 + n / 1e4}
        for method, score in (("head", 0.7), ("good", 0.8), ("bad", 0.5)) for seed in (0, 1, 2) for n in (16, 64)
    ]  # fmt: skip
    none = {"task": "sst2", "base": "b", "steps": 5, "method": "none", "seed": 0, "examples": 64, "refused": "no such site"}
    write([*lines, none], tmp_path / "m.md")
    page = (tmp_path / "m.md").read_text()
    assert "Below head-only here: `bad`." in page and "`none`: no such site" in page
    assert page.index("| `good` |") < page.index("| `head` |") < page.index("| `bad` |")
    assert (tmp_path / "m-sst2.png").stat().st_size > 5000
    assert "| 1,234 | 99 | 3 | 7 |" in page and "+0.100" in page and "-0.200 (below)" in page


def test_interval_is_students() -> None:
    assert interval([0.5]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)


def test_the_committed_results_are_whole() -> None:
    folder = Path(__file__).parents[2] / "docs" / "measured"
    for file in sorted(folder.glob("*.jsonl")):
        for line in Results(file).read():
            assert "score" in line or "refused" in line or "failed" in line, json.dumps(line)


@pytest.mark.slow
def test_a_real_job(tmp_path: Path) -> None:
    from intarsia.bench.learn import run

    data = shared("data/sst2").parent
    jobs = list(plan(["sst2"], "minilm-l6", ["lora"], [0], [64], 20))
    results = Results(tmp_path / "r.jsonl")
    assert run(iter(jobs), data, results, print) == 1
    assert run(iter(jobs), data, results, print) == 0
    (line,) = results.read()
    assert 0.5 < float(str(line["score"])) < 1 and line["trainable"] == 74498
