"""Tagging: every word exactly one tag, whatever its length, spelling and the window."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.tasks import build
from intarsia.tasks.tag import is_span_scheme
from tests import zoo
from tests.tasks import toys

TAGS = ("O", "B-PER", "I-PER")
WORDS = st.lists(st.text(alphabet="abé\u0301ሰ\u200b \u1fbd", min_size=1, max_size=6), max_size=12)
MAKE = {"wordpiece": toys.wordpiece, "unigram": toys.unigram, "bytelevel": toys.bytelevel}
TOKENIZERS = {name: make() for name, make in MAKE.items()}


def make(tokenizer: str = "wordpiece", **options: Any) -> Any:
    return build("tag", TOKENIZERS[tokenizer], labels=TAGS, settings=options)


def answer(task: Any, features: Any, of: Any) -> list[Any]:
    """Predictions from logits that say `of(row, word)` at the position that answers for the word."""
    batch = task.collate(features)
    logits = torch.zeros(*batch["input_ids"].shape, len(TAGS))
    for i, row in enumerate(batch["row"]):
        for t, word in enumerate(batch["word"][i].tolist()):
            if word >= 0:
                logits[i, t, of(row, word)] = 5.0
    found: list[Any] = task.predict({"logits": logits}, batch)
    return found


def test_the_loss_is_that_of_transformers() -> None:
    table = Table.of({"tokens": [("abc", "d"), ("é", "the", "x")], "tags": [("B-PER", "O"), ("O", "B-PER", "I-PER")]})
    task = make()
    model = hf.BertForTokenClassification(zoo.config("bert", num_labels=3)).eval()
    zoo.perturb_(model)
    batch = task.collate(task.features(table))
    outputs = model(**{key: batch[key] for key in task.keys}, labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == 5
    torch.testing.assert_close(loss / count, outputs.loss, rtol=1e-6, atol=0)


def test_the_label_is_on_the_first_piece() -> None:
    (feature,) = make().features(Table.of({"tokens": [("abc", "d")], "tags": [("B-PER", "I-PER")]}))
    assert feature["input_ids"] == TOKENIZERS["wordpiece"]("abc d")["input_ids"]
    assert feature["labels"] == [-100, 1, -100, -100, 2, -100]
    assert feature["word"] == [-1, 0, -1, -1, 1, -1]


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.sampled_from(sorted(MAKE)), st.integers(6, 12), st.data())
def test_every_word_is_learnt_and_answered_once(
    sentences: list[list[str]], tokenizer: str, length: int, data: st.DataObject
) -> None:
    """For any words (unknown, combining, blank, empty sentences) and any window the tags come back as they went in."""
    overlap = data.draw(st.none() | st.integers(0, 3))
    task = make(
        tokenizer, max_length=length, overlap=overlap, normalise=data.draw(st.sampled_from(["NFC", "NFKC", "none"]))
    )
    truth = [[(7 * row + word) % 3 for word in range(len(words))] for row, words in enumerate(sentences)]
    table = Table.of({"tokens": sentences, "tags": [[TAGS[i] for i in tags] for tags in truth]})
    features = task.features(table)
    assert all(len(f["input_ids"]) <= length for f in features)
    assert task.terms(task.collate(features)) == sum(map(len, sentences)) == task.counts["words"]
    predictions = task.finish(answer(task, features, lambda row, word: truth[row][word]), table)
    assert [p.value for p in predictions] == [list(cell) for cell in table["tags"]]


def test_a_long_sentence_gets_all_its_tags_and_is_counted() -> None:
    words = [("abcd" if i % 3 else "e") for i in range(3000)]
    task = make(max_length=64)
    table = [{"tokens": tuple(words)}]
    features = task.features(table)
    assert len(features) > 100 and task.counts["split_rows"] == 1 and task.counts["features"] == len(features)
    (prediction,) = task.finish(answer(task, features, lambda row, word: word % 3), table)
    assert prediction.value == [TAGS[i % 3] for i in range(3000)]


def test_a_word_longer_than_the_window() -> None:
    table = [{"tokens": ("a", "b" * 50, "c")}]
    task = make(max_length=10)
    features = task.features(table)
    (prediction,) = task.finish(answer(task, features, lambda row, word: word), table)
    assert prediction.value == list(TAGS)


def test_normalisation_does_not_break_alignment() -> None:
    words = ["be\u0301", "a", "\u1fbd", "e\u0301"]
    task = make("wordpiece")
    (feature,) = task.features([{"tokens": tuple(words)}])
    composed = [unicodedata.normalize("NFC", w) for w in words]
    assert feature["input_ids"] == make("wordpiece").features([{"tokens": tuple(composed)}])[0]["input_ids"]
    assert sorted(w for w in feature["word"] if w >= 0) == [0, 1, 2, 3]


def test_windows_keep_prefix_and_special_tokens() -> None:
    task = make(prefix="the. ", max_length=16)
    tokenizer = TOKENIZERS["wordpiece"]
    start = tokenizer("the.")["input_ids"][:-1]
    features = task.features([{"tokens": ("abcdef",) * 6}])
    assert len(features) > 1
    for feature in features:
        assert feature["input_ids"][: len(start)] == start and feature["input_ids"][-1] == tokenizer.sep_token_id
        assert all(word == -1 for word in feature["word"][: len(start)])


def test_left_padding_moves_words_and_labels_along() -> None:
    table = Table.of({"tokens": [("ab", "c"), ("d",)], "tags": [("O", "B-PER"), ("I-PER",)]})
    task = make(padding="left")
    batch = task.collate(task.features(table))
    assert batch["word"][1].tolist() == [-1, -1, -1, 0, -1] and batch["labels"][1].tolist() == [
        -100,
        -100,
        -100,
        2,
        -100,
    ]
    assert batch["attention_mask"][1].tolist() == [0, 0, 1, 1, 1]


def test_words_and_tags_must_be_as_many() -> None:
    with pytest.raises(DataError, match="row 1: 2 words but 1 tags"):
        make().features(Table.of({"tokens": [("a", "b")], "tags": [("O",)]}))


def test_an_unseen_tag_is_refused() -> None:
    with pytest.raises(DataError, match="'B-LOC'"):
        make().features(Table.of({"tokens": [("a",)], "tags": [("B-LOC",)]}))


def test_span_tags_are_recognised_by_name() -> None:
    assert is_span_scheme(TAGS) and is_span_scheme(["O", "S-X", "B-X", "E-X"])
    assert not is_span_scheme(["NOUN", "VERB"]) and not is_span_scheme(["O"])
    assert make().metric == "span_f1"
    pos = build("tag", TOKENIZERS["wordpiece"], labels=["NOUN", "VERB"])
    assert pos.metric == "token_accuracy" and pos.metrics == ("token_accuracy",)
    with pytest.raises(UsageError, match="repair"):
        build("tag", TOKENIZERS["wordpiece"], labels=["NOUN", "VERB"], settings={"repair": True})


def test_repaired_tags_are_iob2() -> None:
    table = [{"tokens": ("a", "b", "c", "d")}]
    task = make(repair=True)
    (prediction,) = task.finish(answer(task, task.features(table), lambda row, word: (2, 2, 0, 2)[word]), table)
    assert prediction.value == ["B-PER", "I-PER", "O", "B-PER"]


def test_scores_are_span_f1_and_accuracy() -> None:
    table = Table.of({"tokens": [("a", "b", "c")], "tags": [("B-PER", "I-PER", "O")]})
    task = make()
    predictions = task.finish(answer(task, task.features(table), lambda row, word: (1, 0, 0)[word]), table)
    scores = task.score(predictions, table)
    assert scores["span_f1"].value == 0 and scores["token_accuracy"].value == pytest.approx(2 / 3)


def test_a_row_without_a_prediction_is_an_error() -> None:
    task = make()
    table = Table.of({"tokens": [("a",), ("b",)]})
    with pytest.raises(DataError, match="1 of 2 rows got no prediction, the first at <memory> row 2"):
        task.finish(answer(task, task.features(table)[:1], lambda row, word: 0), table)


def test_each_word_is_answered_where_it_has_most_context() -> None:
    """With half a window of overlap, at least a quarter of a window on either side (or the end of the sentence)."""
    task = make(max_length=22)  # 20 pieces between the special tokens
    words = tuple("abc"[: 1 + i % 3] for i in range(60))
    features = task.features([{"tokens": words}])
    assert all(len(f["input_ids"]) == 22 for f in features)  # the last one is moved back to full width
    first, last = features[0], features[-1]
    for feature in features:
        for position, word in enumerate(feature["word"]):
            if word >= 0:
                assert feature is first or position - 1 >= 4
                assert feature is last or 20 - position >= 4


def test_statistics_of_windows_add_up_to_the_loss() -> None:
    table = Table.of({"tokens": [("abcd",) * 20, ("a", "b")], "tags": [("O", "B-PER") * 10, ("O", "I-PER")]})
    task = make(max_length=16)
    features = task.features(table)
    batch = task.collate(features)
    logits = torch.randn(*batch["input_ids"].shape, 3, generator=torch.Generator().manual_seed(0))
    predictions = task.finish(task.predict({"logits": logits}, batch), table)
    loss, count = task.loss({"logits": logits}, batch)
    assert [p.scores["terms"] for p in predictions] == [20, 2] and int(count) == 22
    assert sum(p.scores["loss"] for p in predictions) == pytest.approx(loss.item(), rel=1e-6)
    half = task.loss({"logits": logits.bfloat16()}, batch)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, task.loss({"logits": logits.bfloat16().float()}, batch)[0], rtol=0, atol=0)
