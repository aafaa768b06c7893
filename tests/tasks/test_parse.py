"""Dependency parsing: data, losses, trees, the head as a module of its own in another process and per row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from intarsia.data import Table, read
from intarsia.errors import CompositionError, DataError, SpecError
from intarsia.host import Host
from intarsia.methods import build as method
from intarsia.modules import load, save
from intarsia.patches import Biaffine
from intarsia.patches.biaffine import BiaffineForm
from intarsia.tasks import build, evaluate, from_module, predict, score
from intarsia.train import Recipe, train
from tests import zoo
from tests.host.kit import disturb
from tests.tasks import toys

TOKENIZER = toys.wordpiece()
RELATIONS = ("det", "nsubj", "punct", "root")
CONLLU = """# sent_id = 1
1-2\tthecat\t_\t_\t_\t_\t_\t_\t_\t_
1\tthe\t_\tDET\t_\t_\t2\tdet\t_\t_
2\tcat\t_\tNOUN\t_\t_\t3\tnsubj\t_\t_
2.1\tis\t_\tAUX\t_\t_\t_\t_\t_\t_
3\tsat\t_\tVERB\t_\t_\t0\troot\t_\t_
4\t.\t_\tPUNCT\t_\t_\t3\tpunct\t_\t_

1\tmat\t_\tNOUN\t_\t_\t0\troot\t_\t_

