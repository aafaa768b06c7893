"""Jobs, results and the page of `bench learn`; one real job on a tiny task is `slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.bench import tune
from intarsia.bench.jobs import SET, Job, Results, plan, rates, shots, source
from intarsia.bench.page import interval, latest, write
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
    assert results.done() == {JOB}
    other = Job("sib200", "minilm-l6", "lora", 1, 700, 100)
    with pytest.raises(DataError, match="line 2"):
        results.add(other, {"score": 0.25})
        results.read()


def test_plan_goes_seed_by_seed_and_knows_its_names() -> None:
    jobs = list(plan(["sst2"], "b", ["head", "lora"], [0, 1], [16], 5))
    assert [(j.seed, j.method) for j in jobs] == [(0, "head"), (0, "lora"), (1, "head"), (1, "lora")]
    assert set(rates()) | set(SET) <= set(METHODS)
    assert all(METHODS[name].build(**values) for name, values in SET.items())
    e2e = [(j.base, j.seed, j.method, j.steps) for j in plan(["e2e"], None, ["head", "lora"], [0, 1])]
    assert e2e == [("smollm2-135m", 0, "base", 30), ("smollm2-135m", 0, "lora", 30), ("smollm2-135m", 1, "lora", 30)]
    with pytest.raises(UsageError, match="sst2"):
        source("sst3")


def test_results_of_other_settings_count_no_more_and_failures_go_after_success(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    fish = Job("sst2", "minilm-l6", "fish", 0, 700, 100, rates().get("fish"))
    results.add(JOB, {"failed": "x"})
    results.add(fish, {"score": 0.5, "set": {"rows": 1024}})
    assert results.done() == set() and results.tidy() == 0
    results.add(fish, {"score": 0.6, "set": SET["fish"]})
    results.add(JOB, {"score": 0.7})
    assert results.done() == {JOB, fish} and results.tidy() == 1
    assert [line.get("score") for line in results.read()] == [0.5, 0.6, 0.7]
    other = Job(**{**{name: getattr(JOB, name) for name in Job.__dataclass_fields__}, "rate": 123.0})
    results.add(other, {"score": 0.9})
    assert {line["method"]: line["score"] for line in latest(results.read()) if line["rate"] == rates().get(str(line["method"]))}["fish"] == 0.6
    assert 0.9 not in {line["score"] for line in latest(results.read())}, "a rate that is not the method's now"


def test_tuning_climbs_until_it_learns_less_and_the_own_rate_wins_a_draw(tmp_path: Path) -> None:
    results, path = Results(tmp_path / "t.jsonl"), tmp_path / "rates.csv"
    scores = {"lora": [0.7, 0.8, 0.75], "ln": [0.7, 0.6], "road": [0.7, 0.7, 0.7], "head": [0.7, 0.6, 0.9]}
    for job in tune.trials(list(scores), results, "sst2"):
        results.add(job, {"score": scores[job.method].pop(0)})
    assert not any(scores.values()), "each score was asked for once, and no more than those"
    found = tune.write(results.read(), path)
    assert {name: rate for name, (rate, _) in found.items()} == {"lora": 1.5e-3, "dora": 6e-4, "rslora": 6e-4, "head": 1.7e-3}
    assert "lora,0.0015,dev 0.0005: 0.700; 0.0015: 0.800; 0.005: 0.750" in path.read_text()


def test_the_page_says_what_is_below_head_only(tmp_path: Path) -> None:
    common = {"task": "t", "base": "b", "steps": 5, "metric": "accuracy", "low": 0.6, "high": 0.8, "rows": 10, "trainable": 1234, "stored": 99,
              "step_ms": 3.0, "peak_mib": 7, "on": "a machine", "rate": None}  # fmt: skip
    lines = [
        {**common, "method": method, "seed": seed, "examples": n, "score": score + seed / 100 + n / 1e4}
        for method, score in (("head", 0.7), ("full", 0.8), ("bad", 0.5)) for seed in (0, 1, 2) for n in (16, 64)
    ]  # fmt: skip
    none = {"task": "t", "base": "b", "steps": 5, "method": "none", "seed": 0, "examples": 64, "rate": None, "refused": "no such site"}
    write([*lines, none], tmp_path / "m.md")
    page = (tmp_path / "m.md").read_text()
    assert "No better than `head` in the mean: `bad`." in page and "`none`: no such site" in page and "Not measured yet: `freeze_k`" in page
    assert page.index("| `full` |") < page.index("| `head` |") < page.index("| `bad` |")
    assert (tmp_path / "m-t.png").stat().st_size > 5000
    assert "| 1,234 | 99 | 3 | 7 |" in page and "+0.100" in page and "-0.200 (worse)" in page
    assert "Collapsed in single seeds (more than 0.05 worse than `head` in the same seed): `bad` (seed 0: 0.506), `bad` (seed 1: 0.516)" in page
    assert "* 16 examples: 0 of 1 are above full fine-tuning (0.812)." in page


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
