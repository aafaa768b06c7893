"""Cards: complete or not, and rendered without letting content become structure."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from intarsia._codec import canonical_json, decode, encode, parse_json
from intarsia.errors import SpecError
from intarsia.modules import NOT_EVALUATED, Card, Cost, DataSource, Metric

FULL = Card(
    title="Topics in Swahili",
    description="Seven topics.",
    languages=("swh", "kab-Latn"),
    script="Latn",
    task="topic classification",
    data=(DataSource("SIB-200", "1.0", "CC-BY-SA-4.0", "ab" * 32, 701),),
    base="multilingual-e5-small",
    method="lora",
    recipe={"lr": 5e-4, "epochs": 3, "seeds": [1, 2]},
    metrics=(Metric("accuracy", "test", "swh", 0.81, 0.76, 0.86, 204, (1, 2, 3)),),
    cost=Cost(62.5, "cpu, 2 threads", 294912, 1179648),
    bias_evaluation=NOT_EVALUATED,
    intended_use="News topics.",
    out_of_scope="Decisions about people.",
    licence="CC-BY-SA-4.0",
    contact="a@example.org",
    warnings=("Trained on translated text.",),
    parents=("cd" * 32,),
)


def test_round_trip() -> None:
    assert decode(parse_json(canonical_json(FULL)), Card) == FULL
    assert decode(encode(Card()), Card) == Card() and encode(Card()) == {"type": "card"}


def test_a_complete_card_lacks_nothing() -> None:
    assert FULL.missing() == []


@pytest.mark.parametrize(
    "name",
    ["title", "languages", "task", "data", "base", "method", "recipe", "metrics", "bias_evaluation", "intended_use", "out_of_scope", "licence", "contact"],
)
def test_each_missing_statement_is_named(name: str) -> None:
    empty = "" if name == "bias_evaluation" else getattr(Card(), name)
    assert dataclasses.replace(FULL, **{name: empty}).missing() == [name]


def test_data_and_metrics_are_asked_for_details() -> None:
    card = dataclasses.replace(FULL, data=(DataSource("x"),), metrics=(Metric("f1", "dev", "", 0.5),))
    assert card.missing() == ["data 'x': licence", "data 'x': sha256", "metric f1 dev: interval", "metric f1 dev: seeds"]


def test_bias_is_called_not_evaluated() -> None:
    assert Card().bias_evaluation == "not evaluated"
    assert "## Bias evaluation\n\nnot evaluated" in Card().to_markdown()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Card(languages=("eng_Latn",)), "write 'eng-Latn'"),
        (lambda: Card(languages=("Kiswahili!",)), "not a BCP-47"),
        (lambda: Card(languages="swh"), "found the string"),
        (lambda: Card(recipe={"lr": float("nan")}), "$.recipe.lr: nan"),
        (lambda: DataSource("x", sha256="abc"), "64 lower-case"),
        (lambda: Metric("f1", "dev", "", 0.5, 0.6, 0.4), "upside down"),
    ],
)
def test_malformed_statements_are_refused(build: object, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build()  # type: ignore[operator]
    assert words in str(caught.value)


def front_matter(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    return yaml.safe_load(text[4:].split("\n---\n", 1)[0]) or {}


def test_markdown_shows_every_statement() -> None:
    text = FULL.to_markdown()
    for word in ("Topics in Swahili", "0.81", "[0.76, 0.86]", "SIB-200", "ab" * 32, "294,912", "Decisions about people.", "Trained on translated", "0.0005"):
        assert word in text
    assert front_matter(text)["language"] == ["swh", "kab-Latn"] and front_matter(text)["license"] == "CC-BY-SA-4.0"


def test_norwegian_stays_norwegian() -> None:
    assert front_matter(Card(languages=("no", "on")).to_markdown())["language"] == ["no", "on"]


@given(st.text(max_size=40) | st.text("|\\a", max_size=6))
def test_content_never_becomes_structure(text: str) -> None:
    """Hostile one-line statements open no heading, end no front matter, add no table row."""
    card = dataclasses.replace(FULL, title=text, licence=text, base=text, warnings=(text,), data=(DataSource(text, text, text, "ab" * 32),))
    shown, plain = card.to_markdown(), FULL.to_markdown()
    assert front_matter(shown).get("license", "") == text
    for start in ("# ", "## ", "| ", "---", "> "):
        count = [sum(line.startswith(start) for line in t.split("\n")) for t in (shown, plain)]
        assert count[0] <= count[1], start
    cells = {len(re.split(r"(?<!\\)(?:\\\\)*\|", line)) for line in shown.split("\n") if line.startswith("|") and "ab" * 32 in line}
    assert cells == {7}, "a bar in a statement has become a cell"