"""


def table() -> Table:
    return Table.of(
        {
            "tokens": [("the", "cat", "sat", "."), ("mat",), ("the", "a", "on"), ("cat", ".")],
            "heads": [("2", "3", "0", "3"), ("0",), ("3", "3", "0"), ("0", "1")],
            "relations": [("det", "nsubj", "root", "punct"), ("root",), ("det", "det", "root"), ("root", "punct")],
        }
    )


def task(**settings: Any) -> Any:
    return build("parse", TOKENIZER, labels=RELATIONS, settings={"arc_width": 8, "relation_width": 6, **settings})


def hosted(parser: Any, *names: str, family: str = "bert") -> Host:
    host = Host(zoo.make(family, headless=True)[0])
    for seed, name in enumerate(names):
        host.add(name, method("lora", rank=2).with_head(parser.head), seed=seed)
        disturb(host, name, seed, 0.3)
    host.model.eval()
    return host


# -- data ------------------------------------------------------------------------------------------------------------


def test_conllu_gives_words_trees_and_tags(tmp_path: Path) -> None:
    path = tmp_path / "t.conllu"
    path.write_text(CONLLU, "utf-8")
    found = read(path)
    assert found[0] == {
        "tokens": ("the", "cat", "sat", "."), "tags": ("DET", "NOUN", "VERB", "PUNCT"), "heads": ("2", "3", "0", "3"),
        "relations": ("det", "nsubj", "root", "punct"), "skipped": ("1-2", "2.1"),
    }  # fmt: skip
    parser = task()
    features = parser.features(found)
    assert [parser.references(found)[1], features[1]["labels"]] == [((0, "root"),), [0, RELATIONS.index("root")]]
    counts = parser.counts
    assert (counts["words"], counts["multiword_tokens"], counts["empty_nodes"], counts["punctuation"]) == (5, 1, 1, 1)
    tagger = build("tag", TOKENIZER, table=found)  # parts of speech, through the same reader
    assert tagger.references(found)[0] == ("DET", "NOUN", "VERB", "PUNCT") and tagger.metric == "token_accuracy"


@pytest.mark.parametrize(
    ("heads", "says"),
    [(("2", "1"), "words 1, 2 form a cycle"), (("1", "0"), "words 1 form a cycle"), (("3", "0"), "'3'; 0 or the number of one of the 2 words"),
     (("_", "0"), "'_'"), (("-1", "0"), "'-1'"), (("0",), "2 words, 1 heads"), (("٢", "0"), "'٢'")],
)  # fmt: skip
def test_what_is_no_tree_is_refused(heads: tuple[str, ...], says: str) -> None:
    bad = Table.of({"tokens": [("a", "b")], "heads": [heads], "relations": [("root", "det")]})
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        task().features(bad)


def test_long_sentences_keep_all_their_words_or_are_refused() -> None:
    words = ("abcdef", "gh", "x")
    data = [{"tokens": words, "heads": ("0", "1", "1"), "relations": ("root", "det", "det")}]
    short = task(max_length=8)
    (feature,) = short.features(data)
    assert len(feature["input_ids"]) <= 8 and len(feature["words"]) == 3 and short.counts["shortened_rows"] == 1
    with pytest.raises(DataError, match="3 words, the model reads 2 pieces with max_length=4"):
        task(max_length=4).features(data)


def test_relations_that_training_had_not_are_wrong_and_counted() -> None:
    parser = task()
    data = [{**table()[0], "relations": ("det", "csubj", "root", "punct")}]
    (feature,) = parser.features(data)
    assert feature["labels"] == [2, 0, 3, -100, 0, 3, 3, 2] and parser.counts["unseen_relations"] == 1
    host = hosted(parser, "m", "n")
    assert parser.terms(parser.collate([feature])) == 7
    result = evaluate(host, "m", parser, data)
    assert result.metrics["las"].value <= 0.75 and result.predictions[0].scores["terms"] == 7
    evaluate(host, None, parser, data, per_row=["n"])


# -- losses and answers ----------------------------------------------------------------------------------------------


def scores_of(host: Host, parser: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad(), host.using("m", **parser.context(batch)) as model:
        found: torch.Tensor = model(**{key: batch[key] for key in parser.keys}).logits
    return found


@pytest.mark.parametrize("padding", ["right", "left"])
def test_losses_are_the_formulas_row_by_row(padding: str) -> None:
    """By hand, one sentence at a time, from the states at the first pieces of the words."""
    parser = task(padding=padding, standardise=False)
    host = hosted(parser, "m")
    features = parser.features(table())
    batch = parser.collate(features)
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # BERT counts positions from the left
    with torch.no_grad(), host.using("m", **parser.context(batch)) as model:
        scores = model(**{key: batch[key] for key in parser.keys}, position_ids=counted).logits
    losses, owner = parser.term_losses({"logits": scores}, batch)
    (form,) = [d.form for _, deltas in host.deltas("m") for d in deltas if isinstance(d.form, BiaffineForm)]
    p = dict(form.named_parameters())
    for row, feature in enumerate(features):
        one = parser.collate([feature])
        with torch.no_grad(), host.using("m", **parser.context(one)) as model:
            states = model(**{key: one[key] for key in parser.keys}).last_hidden_state[0]
        x = states[feature["words"]]
        heads = torch.cat([p["root"][None], x])
        mlp = {n: F.leaky_relu(s @ p[n].T + p[f"{n}_bias"], 0.1) for n, s in
               (("arc_dependent", x), ("arc_head", heads), ("relation_dependent", x), ("relation_head", heads))}  # fmt: skip
        want = []
        gold = torch.tensor(feature["labels"]).view(-1, 2)
        for i, (head, _) in enumerate(gold.tolist()):
            arcs = torch.stack([mlp["arc_dependent"][i] @ p["arc"] @ h + p["arc_bias"] @ h for h in mlp["arc_head"]])
            want.append(-F.log_softmax(arcs, 0)[head])
        for i, (head, relation) in enumerate(gold.tolist()):
            a, b = torch.cat([mlp["relation_dependent"][i], torch.ones(1)]), torch.cat([mlp["relation_head"][head], torch.ones(1)])
            want.append(-F.log_softmax(torch.stack([a @ r @ b for r in p["relation"]]), 0)[relation])
        torch.testing.assert_close(losses[owner == row], torch.stack(want).detach(), rtol=1e-4, atol=1e-5)
    assert len(losses) == parser.terms(batch) == 2 * 10


def test_answers_are_trees_with_root_where_the_root_is() -> None:
    parser = task()
    host = hosted(parser, "m")
    found = predict(host, "m", parser, table(), batch_size=3)
    for prediction, row in zip(found, table()):
        heads = [head for head, _ in prediction.value]
        assert len(heads) == len(row["tokens"]) and heads.count(0) == 1
        assert all((head == 0) == (relation == "root") for head, relation in prediction.value)
    again = predict(host, "m", parser, table(), batch_size=1)
    assert [p.value for p in again] == [p.value for p in found]


def test_without_words_the_head_says_what_it_needs() -> None:
    parser = task()
    host = hosted(parser, "m")
    batch = parser.collate(parser.features(table()))
    with pytest.raises(CompositionError, match="words"), host.using("m") as model:
        model(**{key: batch[key] for key in parser.keys})
    with pytest.raises(CompositionError, match="one at least"), host.using("m", words=[[1], [2], [], [1]]) as model:
        model(**{key: batch[key] for key in parser.keys})
    with pytest.raises(SpecError, match="all different"):
        Biaffine(("a", "a"))


def test_scores_count_words_with_their_subtypes() -> None:
    right = [[(2, "nsubj:pass"), (0, "root"), (2, "punct")], [(0, "root")]]
    said = [[(2, "nsubj"), (0, "root"), (1, "punct")], [(0, "root")]]
    assert [score(m, said, right).value for m in ("uas", "las", "las_no_punct")] == [0.75, 0.5, pytest.approx(2 / 3)]
    assert "punct:kept" in score("las", said, right).signature
    low = score("las", said, right)
    assert low.low is not None and low.low <= low.value <= low.high  # type: ignore[operator]


# -- the laws of a head ----------------------------------------------------------------------------------------------


def test_rows_with_parsers_of_their_own_are_the_single_runs() -> None:
    parser = task()
    host = hosted(parser, "m", "n")
    other = build("parse", TOKENIZER, labels=("x", "root", "y"), settings={"arc_width": 4, "relation_width": 4})
    host.add("o", method("pfeiffer", reduction=4).with_head(other.head))
    disturb(host, "o", 5, 0.3)
    data = [{"tokens": row["tokens"]} for row in table()]
    rows = ["m", "n", "o", "m"]
    mixed = predict(host, None, parser, data, per_row=rows)
    for i, name in enumerate(rows):
        alone = predict(host, name, other if name == "o" else parser, data[i : i + 1])[0]
        assert mixed[i].value == alone.value


OTHER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from intarsia.host import Host
from intarsia.modules import load
from intarsia.tasks import from_module
from tests import zoo
from tests.tasks import toys, test_parse
host = Host(zoo.make("bert", headless=True)[0])
module = load(sys.argv[1])
host.insert(module)
host.model.eval()
parser = from_module(module, toys.wordpiece())
batch = parser.collate(parser.features(test_parse.table()))
torch.save(test_parse.scores_of(host, parser, batch), sys.argv[2])
"""


def test_learns_and_is_the_same_in_another_process(tmp_path: Path) -> None:
    parser = task(dropout=0.0)
    host = Host(zoo.make("bert", headless=True)[0])
    host.add("m", method("lora", rank=2).with_head(parser.head))
    recipe = Recipe(max_steps=40, batch_size=4, learning_rate=5e-3, head_learning_rate=2e-2, warmup=0.0)
    result = train(host, "m", parser, table(), table(), recipe=recipe)
    assert result.metrics["las"]["value"] == 1.0 and result.metrics["uas"]["n"] == 4
    path = tmp_path / "m.safetensors"
    save(result.module, path)
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", OTHER, str(path), str(tmp_path / "scores.pt"), root], check=True)
    host.model.eval()
    stored = from_module(load(path), TOKENIZER)
    batch = stored.collate(stored.features(table()))
    assert torch.equal(torch.load(tmp_path / "scores.pt"), scores_of(host, stored, batch))
    assert evaluate(host, "m", stored, table()).metrics["las"].value == 1.0
    assert np.isfinite([p.scores["loss"] for p in evaluate(host, "m", stored, table()).predictions]).all()
