"""Language modules: every objective and method runs, what is frozen stays, heads go, interrupted recipes go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.bases import Base, load
from intarsia.data import Table
from intarsia.errors import DataError, UsageError
from intarsia.host import Host
from intarsia.languages.cards import card_of
from intarsia.languages.corpus.build import Corpus, read_corpus
from intarsia.languages.objectives import balanced, joined, learning
from intarsia.languages.recipes import RECIPES, Stage
from intarsia.languages.runner import Given, check, run
from intarsia.languages.train import Trained, method_of, train_language, warm_head
from intarsia.languages.transfer import compare
from intarsia.languages.vocabulary.build import extend
from intarsia.languages.vocabulary.tokenizer import tokenizer_of
from intarsia.modules import Module
from intarsia.modules import load as load_module
from intarsia.tasks import Align, AlignOptions
from intarsia.train import Recipe
from tests.cli.bases import make_topics
from tests.cli.run import Here

SHORT = Recipe(max_steps=2, batch_size=8, eval_batch_size=32, warmup=0.0)


@pytest.fixture(scope="module")
def small(corpus: Corpus) -> Corpus:
    assert corpus.dev is not None and corpus.parallel_train is not None and corpus.parallel_dev is not None
    return replace(corpus, train=corpus.train[:40], dev=corpus.dev[:8], parallel_train=corpus.parallel_train[:40], parallel_dev=corpus.parallel_dev[:8])


def learn(place: Path, kind: Any, corpora: list[Corpus], method: str = "lora", **more: Any) -> tuple[Trained, Host]:
    base = load(place, head=kind)
    host = Host(base.model, tokenizer=base.tokenizer, base_name="tiny")
    recipe = more.pop("recipe", SHORT)
    return train_language(host, base, corpora, name="lang", method=method_of(method), recipe=recipe, max_length=48, **more), host


def vocabulary(base: Base, corpus: Corpus) -> Module:
    host = Host(base.model, tokenizer=base.tokenizer)
    made = extend(corpus.texts(), base, host.fingerprint, name="words", language="kab", size=120).module
    host.close()
    return made


@pytest.mark.parametrize("method", ["mad-x", "lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lt-sft", "bitfit", "full"))])
def test_methods_by_mlm_under_the_bases_own_head(folder: Path, small: Corpus, method: str) -> None:
    made, host = learn(folder, "masked-lm", [small], method, measure=False)
    assert made.module.method.head is None and made.whole is None and made.result.steps >= 1
    assert made.module.roles["language"] == "kab" and made.module.card.languages == ("kab",)
    assert any("biases" in w for w in made.module.card.warnings) and "religious text only" in made.module.card.warnings
    assert any(d.sha256 == small.digest for d in made.module.card.data)
    assert host.names == ("lang",)


def test_without_a_head_the_module_trains_one_and_gives_it_back_apart(folder: Path, small: Corpus) -> None:
    made, _ = learn(folder, "none", [small])
    assert made.whole is not None and made.whole.method.head is not None and made.module.method.head is None
    assert made.before is None and made.after is not None and made.after.bits > 0
    assert set(made.whole.tensors) - set(made.module.tensors) == {k for k in made.whole.tensors if k.startswith("logits/")}


def test_a_warmed_up_head_stays_frozen(folder: Path, bare: Base, small: Corpus) -> None:
    host = Host(bare.model, tokenizer=bare.tokenizer)
    head = warm_head(host, bare, small.texts(), recipe=SHORT, max_length=48).module
    host.close()
    made, running = learn(folder, "none", [small], head=head)
    assert running.extract("lm_head").digest == head.digest and made.before is not None and made.whole is None
    with pytest.raises(UsageError, match="LM head of its own"):
        learn(folder, "masked-lm", [small], head=head)


@pytest.mark.parametrize("kind", ["masked-lm", "none"])
def test_a_vocabulary_is_trained_along_and_its_copied_rows_stay(folder: Path, base: Base, bare: Base, small: Corpus, kind: Any) -> None:
    words = vocabulary(base if kind == "masked-lm" else bare, small)
    made, _ = learn(folder, kind, [small], vocabulary=words, measure=False)
    key = "tied/vocabulary.factor.value"
    assert not torch.equal(made.module.tensors[key], words.tensors[key])
    for leaf in ("source", "pieces", "scores"):
        assert torch.equal(made.module.tensors[f"tied/vocabulary.{leaf}"], words.tensors[f"tied/vocabulary.{leaf}"])
    assert not any(k.startswith("logits/") for k in made.module.tensors)
    with pytest.raises(UsageError, match="no place beside a vocabulary"):
        learn(folder, kind, [small], "full", vocabulary=words)


def test_a_new_vocabulary_starts_from_a_heads_numbers(folder: Path, bare: Base, small: Corpus) -> None:
    host = Host(bare.model, tokenizer=bare.tokenizer)
    head = warm_head(host, bare, small.texts(), recipe=SHORT, max_length=48).module
    host.close()
    words = vocabulary(bare, small)
    made, _ = learn(folder, "none", [small], vocabulary=words, head=head, recipe=replace(SHORT, max_steps=1, learning_rate=1e-9, head_learning_rate=1e-9), measure=False)
    assert made.whole is not None
    bias, source = made.whole.tensors["logits/head.bias"], words.tensors["tied/vocabulary.source"].long()
    assert torch.allclose(bias[source >= 0], head.tensors["logits/head.bias"][source[source >= 0]], atol=1e-6)
    assert torch.allclose(made.whole.tensors["logits/head.dense"], head.tensors["logits/head.dense"], atol=1e-6)


@pytest.mark.parametrize("objective", ["tlm", "mlm+tlm"])
def test_parallel_verses(folder: Path, small: Corpus, objective: Any) -> None:
    made, host = learn(folder, "masked-lm", [small], objective=objective, measure=False)
    assert made.result.steps == 2
    assert small.parallel_train is not None
    text = joined(small.parallel_train, host.tokenizer).texts("text")[0]
    assert text == f"{small.parallel_train.texts('source')[0]} [SEP] {small.parallel_train.texts('target')[0]}"
    with pytest.raises(DataError, match="--parallel"):
        learn(folder, "masked-lm", [replace(small, parallel_train=None)], objective=objective)


# -- alignment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["regression", "contrastive"])
def test_alignment_trains(folder: Path, small: Corpus, how: str) -> None:
    recipe = Recipe(max_steps=12, batch_size=16, log_every=1, learning_rate=5e-3, base_dropout=False, eval_every=12)
    made, host = learn(folder, "none", [small], objective="align", recipe=recipe, settings={"how": how})
    assert set(made.result.metrics) == {"retrieval", "retrieval_back", "cosine"}
    losses = [line["loss"] for line in made.result.history if "loss" in line]
    assert len(losses) == 12
    if how == "regression":
        assert sum(losses[-4:]) < sum(losses[:4])
    assert made.whole is None and made.after is None
    with pytest.raises(UsageError, match="without a head"):
        learn(folder, "masked-lm", [small], objective="align")
    host.close()


def test_the_teacher_is_the_bare_base_and_the_losses_are_what_they_say(bare: Base, small: Corpus) -> None:
    found = learning([small], "align", bare.tokenizer, bare, max_length=48)
    task = found.task
    assert isinstance(task, Align)
    features = task.features(found.train)
    assert len(features) == 2 * len(found.train)
    own = [f for f in features if f["kind"] == 1]
    batch = task.collate(own[:5])
    with torch.no_grad():
        outputs = bare.model(**{key: batch[key] for key in task.keys})
    assert torch.allclose(task.vectors(outputs, batch), batch["teacher"], atol=1e-5)  # the known language's own sentences are where they should be
    losses, owner = task.term_losses(outputs, batch)
    assert losses.abs().max() < 1e-8 and owner.tolist() == [0, 1, 2, 3, 4]
    other = Align(bare.tokenizer, AlignOptions(how="contrastive", temperature=0.1, max_length=48))
    both = task.collate([features[0], own[0], features[1]])
    assert set(task.taught) == set(found.train.texts("source")[:5])  # each once, and only when it is needed
    with torch.no_grad():
        outputs = bare.model(**{key: both[key] for key in task.keys})
    losses, _ = other.term_losses(outputs, both)
    mine, teacher = task.vectors(outputs, both).numpy(), both["teacher"].numpy()
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (mine, teacher)]
    alike = unit[0] @ unit[1].T / 0.1
    wanted = [-alike[i, i] + np.log(sum(np.exp(alike[i, j]) for j in range(3) if j == i or both["row"][j] != both["row"][i])) for i in range(3)]
    assert losses.numpy() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UsageError, match="bind"):
        other.collate(other.features(found.train)[:2])


def test_an_alignment_is_evaluated_like_any_task(cli: Here, bare: Base, folder: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare.model.save_pretrained("bare")
    bare.tokenizer.save_pretrained("bare")
    assert corpus.parallel_dev is not None
    rows = zip(corpus.parallel_dev.texts("source"), corpus.parallel_dev.texts("target"))
    Path("pairs.tsv").write_text("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in rows), "utf-8")
    for base in ("bare", str(folder)):  # the second has an LM head, which goes unused
        name = Path(base).name
        cli("train", "--task", "align", "--base", base, "--train", "pairs.tsv", "--method", "bitfit", "--max-steps", "1", "--name", name, "-q").ok()
        found = cli("eval", "-m", f"runs/{name}/module.safetensors", "--base", base, "pairs.tsv", "--json").ok().json
        assert set(found["data"]["pairs"]["metrics"]) == {"retrieval", "retrieval_back", "cosine"}
        answers = cli("predict", "-m", f"runs/{name}/module.safetensors", "--base", base, "pairs.tsv", "--json").ok().json
        assert all(isinstance(number, float) for row in answers for vector in row["prediction"] for number in vector)


def test_languages_of_a_pair_are_seen_equally_often(small: Corpus) -> None:
    other = replace(small, language="en", train=Table.of({"id": ["1"], "source": ["x"], "text": ["only one"]}))
    both = balanced([small.train.only("text"), other.train.only("text")])
    assert both.texts("text").count("only one") == len(small.train) == len(both) // 2


def test_the_card_of_several_languages_warns_of_each_text(small: Corpus) -> None:
    step = {"name": "length", "before": 9, "dropped": {"long": 2}}
    other = replace(small, language="en", manifest={**small.manifest, "sources": [{**small.manifest["sources"][0], "kind": "text"}], "steps": [step]})
    alone, both = card_of(small, base="b", method="m"), card_of(small, other, base="b", method="m")
    assert both.languages == ("kab", "en") and len(both.data) == 2 * len(alone.data)
    assert "religious text only" in alone.warnings and "religious text only" not in both.warnings
    assert "corpus en: length dropped 2 of 9 lines" in both.warnings


# -- transfer and recipes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(folder: Path, small: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Given:
    from intarsia.data import read

    place = tmp_path_factory.mktemp("topics")
    tables = [read(make_topics(place / f"{n}.csv", 24, n)) for n in range(3)]
    both = {"eng": replace(small, language="eng"), "kab": small}
    labels = {"eng": tables[0], "kab": tables[1]}
    return Given(
        folder, both, labels, {"eng": tables[2]}, {"eng": tables[2], "kab": tables[1]}, "classify", {"max_length": 32}, SHORT, SHORT,
        vocabulary_size=120, vocabulary_rank=8, max_length=48,
    )  # fmt: skip


RUNNABLE = [name for name, recipe in RECIPES.items() if not recipe.ready_for and name != "nearest"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_recipe_is_complete(name: str, given: Given) -> None:
    stages = check(RECIPES[name], given, {"source": "eng", "target": "kab", "sources": "eng"})
    assert stages[-1].kind == "evaluate" and RECIPES[name].summary
    assert all(isinstance(stage, Stage) and "{" not in stage.module + stage.expression for stage in stages)


@pytest.mark.parametrize("name", ["unks", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNNABLE if name != "unks")])
def test_recipes_run_and_go_on(name: str, given: Given, folder: Path, tmp_path: Path) -> None:
    headless = name in ("head-mlm", "align")
    if headless:  # a base whose folder declares no head
        bare = load(folder, head="none")
        bare.model.save_pretrained(tmp_path / "bare")
        bare.tokenizer.save_pretrained(tmp_path / "bare")
        given = replace(given, base=tmp_path / "bare")
    notes: list[str] = []
    found = run(RECIPES[name], given, folder=tmp_path / "run", source="eng", target="kab", sources="eng", note=notes.append)
    assert found.results and all(0 <= one.metrics["accuracy"].value <= 1 and one.majority for one in found.results)
    again = run(RECIPES[name], given, folder=tmp_path / "run", source="eng", target="kab", sources="eng", note=notes.append)
    assert not again.seconds and [one.metrics for one in again.results] == [one.metrics for one in found.results]
    if name == "unks":
        taken = run(RECIPES[name], given, folder=tmp_path / "taken", modules=found.modules, source="eng", target="kab", sources="eng")
        assert not taken.seconds and taken.modules == found.modules
    if name == "bad-x":
        assert found.modules["task-eng-kab"].requires == (found.modules["lang-eng-kab"].digest,)
        assert [one.data for one in found.results] == ["kab", "eng"]
    if name == "unks":
        assert {one.tokenizer for one in found.results} == {"lang-kab"}
        assert len(tokenizer_of(found.modules["lang-kab"], load(folder).tokenizer)) == 120


def test_turns_are_taken_by_step(folder: Path) -> None:
    from types import SimpleNamespace

    from intarsia.languages.runner import Turns

    turns, model = Turns(["a >> t", "b >> t"]), SimpleNamespace(expression=None)
    seen = []
    for step in range(4):
        turns.on_step_begin(None, SimpleNamespace(global_step=step), None, model=SimpleNamespace(module=model))
        seen.append(str(model.expression))
    assert seen == ["a >> t", "b >> t"] * 2


def test_recipes_say_what_they_lack(given: Given) -> None:
    with pytest.raises(UsageError, match="waits for"):
        check(RECIPES["emea"], given, {"source": "eng", "target": "kab", "relatives": "x"})
    with pytest.raises(UsageError, match=r"lacks the corpus of fin"):
        check(RECIPES["mad-x"], given, {"source": "eng", "target": "fin"})
    with pytest.raises(UsageError, match="stands for nothing"):
        check(RECIPES["mad-x"], given, {"source": "eng"})
    with pytest.raises(UsageError, match="lacks the module lang-shi"):
        check(RECIPES["nearest"], given, {"source": "eng", "near": "shi", "target": "kab"})


def test_from_text_to_answers_on_the_command_line(cli: Here, folder: Path, bibles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new, known = map(str, bibles)
    test = make_topics(tmp_path / "test.csv", 20, 5)
    cli("corpus", "build", "--language", "kab", "--bible", new, "--parallel", known, "--licence", "CC0-1.0", "--test-texts", str(test), "-o", "kab", "-q").ok()
    assert "corpus" in cli("corpus", "show", "kab").ok().out
    seen = cli("lang", "probe", "kab", "--language", "kab", "--base", str(folder), "--bits-lines", "0", "--typology", "none", "--json").ok().json
    assert seen["measures"]["lines"] == len(read_corpus("kab").train)
    cli("vocab", "extend", "kab", "--base", str(folder), "--size", "120", "-o", "words.safetensors").ok()
    short = ("--max-steps", "2", "--max-length", "48", "-q")
    told = cli("lang", "train", "kab", "--base", str(folder), "--vocab", "words.safetensors", "--method", "lora", "--set", "rank=2", *short, "-o", "lang.safetensors", "--json").ok().json
    assert told["steps"] == 2 and told["bits_per_character"]["after"] > 0 and "religious text only" in told["warnings"]
    make_topics(tmp_path / "train.csv", 40, 6)
    cli("train", "--base", str(folder), "--train", "train.csv", "--method", "bitfit", "--max-steps", "2", "--name", "topic", "-q").ok()
    words = ("transfer", "eval", "-m", "lang=lang.safetensors", "-m", "topic=runs/topic/module.safetensors", "--expr", "topic", "--expr", "lang >> topic")
    words = (*words, "--base", str(folder))
    found = cli(*words, f"kab={test}", "--json", "--out", "result.json").ok().json
    assert [row["tokenizer"] for row in found["results"]] == ["base", "lang"] and found["warnings"]
    assert (tmp_path / "result.json").exists() and "majority class" in cli(*words, f"kab={test}").ok().out
    assert "no module given" in cli(*words, "--expr", "lamg >> topic", f"kab={test}").error(2)
    assert "not one of" in cli("lang", "train", "kab", "--objective", "clm", "-o", "x.safetensors").error(2)
    assert load_module("lang.safetensors").card.languages == ("kab",)
    cli("lang", "head", known, "--base", str(folder), "-o", "head.safetensors", "-q").error(2)  # this base has a head
    assert compare is not None
