"""Cards: complete or not, and rendered without letting content become structure."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from intarsia._codec import canonical_json, decode, encode, parse_json
from intarsia.errors import SpecError
from intarsia.modules import NOT_EVALUATED, UNKNOWN, Card, Cost, DataSource, Metric
from intarsia.modules.licences import LICENCES
from intarsia.modules.readme import render

FULL = Card(
    title="Topics in Swahili",
    description="Seven topics.",
    languages=("swh", "kab-Latn"),
    script="Latn",
    task="topic classification",
    data=(DataSource("SIB-200", "1.0", "CC-BY-SA-4.0", "ab" * 32, 701, "https://example.org/sib"),),
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
    parent_names=("swh",),
)


def test_round_trip() -> None:
    assert decode(parse_json(canonical_json(FULL)), Card) == FULL
    assert decode(encode(Card()), Card) == Card() and encode(Card()) == {"type": "card"}


def test_a_complete_card_lacks_nothing() -> None:
    assert FULL.missing() == []


@pytest.mark.parametrize(
    "name",
    ["title", "languages", "task", "data", "base", "method", "recipe", "metrics", "cost", "bias_evaluation", "intended_use", "out_of_scope", "licence", "contact"],
)
def test_each_missing_statement_is_named(name: str) -> None:
    empty = "" if name == "bias_evaluation" else getattr(Card(), name)
    assert dataclasses.replace(FULL, **{name: empty}).missing() == [name]


def test_data_and_metrics_are_asked_for_details() -> None:
    card = dataclasses.replace(FULL, data=(DataSource("x"),), metrics=(Metric("f1", "dev", "", 0.5),))
    assert card.missing() == ["data 'x': origin", "data 'x': licence", "data 'x': sha256", "metric f1 dev: interval", "metric f1 dev: seeds"]


def test_a_script_stands_in_its_field_or_in_every_tag() -> None:
    for languages, script, missing in ((("swh",), "Latn", []), (("kab-Latn", "zh-Hant-TW"), "", []), (("kab-Latn", "swh"), "", ["script"]), (("pt-BR",), "", ["script"])):
        assert dataclasses.replace(FULL, languages=languages, script=script).missing() == missing


def test_an_unknown_licence_is_a_missing_one() -> None:
    assert dataclasses.replace(FULL, licence=UNKNOWN).missing() == ["licence"]


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
        (lambda: Card(parents=("ab" * 32,), parent_names=("a", "b")), "1 parents and 2 names"),
    ],
)
def test_malformed_statements_are_refused(build: object, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build()  # type: ignore[operator]
    assert words in str(caught.value)


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text[4:].split("\n---\n", 1)[0]) or {}


def test_markdown_shows_every_statement() -> None:
    text = FULL.to_markdown()
    for word in ("Topics in Swahili", "0.81", "[0.76, 0.86]", "SIB-200", "ab" * 32, "294,912", "Decisions about people.", "Trained on translated", "0.0005",
                 "https://example.org/sib", f"swh ({'cd' * 32})", "a@example.org"):  # fmt: skip
        assert word in text


def test_the_block_at_the_top_is_the_hubs() -> None:
    """Languages by ISO 639 code with whole tags beside them, licences by the Hub's names."""
    top = front_matter(FULL.to_markdown())
    assert (top["language"], top["language_bcp47"], top["license"], top["datasets"]) == (["swh", "kab"], ["swh", "kab-Latn"], "cc-by-sa-4.0", ["SIB-200"])
    assert top["library_name"] == "intarsia" and top["tags"] == ["intarsia", "lora"] and "base_model" not in top
    other = front_matter(dataclasses.replace(FULL, licence="House Rules 2!", base="owner/name", data=(DataSource("swh/train.csv"),)).to_markdown())
    assert (other["license"], other["license_name"]) == ("other", "house-rules-2")
    assert (other["base_model"], other["base_model_relation"]) == ("owner/name", "adapter") and "datasets" not in other
    assert front_matter(Card(licence=UNKNOWN).to_markdown())["license"] == "unknown" and "license" not in front_matter(Card().to_markdown())
    whole = front_matter(render(FULL, library="transformers", base_model="o/n"))
    assert (whole["library_name"], whole["base_model"], whole["base_model_relation"]) == ("transformers", "o/n", "merge")


def test_the_hubs_library_reads_what_we_render() -> None:
    """`huggingface_hub` takes the block without complaint and finds metric, interval, rows and seeds in it; no network."""
    hub = pytest.importorskip("huggingface_hub")
    several = (Metric("accuracy", "dev", "", 1e-7, None, None, None, ()), Metric("macro-f1", "test", "swh", 0.5, 0.4, 0.6, 9, (4,)), *FULL.metrics)
    card = hub.ModelCard(dataclasses.replace(FULL, task="classify", metrics=several).to_markdown())
    assert card.data.library_name == "intarsia" and card.data.language == ["swh", "kab"] and card.data.pipeline_tag == "text-classification"
    found = {(r.metric_type, r.dataset_split): r for r in card.data.eval_results}
    assert len(found) == 3 and card.data.model_name == "Topics in Swahili" and found["accuracy", "dev"].metric_value == 1e-7
    result = found["accuracy", "test"]
    assert (result.task_type, result.dataset_name, result.dataset_args, result.metric_value) == ("text-classification", "SIB-200", {"language": "swh"}, 0.81)
    assert result.metric_args == {"interval": [0.76, 0.86], "confidence": 0.95, "rows": 204, "seeds": [1, 2, 3]}
    assert hub.ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert hub.ModelCard(Card().to_markdown()).data.eval_results is None
    for id_ in (row.hub for row in LICENCES.values()):
        assert id_ == id_.lower() and re.fullmatch(r"[a-z0-9.-]+", id_)


def test_norwegian_stays_norwegian() -> None:
    assert front_matter(Card(languages=("no", "on")).to_markdown())["language"] == ["no", "on"]


@given(st.text(max_size=40) | st.text("|\\a", max_size=6))
def test_content_never_becomes_structure(text: str) -> None:
    """Hostile one-line statements open no heading, end no front matter, add no table row."""
    card = dataclasses.replace(FULL, title=text, licence=text, base=text, warnings=(text,), data=(DataSource(text, text, text, "ab" * 32, origin=text),), parent_names=(text,))
    shown, plain = card.to_markdown(), FULL.to_markdown()
    top = front_matter(shown)
    assert set(top) <= {"library_name", "language", "language_bcp47", "license", "license_name", "base_model", "base_model_relation", "datasets", "tags", "model-index"}
    assert top["model-index"][0]["name"] == (" ".join(text.split()) or "Untitled module")
    assert top.get("datasets", []) in ([], [text]) and top.get("base_model", text) == text
    for start in ("# ", "## ", "| ", "---", "> "):
        count = [sum(line.startswith(start) for line in t.split("\n")) for t in (shown, plain)]
        assert count[0] <= count[1], start
    cells = {len(re.split(r"(?<!\\)(?:\\\\)*\|", line)) for line in shown.split("\n") if line.startswith("|") and "ab" * 32 in line}
    assert cells == {8}, "a bar in a statement has become a cell"
