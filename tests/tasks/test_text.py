"""Tokenisation: windows, frames, words, truncation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import UsageError
from intarsia.tasks.text import Frame, best_window, context, encode, limit, pieces, windows, word_pieces
from tests import zoo
from tests.tasks import toys

ALL = [toys.wordpiece, toys.unigram, toys.bytelevel]


@given(st.integers(0, 200), st.integers(1, 40), st.data(), st.booleans())
def test_windows_cover_everything(count: int, width: int, data: st.DataObject, flush: bool) -> None:
    overlap = data.draw(st.integers(0, width - 1))
    found = windows(count, width, overlap, flush)
    assert {i for start, end in found for i in range(start, end)} == set(range(count))
    assert all(0 <= start <= end <= count and end - start <= width for start, end in found)
    assert len(found) == 1 or all(start < end for start, end in found)
    if flush and count >= width:
        assert all(end - start == width for start, end in found)
    if not flush:
        # with the shared part taken off, every position is there exactly once
        assert [i for n, (s, e) in enumerate(found) for i in range(s + (overlap if n else 0), e)] == list(range(count))


@given(st.integers(1, 120), st.integers(2, 30), st.data())
def test_the_best_window_has_the_most_context(count: int, width: int, data: st.DataObject) -> None:
    found = windows(count, width, width // 2, flush=True)
    position = data.draw(st.integers(0, count - 1))
    chosen = best_window(found, position, count)
    holding = [w for w in found if w[0] <= position < w[1]]
    assert context(found[chosen], position, count) == max(context(w, position, count) for w in holding)
    # half a window of overlap leaves at least a quarter of a window of context on both sides
    assert context(found[chosen], position, count) >= min(count, (width // 2 - 1) // 2)


def test_a_window_without_a_step_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot overlap"):
        windows(10, 4, 4)


@pytest.mark.parametrize("make", ALL)
def test_frame_and_pieces_make_the_tokenizers_own_encoding(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    texts = ["ab the", "", "the cat sat."]
    frame = Frame.of(tokenizer)
    assert [frame.wrap(ids) for ids in pieces(tokenizer, texts)] == tokenizer(texts)["input_ids"]


def test_a_frame_with_a_prefix_is_the_text_with_the_prefix() -> None:
    tokenizer = toys.wordpiece()
    frame = Frame.of(tokenizer, "query. ")
    assert frame.wrap(pieces(tokenizer, ["ab"])[0]) == tokenizer("query. ab")["input_ids"]


@pytest.mark.parametrize("make", ALL)
@given(st.lists(st.text(alphabet="abthe", min_size=1, max_size=5), min_size=1, max_size=6))
def test_words_one_by_one_are_the_text(make: object, words: list[str]) -> None:
    """Word pieces in a row are what the tokenizer makes of the words joined by blanks."""
    tokenizer = make()  # type: ignore[operator]
    joined = [i for word in word_pieces(tokenizer, [words])[0] for i in word]
    assert joined == pieces(tokenizer, [" ".join(words)])[0]


@pytest.mark.parametrize("make", [toys.wordpiece, toys.unigram])
def test_words_one_by_one_are_the_tokenizers_word_mode(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    words = ["ab", "the", "cé", "x"]
    encoding = tokenizer(words, is_split_into_words=True, add_special_tokens=False)
    ours = word_pieces(tokenizer, [words])[0]
    assert [i for word in ours for i in word] == encoding["input_ids"]
    assert [n for n, word in enumerate(ours) for _ in word] == encoding.word_ids()


def test_normalisation_in_the_tokenizer_does_not_shift_words() -> None:
    """NFKC of U+1FBD is a blank and a mark: pieces of one word, not of two (huggingface/tokenizers 1663)."""
    tokenizer = toys.unigram()
    ours = word_pieces(tokenizer, [["ab", "\u1fbd", "the"]])[0]
    assert ours[0] == pieces(tokenizer, ["ab"])[0] and ours[2] == pieces(tokenizer, ["the"])[0]


def test_a_word_without_pieces_gets_one() -> None:
    tokenizer = toys.wordpiece()
    assert pieces(tokenizer, [" "]) == [[]]
    assert word_pieces(tokenizer, [["ab", " ", "b"]])[0][1] == [tokenizer.unk_token_id]


def test_truncation_is_counted() -> None:
    tokenizer = toys.wordpiece()
    found, counts = encode(tokenizer, ["a", "a" * 30, "abcdef", ""], None, 8)
    assert [len(f["input_ids"]) for f in found] == [3, 8, 8, 2]
    assert counts["truncated"] == 1 and counts["empty"] == 1 and counts["pieces"] == 21
    assert all(f["input_ids"][-1] == tokenizer.sep_token_id for f in found)


def test_pairs_lose_pieces_of_the_longer_side() -> None:
    tokenizer = toys.wordpiece()
    (found,), counts = encode(tokenizer, ["a" * 30], ["bc"], 12)
    assert len(found["input_ids"]) == 12 and counts["truncated"] == 1
    assert found["input_ids"][-3:] == [*pieces(tokenizer, ["bc"])[0], tokenizer.sep_token_id]
    assert found["token_type_ids"][-1] == 1


def test_a_text_without_pieces_or_special_tokens_keeps_one_position() -> None:
    found, counts = encode(toys.bytelevel(), ["", "ab"], None, 8)
    assert found[0] == {"input_ids": [0], "attention_mask": [1]} and counts["empty"] == 1


def test_unknown_pieces_are_counted() -> None:
    _, counts = encode(toys.wordpiece(), ["ab ሰላም", "b"], None, 20)
    assert counts["unknown"] == 1


def test_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves no room"):
        encode(toys.wordpiece(), ["a"], ["b"], 4)
    with pytest.raises(UsageError, match="leaves no room"):
        Frame.of(toys.wordpiece()).room(2)


def test_limit_is_the_smallest_of_all() -> None:
    endless = toys.wordpiece(int(1e30))
    assert limit(endless) == 512
    assert limit(toys.wordpiece(40)) == 40
    assert limit(endless, zoo.make("bert")[0]) == 64
    assert limit(endless, zoo.make("roberta")[0]) == 63  # positions count from behind the padding id, 0 here
    assert limit(endless, zoo.make("t5")[0]) == 512
