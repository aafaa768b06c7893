"""The commands of docs/tasks.md on tiny bases: few-shot label embeddings, parsing, parts of speech, pairs of texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from intarsia.modules import load
from tests.cli.bases import TOPICS, make_base, make_topics
from tests.cli.run import Here, process


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, topics with 16 examples each, sentences with trees, pairs."""
    path = tmp_path_factory.mktemp("tasks")
    make_base(path / "base")
    draw = random.Random(0)
    few = [f"{' '.join(draw.choices(words, k=3))} {i},{label}" for label, words in TOPICS.items() for i in range(16)]
    (path / "few.csv").write_text("\n".join(["text,label", *few]) + "\n", "utf-8")
    make_topics(path / "test.csv", 30, 2)
    for part, seed in (("train", 0), ("test", 1)):
        (path / f"{part}.conllu").write_text(sentences(24, seed), "utf-8")
    pairs = [f"{a},{b},{'same' if (a in animals) == (b in animals) else 'other'}" for animals in [TOPICS["animals"]]
             for a in (*animals, *TOPICS["food"]) for b in (*animals, *TOPICS["food"])]  # fmt: skip
    (path / "nli.csv").write_text("\n".join(["premise,hypothesis,label", *pairs]) + "\n", "utf-8")
    return path


def sentences(count: int, seed: int) -> str:
    """Every word hangs on the one before it, the first is the root; a food is an object."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        words = draw.choices([*TOPICS["animals"], *TOPICS["food"]], k=draw.randint(2, 6))
        lines = [f"{i}\t{w}\t_\t{'NOUN' if w in TOPICS['food'] else 'X'}\t_\t_\t{i - 1}\t{'root' if i == 1 else 'obj' if w in TOPICS['food'] else 'nsubj'}\t_\t_"
                 for i, w in enumerate(words, 1)]  # fmt: skip
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) + "\n"


def train(room: Path, out: str, *more: str) -> list[str]:
    return ["train", "--base", str(room / "base"), "--out", str(room / out), "--quiet", "--json", "--force", *more]


def test_perfect_from_few_examples_to_answers_in_another_process(cli: Here, room: Path) -> None:
    words = train(room, "few", "--task", "classify", "--train", str(room / "few.csv"), "--method", "perfect", "--set", "masks=3",
                  "--max-steps", "8")  # fmt: skip
    told = cli(*words).ok().json
    module = load(told["file"])
    assert module.context["task"]["masks"] == 3 and len(module.labels or ()) == 3
    scored = cli("eval", "-m", told["file"], "--base", str(room / "base"), "--quiet", "--json", f"test={room / 'test.csv'}").ok().json["data"]["test"]
    assert scored["metrics"]["accuracy"]["n"] == 30  # an untrained base; that it learns is shown in test_real.py
    answer = ["predict", "-m", told["file"], "--base", str(room / "base"), "--line", "cat dog 3", "--quiet", "--json"]
    (here,) = cli(*answer).ok().json
    (there,) = json.loads(process(*answer).ok().out)
    assert here == there and sum(here["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_parsing_and_parts_of_speech_from_one_file(cli: Here, room: Path) -> None:
    data = ("--train", str(room / "train.conllu"), "--max-steps", "40")
    told = cli(*train(room, "parse", "--task", "parse", *data, "--lr", "0.003", "--task-set", "arc_width=16")).ok().json
    scored = cli("eval", "-m", told["file"], "--base", str(room / "base"), "--quiet", "--json", f"test={room / 'test.conllu'}").ok().json["data"]["test"]
    metrics = scored["metrics"]
    assert set(metrics) == {"las", "uas", "las_no_punct"} and metrics["uas"]["low"] <= metrics["uas"]["value"] <= metrics["uas"]["high"]
    assert metrics["las"]["value"] > 0.4 and scored["counts"]["words"] > 50
    rows = cli("predict", "-m", told["file"], "--base", str(room / "base"), str(room / "test.conllu"), "--quiet", "--json").ok().json
    assert all(sum(head == 0 for head, _ in row["prediction"]) == 1 for row in rows)
    told = cli(*train(room, "upos", "--task", "tag", *data)).ok().json
    scored = cli("eval", "-m", told["file"], "--base", str(room / "base"), "--quiet", "--json", f"test={room / 'test.conllu'}").ok().json["data"]["test"]
    assert scored["metrics"]["token_accuracy"]["value"] > 0.6
    bad = room / "cycle.conllu"
    bad.write_text((room / "test.conllu").read_text("utf-8").replace("\t0\troot", "\t2\troot", 1), "utf-8")
    assert "cycle.conllu:1: the heads of words 1, 2 form a cycle" in cli(*train(room, "no", "--task", "parse", "--train", str(bad))).error(3)


def test_pairs_are_found_by_their_columns(cli: Here, room: Path) -> None:
    told = cli(*train(room, "pairs", "--task", "classify", "--train", str(room / "nli.csv"), "--max-steps", "2")).ok().json
    stored = load(told["file"]).context["task"]
    assert (stored["text"], stored["pair"]) == ("premise", "hypothesis")
