"""Vocabularies: copied rows are the base's bit for bit, tokenizers come back from their pieces, nothing depends on chance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.bases import Base
from intarsia.errors import CompositionError, ModuleError, SpecError, UsageError
from intarsia.host import Host
from intarsia.languages.corpus.build import Corpus, save
from intarsia.languages.vocabulary.build import INITS, extend, method_of, plan, size_of
from intarsia.languages.vocabulary.factorise import FACTORISATIONS, factorise, kmeans, rebuilt
from intarsia.languages.vocabulary.start import overlap, sparsemax
from intarsia.languages.vocabulary.tokenizer import canonical, make, tokenizer_of, train
from intarsia.methods import METHODS, Method, Patch, Policy
from intarsia.modules import dumps, load, loads
from intarsia.patches.factors import check_law
from intarsia.patches.vocabulary import Coded, Exchange, Vocabulary, VocabularyBias
from tests import zoo
from tests.cli.run import Here
from tests.languages.conftest import verses

SIZE = 150


@pytest.fixture(scope="module")
def host(base: Base) -> Iterator[Host]:
    made = Host(base.model, tokenizer=base.tokenizer, base_name=base.name)
    yield made
    made.close()


def extended(base: Base, host: Host, corpus: Corpus, **settings_: Any) -> Any:
    assert corpus.parallel_train is not None
    pairs = list(zip(corpus.parallel_train.texts("source"), corpus.parallel_train.texts("target")))
    return extend(corpus.texts(), base, host.fingerprint, name="words", language="kab", **{"size": SIZE, "pairs": pairs, "rank": 6, "clusters": 3, "hidden": 8, **settings_})


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_training_gives_the_same_pieces_and_knows_every_character(base: Base, corpus: Corpus) -> None:
    first, second = (train(corpus.texts(), SIZE, base.tokenizer) for _ in range(2))
    assert first == second and len(first) == len(set(first.texts)) <= SIZE
    tokenizer = make(first, base.tokenizer)
    assert tokenizer.unk_token_id not in [i for ids in tokenizer(list(verses(0).values()), add_special_tokens=False)["input_ids"] for i in ids]


def test_special_tokens_keep_their_ids_and_places(base: Base, corpus: Corpus) -> None:
    tokenizer = make(train(corpus.texts(), SIZE, base.tokenizer), base.tokenizer)
    assert tokenizer.all_special_ids == base.tokenizer.all_special_ids
    text, pair = tokenizer("kato", "mi"), base.tokenizer("kato", "mi")
    marks = [(t, k) for t, k in zip(tokenizer.convert_ids_to_tokens(text["input_ids"]), text["token_type_ids"]) if t in tokenizer.all_special_tokens]
    wanted = [(t, k) for t, k in zip(base.tokenizer.convert_ids_to_tokens(pair["input_ids"]), pair["token_type_ids"]) if t in base.tokenizer.all_special_tokens]
    assert marks == wanted and len(marks) == 3


@given(st.lists(st.sampled_from(sorted(set("".join(verses(0).values())))), max_size=30).map("".join))
@settings(max_examples=50, deadline=None)
def test_text_comes_back_from_its_pieces(corpus: Corpus, base: Base, text: str) -> None:
    tokenizer = make(train(corpus.texts(), SIZE, base.tokenizer), base.tokenizer) if not _MADE else _MADE[0]
    _MADE[:] = [tokenizer]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False) == " ".join(text.split())


_MADE: list[Any] = []


def test_canonical_pieces_of_families(base: Base) -> None:
    found = canonical(base.tokenizer)
    assert found["▁a"] == base.tokenizer.convert_tokens_to_ids("a") and found["a"] == base.tokenizer.convert_tokens_to_ids("##a") and "[CLS]" not in found


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_rows_of_overlapping_pieces_are_the_bases(base: Base, host: Host, corpus: Corpus, init: str) -> None:
    made = extended(base, host, corpus, init=init)
    module = loads(dumps(made.module))
    matrix = base.model.get_input_embeddings().weight
    alike = overlap(train(corpus.texts(), SIZE, base.tokenizer), base.tokenizer)
    assert len(alike) > 20
    host.insert(module, name="words")
    try:
        ids = torch.tensor([sorted(alike)])
        with host.using("words") as model:
            found = model.get_input_embeddings()(ids)[0]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(found, matrix[[alike[i] for i in sorted(alike)]])
        assert logits.shape[-1] == len(made.tokenizer)
        rows = next(t for k, t in module.tensors.items() if k.endswith(("factor.value", "factor.codes")))
        assert len(rows) == len(made.tokenizer) - len(alike)  # new rows only are stored
    finally:
        host.remove("words")
    assert torch.equal(model.get_input_embeddings().weight, matrix)
    again = extended(base, host, corpus, init=init).module
    assert again.digest == made.module.digest
    assert tokenizer_of(module, base.tokenizer)(corpus.texts()[:20])["input_ids"] == made.tokenizer(corpus.texts()[:20])["input_ids"]


def test_copied_rows_can_be_trained_too(base: Base, host: Host, corpus: Corpus) -> None:
    fixed, free = (extended(base, host, corpus, train_copied=flag) for flag in (False, True))
    assert size_of(free.module)[0] > size_of(fixed.module)[0]
    value = free.module.tensors["tied/vocabulary.factor.value"]
    alike = overlap(train(corpus.texts(), SIZE, base.tokenizer), base.tokenizer)
    own = [i for i in range(SIZE) if int(free.module.tensors["tied/vocabulary.source"][i]) < 0]
    place = next(n for n, i in enumerate(own) if i in alike)
    assert torch.equal(value[place], base.model.get_input_embeddings().weight[alike[own[place]]])


def test_appended_words_leave_the_rest_alone(base: Base, host: Host, corpus: Corpus) -> None:
    made = extended(base, host, corpus, mode="append", init="mean", size=300)
    module = loads(dumps(made.module))
    tokenizer = tokenizer_of(module, base.tokenizer)
    assert len(tokenizer) == len(base.tokenizer) + made.module.tensors["tied/vocabulary.source"].numel() > len(base.tokenizer)
    other = "zyx wvu, qq 12."
    assert tokenizer(other)["input_ids"] == base.tokenizer(other)["input_ids"]
    assert sum(map(len, tokenizer(corpus.texts())["input_ids"])) < sum(map(len, base.tokenizer(corpus.texts())["input_ids"]))
    host.insert(module, name="more")
    try:
        ids = torch.tensor([base.tokenizer(other)["input_ids"]])
        plain = base.model(input_ids=ids).logits
        with host.using("more") as model:
            logits = model(input_ids=ids).logits
        assert torch.equal(logits[..., : plain.shape[-1]], plain) and logits.shape[-1] == len(tokenizer)
    finally:
        host.remove("more")


def test_what_means_nothing_is_refused(base: Base, host: Host, corpus: Corpus) -> None:
    for settings_, message in (
        ({"init": "wechsel"}, "init is one of"), ({"mode": "append", "init": "mf"}, "whole vocabulary"), ({"init": "parallel", "pairs": []}, "parallel verses"),
        ({"mode": "append", "init": "focus"}, "vocabulary of its own"), ({"size": 10}, "leaves no room"), ({"init": "mf", "rank": 32}, "rank 32"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            extended(base, host, corpus, **settings_)
    with pytest.raises(SpecError, match="copies no more"):
        Vocabulary(3, 4)
    host.add("a", method_of(Vocabulary(20, 5, 0), output_bias=True))
    host.add("b", METHODS["bitfit"].build())
    try:
        ids = torch.tensor([[1, 2, 3]])
        with host.using("b >> a") as model:
            assert model(input_ids=ids).logits.shape[-1] == 20
        with pytest.raises(CompositionError, match="not in a mixture"), host.using("0.5*a + 0.5*b") as model:
            model(input_ids=ids)
        assert "changes the number of rows" in str(host.why_not_foldable("a"))
    finally:
        host.remove("a")
        host.remove("b")


def test_pieces_of_a_file_are_checked(base: Base, host: Host, corpus: Corpus) -> None:
    from dataclasses import replace

    module = extended(base, host, corpus).module
    broken = dict(module.tensors)
    broken["tied/vocabulary.pieces"] = torch.full_like(broken["tied/vocabulary.pieces"], 0xFF)
    with pytest.raises(ModuleError, match="not UTF-8"):
        tokenizer_of(replace(module, tensors=broken), base.tokenizer)
    broken["tied/vocabulary.pieces"] = torch.full_like(broken["tied/vocabulary.pieces"], 0x61)
    with pytest.raises(ModuleError, match="different pieces"):
        tokenizer_of(replace(module, tensors=broken), base.tokenizer)


# -- the axis ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "llama-tied", "t5", "albert", "gpt2", "distilbert"])
def test_any_family_takes_a_vocabulary(family: str, mode: str) -> None:
    model, batch = zoo.make(family)
    spec = Vocabulary(40, 20 if mode == "replace" else 0, 5, mode)  # type: ignore[arg-type]
    patches = (Patch("words", "embed.weight", spec, Exchange(), port="weight"), Patch("bias", "head.bias", VocabularyBias(), Exchange(), port="weight", optional=True))
    host = Host(model)
    host.add("v", Method("v", patches, Policy()))
    rows = 40 if mode == "replace" else zoo.VOCAB + 40
    batch = {key: value % rows if "ids" in key else value for key, value in batch.items()}
    with host.using("v") as running:
        first = running(**batch).logits
    assert first.shape[-1] == rows
    if mode == "append":
        known = {key: value % zoo.VOCAB if "ids" in key else value for key, value in batch.items()}
        plain = model(**known).logits
        with host.using("v") as running:
            assert torch.allclose(running(**known).logits[..., : zoo.VOCAB], plain, atol=1e-6)
    stored = loads(dumps(host.extract("v")))
    host.remove("v")
    host.insert(stored)
    with host.using("v") as running:
        assert torch.equal(running(**batch).logits, first)
    host.close()


@pytest.mark.parametrize("spec", [Coded(4), Coded(4, 3), Coded(4, hidden=6)])
def test_codes_obey_the_law_of_factors_and_train_alone(spec: Coded) -> None:
    model, _ = zoo.make("bert")
    host = Host(model)
    host.add("v", Method("v", (Patch("words", "embed.weight", Vocabulary(12, 0, 0, factor=spec), Exchange(), port="weight"),), Policy()))
    assert list(host.parameters("v")) == ["tied/vocabulary.factor.codes"]
    tensors = host.tensors("v")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
        if spec.clusters > 1:
            tensors["tied/vocabulary.factor.cluster"].copy_(torch.arange(12) % spec.clusters)
    factor = host.deltas("v")[0][1][0].form.words.factor  # type: ignore[union-attr]
    assert check_law(factor, torch.randn(3, zoo.WIDTH, generator=draw))
    cluster = tensors.get("tied/vocabulary.factor.cluster")
    shared = {leaf: tensors[f"tied/vocabulary.factor.{leaf}"] for leaf in ("basis", "bias", "top") if f"tied/vocabulary.factor.{leaf}" in tensors}
    assert torch.allclose(factor.materialise(), rebuilt(spec, factor.codes, cluster, shared), atol=1e-6)
    host.close()


# -- factorisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FACTORISATIONS)
def test_factorisations_rebuild_and_encode(how: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 5, generator=draw) @ torch.randn(5, 24, generator=draw)
    found = factorise(rows, how, rank=5, clusters=4, hidden=64, steps=600)
    made = rebuilt(found.spec, found.codes, found.cluster, found.shared)
    assert found.error == pytest.approx(float((made - rows).square().sum() / rows.square().sum()), abs=1e-6)
    assert found.error < (1e-6 if how != "mf-neural" else 0.2)
    codes, cluster = found.encode(rows[:20])
    again = rebuilt(found.spec, codes, cluster, found.shared)
    assert float((again - rows[:20]).square().sum() / rows[:20].square().sum()) < (1e-6 if how != "mf-neural" else 0.3)
    if how == "mf":
        assert torch.linalg.matrix_rank(made) == 5


def test_a_lower_rank_errs_more_and_clusters_err_less() -> None:
    rows = torch.randn(300, 20, generator=torch.Generator().manual_seed(2))
    errors = [factorise(rows, "mf", rank=r).error for r in (2, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert factorise(rows, "mf-kmeans", rank=8, clusters=6).error < errors[1]
    assert len(kmeans(rows, 6).unique()) == 6


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_sparsemax_is_a_projection_onto_the_simplex(values: list[float]) -> None:
    found = sparsemax(np.array(values))
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    assert sparsemax(found) == pytest.approx(found, abs=1e-9)


def test_the_verbs(cli: Here, corpus: Corpus, folder: Path, tmp_path: Path) -> None:
    save(corpus, tmp_path / "kab")
    told = cli("vocab", "plan", str(tmp_path / "kab"), "--base", str(folder), "--size", "80,140", "--json").ok().json
    assert [line["size"] for line in told] == [0, 80, 140] and told[2]["pieces_per_word"] < told[1]["pieces_per_word"] < told[0]["pieces_per_word"]
    out = tmp_path / "v.safetensors"
    found = cli("vocab", "extend", str(tmp_path / "kab"), "--base", str(folder), "--size", "120", "--init", "focus", "-o", str(out), "--json").ok().json
    module = load(out)
    assert found["pieces"] == 120 and found["trained"] == size_of(module)[0] and module.card.languages == ("kab",) and "religious text only" in module.card.warnings
    assert "exists" in cli("vocab", "extend", str(tmp_path / "kab"), "--base", str(folder), "-o", str(out)).error(2)
    assert plan is not None
