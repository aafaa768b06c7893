"""Sequence to sequence: the model's own shift, language codes per row, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.tasks import bind, build
from intarsia.tasks.seq2seq import language_id, own_shift
from tests import zoo
from tests.tasks import toys

TABLE = Table.of({"source": ["ab cd", "a", "the cat", ""], "target": ["d c", "the ab", "", "x"]})
MIXED = Table.of({
    "source": ["ab cd", "a", "the cat"], "target": ["dc", "the ab", "x"],
    "from": ["eng_Latn", "yor_Latn", "eng_Latn"], "to": ["swh_Latn", "eng_Latn", "yor_Latn"],
})  # fmt: skip
LANGUAGES = {"source_language_column": "from", "target_language_column": "to"}


def lively(family: str, tokenizer: Any) -> Any:
    """A model whose answers are pieces of the tokenizer and differ from text to text."""
    model = (
        warm_started(len(tokenizer)) if family == "encoder-decoder" else zoo.make(family, vocab_size=len(tokenizer))[0]
    )
    zoo.perturb_(model, 5, 0.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias[..., :5] = -1e4  # no special tokens
    return model


def warm_started(vocab: int = zoo.VOCAB) -> Any:
    """Two BERTs as encoder and decoder, as one builds them from a pretrained encoder."""
    torch.manual_seed(0)
    decoder = zoo.config("bert", is_decoder=True, add_cross_attention=True, vocab_size=vocab)
    model = hf.EncoderDecoderModel(
        encoder=hf.BertModel(zoo.config("bert", vocab_size=vocab)), decoder=hf.BertLMHeadModel(decoder)
    ).eval()
    zoo.perturb_(model)
    model.config.decoder_start_token_id, model.config.pad_token_id, model.config.eos_token_id = 1, 0, 2
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    return model


def make(tokenizer: Any, model: Any, **options: Any) -> Any:
    return build("seq2seq", tokenizer, settings=options, model=model)


def run(task: Any, model: Any, table: Any) -> list[Any]:
    batch = task.collate(task.features(table))
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        if task.writes:
            outputs["texts"] = task.generate(model, batch)
        found: list[Any] = task.finish(task.predict(outputs, batch), table)
    return found


@pytest.mark.parametrize("family", [*zoo.SEQ2SEQ, "encoder-decoder"])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    """transformers is given labels only and shifts them itself."""
    model = warm_started() if family == "encoder-decoder" else zoo.make(family)[0]
    task = make(toys.unigram(), model)
    batch = task.collate(task.features(TABLE))
    outputs = model(**{key: batch[key] for key in task.keys})
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    assert int(count) == task.terms(batch) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(loss / count, theirs.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", [*zoo.SEQ2SEQ, "encoder-decoder"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_starts_where_training_starts(family: str, beams: int) -> None:
    """Greedy pieces are those that teacher forcing on them prefers, so generation saw the decoder inputs of training."""
    model = lively(family, toys.unigram())
    task = make(toys.unigram(), model, max_new_tokens=5, beams=beams)
    table = [{"source": text} for text in TABLE["source"]]
    alone = [run(task, model, [row])[0].value for row in table]
    assert [p.value for p in run(task, model, table)] == alone
    assert any(alone)
    if beams > 1:
        return
    batch = task.collate(task.features(table[:1]))
    start = task.start("")
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=torch.tensor([start]),
        decoder_start_token_id=start[0], max_new_tokens=5, do_sample=False,
    )  # fmt: skip
    assert task.tokenizer.decode(written[0, len(start) :], skip_special_tokens=True) == alone[0]
    labels = torch.tensor([[*task.frame("").before, *written[0, len(start) :].tolist(), 2]])
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=own_shift(model)(labels),
        ).logits[0]
    if family != "mbart":  # its shift needs the language at the end; see the legacy test
        best = logits[len(start) - 1 : written.shape[1] - 1].argmax(-1)
        assert best.tolist() == written[0, len(start) :].tolist()


@pytest.mark.parametrize(("family", "legacy"), [("m2m_100", False), ("mbart", True)])
def test_languages_differ_from_row_to_row(family: str, legacy: bool) -> None:
    tokenizer, model = toys.nllb(legacy), zoo.make(family)[0]
    task = make(tokenizer, model, **LANGUAGES)
    features = task.features(MIXED)
    for row, feature in zip(MIXED, features):
        reference = toys.nllb(legacy, src_lang=row["from"], tgt_lang=row["to"])
        assert feature["input_ids"] == reference(row["source"])["input_ids"]
        assert feature["labels"] == reference(text_target=row["target"])["input_ids"]
    batch = task.collate(features)
    outputs = model(**{key: batch[key] for key in task.keys})
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    loss, count = task.loss(outputs, batch)
    torch.testing.assert_close(loss / count, theirs.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("family", "legacy"), [("m2m_100", False), ("mbart", True)])
def test_a_batch_of_mixed_target_languages_writes_what_each_row_writes_alone(family: str, legacy: bool) -> None:
    tokenizer = toys.nllb(legacy)
    model = lively(family, tokenizer)
    task = make(tokenizer, model, max_new_tokens=6, **LANGUAGES)
    ids = {code: language_id(tokenizer, code) for code in ("eng_Latn", "swh_Latn", "yor_Latn")}
    assert len(set(ids.values())) == 3
    assert task.start("swh_Latn") == ([ids["swh_Latn"]] if legacy else [2, ids["swh_Latn"]])
    together = run(task, model, MIXED)
    for i, row in enumerate(MIXED):
        assert run(task, model, MIXED.select([i]))[0].value == together[i].value
        encoded = toys.nllb(legacy, src_lang=row["from"])(row["source"], return_tensors="pt")
        forced = {"decoder_start_token_id": ids[row["to"]]} if legacy else {"forced_bos_token_id": ids[row["to"]]}
        written = model.generate(**encoded, **forced, max_new_tokens=6 + (not legacy), do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True) == together[i].value
    assert len({run(task, model, [{"source": "ab", "from": "eng_Latn", "to": to}])[0].value for to in ids}) > 1


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = toys.nllb(src_lang="yor_Latn", tgt_lang="eng_Latn")
    before = (tokenizer("a")["input_ids"], tokenizer(text_target="a")["input_ids"])
    task = make(tokenizer, zoo.make("m2m_100")[0], **LANGUAGES)
    task.features(MIXED)
    with pytest.raises(DataError):
        task.features([{"source": "a", "target": "b", "from": "eng_Latn", "to": "xx"}])
    assert (tokenizer("a")["input_ids"], tokenizer(text_target="a")["input_ids"]) == before
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("yor_Latn", "eng_Latn")


def test_unknown_codes_name_their_like() -> None:
    model = zoo.make("m2m_100")[0]
    with pytest.raises(DataError, match="row 1: unknown language code 'swh_Arab'; did you mean 'swh_Latn'"):
        make(toys.nllb(), model, **LANGUAGES).features([{"source": "a", "from": "eng_Latn", "to": "swh_Arab"}])
    with pytest.raises(DataError, match="unknown language code 'enq_Latn'; did you mean 'eng_Latn'"):
        make(toys.nllb(), model, source_language="enq_Latn", target_language="swh_Latn")


def test_languages_are_asked_for_and_never_guessed() -> None:
    model = zoo.make("m2m_100")[0]
    with pytest.raises(UsageError, match="set source_language"):
        make(toys.nllb(), model, target_language="swh_Latn")  # the tokenizer's default would be English
    with pytest.raises(UsageError, match="set target_language"):
        make(toys.nllb(), model, source_language="eng_Latn")
    with pytest.raises(UsageError, match="has no language codes"):
        make(toys.unigram(), model, target_language="swh_Latn")
    task = make(toys.nllb(src_lang="yor_Latn", tgt_lang="swh_Latn"), model)
    assert (task.options.source_language, task.options.target_language) == ("yor_Latn", "swh_Latn")
    assert task.settings()["target_language"] == "swh_Latn"


def test_a_tokenizer_with_words_for_languages() -> None:
    """M2M100 writes `__sw__` for `sw`; its tokenizer is slow and keeps a table."""

    class Slow:
        lang_code_to_token = {"en": "__en__", "sw": "__sw__"}  # noqa: RUF012

        def convert_tokens_to_ids(self, token: str) -> int:
            return {"__en__": 7, "__sw__": 8}[token]

    assert language_id(Slow(), "sw") == 8
    with pytest.raises(DataError, match="unknown language code 'swa'; did you mean 'sw'"):
        language_id(Slow(), "swa")


def test_long_sides_are_cut_and_counted() -> None:
    model = zoo.make("t5")[0]
    task = make(toys.unigram(), model, max_length=10, max_target_length=6)
    (feature,) = task.features([{"source": "a b " * 10, "target": "c d " * 10}])
    assert len(feature["input_ids"]) == 10 and len(feature["labels"]) == 6 and feature["labels"][-1] == 2
    assert task.counts["truncated"] == 1 and task.counts["truncated_targets"] == 1


def test_an_unbound_task_says_so() -> None:
    task = build("seq2seq", toys.unigram())
    with pytest.raises(UsageError, match="bind"):
        task.collate(task.features(TABLE))
    with pytest.raises(UsageError, match="needs an encoder-decoder"):
        bind(task, zoo.make("bert")[0])


def test_without_generation_there_are_likelihoods() -> None:
    model = zoo.make("bart")[0]
    task = make(toys.unigram(), model, generate=False)
    predictions = run(task, model, TABLE)
    assert task.metric == "perplexity" and not task.higher_is_better
    assert all(p.value == -p.scores["loss"] < 0 for p in predictions)
    assert set(task.score(predictions, TABLE)) == {"perplexity"}


def test_scores_of_texts() -> None:
    model = zoo.make("bart")[0]
    task = make(toys.unigram(), model, max_new_tokens=4)
    scores = task.score(run(task, model, TABLE), TABLE)
    assert task.metric == "chrf" and set(scores) == {"chrf", "bleu", "perplexity"}
    assert scores["chrf"].signature


def test_the_source_has_its_prefix() -> None:
    task = make(toys.unigram(), zoo.make("t5")[0], prefix="the ")
    assert task.features([{"source": "ab"}])[0]["input_ids"] == toys.unigram()("the ab")["input_ids"]
