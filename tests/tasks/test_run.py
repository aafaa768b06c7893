"""`predict` and `evaluate` on a host: order, modes, per-row modules with their own labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from intarsia.compose import Ref
from intarsia.data import Table
from intarsia.errors import CompositionError, DataError, UsageError
from intarsia.host import Host
from intarsia.methods import METHODS
from intarsia.patches.heads import HeadForm
from intarsia.tasks import build, collapsed, evaluate, predict
from intarsia.train.task import Prediction
from tests import zoo
from tests.tasks import toys

TOKENIZER = toys.wordpiece()
TEXTS = ["the cat", "a", "the cat sat on a mat", "", "ab cd ef", "z", "on", "it was fat"]
TOPICS = ("news", "sport", "travel")
MOODS = ("bad", "good")


def lively(host: Host, name: str) -> None:
    """Move a fresh module away from zero and centre its head, so that its answers differ from text to text."""
    noise = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in host.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.5)
    seen: list[torch.Tensor] = []
    for head in [d.form for _, deltas in host.deltas(name) for d in deltas if isinstance(d.form, HeadForm)]:
        hook = head.register_forward_pre_hook(
            lambda form, args: seen.append(form.features(args[1].input, args[1].mask))
        )
        with torch.no_grad(), host.using(name) as model:
            model(**TOKENIZER(TEXTS, padding=True, return_tensors="pt"))
            hook.remove()
            head.calibrate(seen[0].flatten(0, -2))
            head.bias.zero_()


def hosted(**modules: Any) -> Host:
    """A tiny BERT with LoRA modules, each with the head of a task."""
    host = Host(zoo.make("bert", headless=True)[0])
    for seed, (name, task) in enumerate(modules.items()):
        method = METHODS["lora"].build(rank=2)
        host.add(name, method if task is None else method.with_head(task.head), seed=seed)
        lively(host, name)
    return host


def topics(labels: Sequence[str] = TOPICS, **settings: Any) -> Any:
    return build("classify", TOKENIZER, labels=labels, settings=settings)


def table(labels: Sequence[str] = TOPICS) -> Table:
    return Table.of({"text": TEXTS, "label": [labels[i % len(labels)] for i in range(len(TEXTS))]})


def close(a: Sequence[Prediction], b: Sequence[Prediction]) -> None:
    assert [p.row for p in a] == [p.row for p in b] and [p.value for p in a] == [p.value for p in b]
    for p, q in zip(a, b):
        assert p.probabilities == pytest.approx(q.probabilities, abs=1e-5)


def test_results_are_in_row_order_whatever_the_batches() -> None:
    task = topics()
    host = hosted(topic=task)
    one_by_one = [predict(host, "topic", task, [{"text": text}])[0] for text in TEXTS]
    for size in (1, 3, 100):
        found = predict(host, "topic", task, [{"text": text} for text in TEXTS], batch_size=size)
        assert [p.row for p in found] == list(range(len(TEXTS)))
        assert [p.value for p in found] == [p.value for p in one_by_one]
        for p, q in zip(found, one_by_one):
            assert p.probabilities == pytest.approx(q.probabilities, abs=1e-5)
    assert len({p.value for p in one_by_one}) > 1


def test_evaluation_has_metrics_loss_counts_and_time() -> None:
    task = topics(max_length=6)
    host = hosted(topic=task)
    result = evaluate(host, "topic", task, table(), batch_size=3)
    right = sum(p.value == row["label"] for p, row in zip(result.predictions, table()))
    assert result.metrics["accuracy"].value == pytest.approx(right / len(TEXTS))
    assert result.loss == pytest.approx(
        -sum(torch.tensor(p.probabilities[row["label"]]).log().item() for p, row in zip(result.predictions, table()))
        / len(TEXTS),
        rel=1e-4,
    )
    assert result.counts["rows"] == 8 and result.counts["truncated"] == 4 and result.counts["empty"] == 1
    assert result.seconds > 0


def test_modes_and_gradients_are_as_before_also_after_an_error() -> None:
    task = topics()
    host = hosted(topic=task)
    host.model.train()
    host.model.encoder.layer[0].eval()
    modes = {name: m.training for name, m in host.model.named_modules()}
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, host.model.training, torch.is_grad_enabled()))
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(host, "topic", task, table(), batch_size=3, progress=progress)
    assert seen == [(3, 8, False, False), (6, 8, False, False), (8, 8, False, False)]
    assert {name: m.training for name, m in host.model.named_modules()} == modes
    assert torch.is_grad_enabled()
    first = predict(host, "topic", task, table())
    close(first, predict(host, "topic", task, table()))  # dropout is off
    assert host.model.training


def test_rows_of_one_batch_run_their_own_modules_and_are_read_with_their_own_labels() -> None:
    topic, mood, other = topics(), topics(MOODS), topics(("travel", "news", "sport"))
    host = hosted(topic=topic, mood=mood, other=other, language=None)
    expressions = ["topic", "mood", "language >> topic", "other", "mood", "topic", "language >> mood", "other"]
    found = predict(host, None, topic, table(), batch_size=8, per_row=expressions)
    for row, expression in enumerate(expressions):
        (alone,) = predict(host, expression, topic, table().select([row]))
        assert found[row].value == alone.value
        assert found[row].probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert set(found[row].probabilities) == set(MOODS if "mood" in expression else TOPICS)
    with_objects = predict(host, None, topic, table(), per_row=[Ref(e) if e.isalpha() else e for e in expressions])
    close(found, with_objects)


def test_the_modules_labels_count_not_the_tasks() -> None:
    """The same names in another order: decoding by position would exchange them."""
    trained, shuffled = topics(("sport", "news", "travel")), topics(("travel", "sport", "news"))
    host = hosted(topic=trained)
    close(predict(host, "topic", trained, table()), predict(host, "topic", shuffled, table()))
    a, b = evaluate(host, "topic", trained, table()), evaluate(host, "topic", shuffled, table())
    assert a.metrics["accuracy"] == b.metrics["accuracy"]
    assert a.loss is not None and b.loss is None


def test_evaluation_of_mixed_label_sets() -> None:
    topic, mood = topics(), topics(MOODS)
    host = hosted(topic=topic, mood=mood)
    rows = Table.of({"text": TEXTS[:4], "label": ["news", "good", "sport", "bad"]})
    result = evaluate(host, None, topic, rows, per_row=["topic", "mood", "topic", "mood"])
    right = sum(p.value == row["label"] for p, row in zip(result.predictions, rows))
    assert result.metrics["accuracy"].value == right / 4
    with pytest.raises(DataError, match=r"row 2: .*'good'"):
        evaluate(host, None, topic, rows, per_row=["topic", "topic", "topic", "mood"])


def test_an_unseen_dev_label_is_refused_before_anything_runs() -> None:
    task = topics()
    host = hosted(topic=task)
    bad = Table.of({"text": ["a"], "label": ["Sport"]})
    with pytest.raises(DataError, match="did you mean 'sport'"):
        evaluate(host, "topic", task, bad, progress=lambda done, total: pytest.fail("ran"))
    assert predict(host, "topic", task, bad)[0].value in TOPICS  # prediction does not need labels
    with pytest.raises(DataError, match="no column 'label'"):
        evaluate(host, "topic", task, [{"text": "a"}])


def test_what_cannot_run_is_refused() -> None:
    task = topics()
    host = hosted(topic=task, language=None)
    with pytest.raises(CompositionError, match="no module 'topc'"):
        predict(host, "topc", task, table())
    with pytest.raises(CompositionError, match="no logits"):
        predict(host, "language", task, table())
    with pytest.raises(UsageError, match="not both"):
        predict(host, "topic", task, table(), per_row=["topic"] * 8)
    with pytest.raises(UsageError, match="per_row has 1 expressions for 8 rows"):
        predict(host, None, task, table(), per_row=["topic"])
    with pytest.raises(UsageError, match="batch_size"):
        predict(host, "topic", task, table(), batch_size=0)
    with pytest.raises(DataError, match="no rows"):
        predict(host, "topic", task, [])


def test_one_row_and_one_class() -> None:
    task = topics()
    host = hosted(topic=task)
    result = evaluate(host, "topic", task, Table.of({"text": ["the cat"], "label": ["news"]}))
    assert all(torch.isfinite(torch.tensor(s.value)) for s in result.metrics.values())
    single = topics(["only"])
    host = hosted(topic=single)
    result = evaluate(host, "topic", single, Table.of({"text": ["a", "b"], "label": ["only", "only"]}))
    assert result.metrics["accuracy"].value == 1 and result.loss == pytest.approx(0)


def test_a_row_of_padding_only_stays_finite() -> None:
    """GPT-2 has no special tokens, so an empty text has no piece of its own."""
    tokenizer = toys.bytelevel()
    task = build("classify", tokenizer, labels=TOPICS)
    host = Host(zoo.make("gpt2", headless=True, vocab_size=len(tokenizer))[0])
    host.add("topic", METHODS["lora"].build().with_head(task.head))
    found = predict(host, "topic", task, [{"text": ""}, {"text": "the ab the ab"}])
    assert all(0 <= p <= 1 for f in found for p in f.probabilities.values())
    assert task.counts["empty"] == 1


def test_tagging_with_modules_of_different_tag_sets() -> None:
    ner = build("tag", TOKENIZER, labels=("O", "B-PER", "I-PER"), settings={"max_length": 12})
    pos = build("tag", TOKENIZER, labels=("NOUN", "VERB"), settings={"max_length": 12})
    host = hosted(ner=ner, pos=pos)
    sentences = [("the", "cat"), ("a",), ("abcdef",) * 9, (), ("x", "y", "z")]
    rows = Table.of({"tokens": sentences})
    found = predict(host, None, ner, rows, per_row=["ner", "pos", "pos", "ner", "ner"], batch_size=16)
    assert [len(p.value) for p in found] == [2, 1, 9, 0, 3]
    for row, name in enumerate(["ner", "pos", "pos", "ner", "ner"]):
        assert found[row].value == predict(host, name, ner, rows.select([row]))[0].value
    assert set(found[2].value) <= {"NOUN", "VERB"}


def test_language_models_on_a_host() -> None:
    texts = Table.of({"text": TEXTS})
    headless = zoo.make("bert", headless=True)[0]
    mlm = build("mlm", TOKENIZER, model=headless)
    host = Host(headless)
    host.add("swh", METHODS["lora"].build().with_head(mlm.head))
    lively(host, "swh")
    first, second = evaluate(host, "swh", mlm, texts), evaluate(host, "swh", mlm, texts, batch_size=2)
    assert first.metrics["perplexity"].value == pytest.approx(second.metrics["perplexity"].value, rel=1e-4)
    mlm.epoch = 4
    assert evaluate(host, "swh", mlm, texts).metrics["perplexity"].value == pytest.approx(
        first.metrics["perplexity"].value, rel=1e-4
    )
    assert mlm.epoch == 4
    own = zoo.make("bert")[0]
    base = build("mlm", TOKENIZER, model=own)
    assert evaluate(Host(own), None, base, texts).loss > 0
    tokenizer = toys.bytelevel()
    model = zoo.make("llama", vocab_size=len(tokenizer))[0]
    clm = build("clm", tokenizer, model=model, settings={"pack": True, "max_length": 10})
    host = Host(model)
    host.add("swh", METHODS["lora"].build())
    off = evaluate(host, None, clm, texts)
    lively(host, "swh")
    on = evaluate(host, "swh", clm, texts)
    assert len(on.predictions) == len(TEXTS) and on.loss != pytest.approx(off.loss)


def test_translation_on_a_host() -> None:
    tokenizer = toys.nllb()
    model = zoo.make("m2m_100", vocab_size=len(tokenizer))[0]
    task = build(
        "seq2seq",
        tokenizer,
        model=model,
        settings={"max_new_tokens": 5, "source_language": "eng_Latn", "target_language_column": "to"},
    )
    host = Host(model)
    for name in ("a", "b"):
        host.add(name, METHODS["lora"].build())
        lively(host, name)
    rows = Table.of(
        {"source": ["ab", "cd e", "f"], "target": ["ba", "x", "y"], "to": ["swh_Latn", "yor_Latn", "swh_Latn"]}
    )
    found = evaluate(host, None, task, rows, per_row=["a", "b", "a >> b"])
    for row, expression in enumerate(["a", "b", "a >> b"]):
        alone = evaluate(host, expression, task, rows.select([row]))
        assert alone.predictions[0].value == found.predictions[row].value
        assert alone.predictions[0].scores["loss"] == pytest.approx(found.predictions[row].scores["loss"], rel=1e-4)


def test_regression_on_a_host() -> None:
    task = build("regress", TOKENIZER)
    host = hosted(score=task)
    rows = Table.of({"text": TEXTS, "value": [str(i / 2) for i in range(8)]})
    result = evaluate(host, "score", task, rows)
    assert result.loss == pytest.approx(
        sum((p.value - i / 2) ** 2 for i, p in enumerate(result.predictions)) / 8, rel=1e-4
    )
    junk = [{"text": "a", "value": "n/a"}]
    assert isinstance(predict(host, "score", task, junk)[0].value, float)
    with pytest.raises(DataError, match="finite number"):
        evaluate(host, "score", task, junk)


def of(*values: Any) -> list[Prediction]:
    return [Prediction(row, value) for row, value in enumerate(values)]


def test_collapse() -> None:
    assert "all 3 predictions are 'a'" in collapsed(of("a", "a", "a"), ["a", "b", "b"])
    assert "the most frequent is 'b' with 67 %" in collapsed(of("a", "a", "a"), ["a", "b", "b"])
    assert collapsed(of("a", "b"), ["a", "a"]) is None
    assert collapsed(of("a", "a"), ["a", "a"]) is None  # the data have one class
    assert collapsed(of("a"), ["b"]) is None  # one row cannot collapse
    assert collapsed(of(["O", "O"], ["O"]), [("O", "B-X"), ("O",)]) is not None
    assert collapsed(of(["O", "B-X"], ["O"]), [("O", "B-X"), ("O",)]) is None
    assert collapsed(of(0.5, 0.5000000001), (0.0, 1.0)) is not None
    assert collapsed(of(0.5, 0.6), (0.0, 1.0)) is None
    assert collapsed(of(), []) is None
