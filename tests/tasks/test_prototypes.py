"""PERFECT's task: mask tokens in texts and pairs, prototypes that are stored and decide alike everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from intarsia.data import Table
from intarsia.errors import ModuleError, SpecError, UsageError
from intarsia.host import Host
from intarsia.methods import build as method
from intarsia.modules import load, save
from intarsia.patches.labels import MultiMaskLabelsForm
from intarsia.tasks import build, evaluate, from_module, method_settings, predict
from intarsia.train import Recipe, train
from tests import zoo
from tests.host.kit import disturb
from tests.tasks import toys

TOKENIZER = toys.wordpiece()
MASK = TOKENIZER.mask_token_id
LABELS = ("early", "late")


def table() -> Table:
    texts = ["ab ac", "ad", "a b c d", "ba bd", "xy xz", "z", "w x y z", "yx zw"]
    return Table.of({"text": texts, "label": [LABELS[i // 4] for i in range(8)]})


def task(tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    return build("classify", tokenizer, labels=LABELS, settings={"masks": 2, **settings})


def hosted(carried: Any, *names: str) -> Host:
    host = Host(zoo.make("bert", headless=True)[0])
    for seed, name in enumerate(names):
        host.add(name, method("perfect", reduction=8).with_head(carried.head), seed=seed)
        disturb(host, name, seed, 0.3)
    host.model.eval()
    return host


@pytest.mark.parametrize("make", [toys.wordpiece, toys.unigram])
@pytest.mark.parametrize("place", ["end", "start"])
@pytest.mark.parametrize("pair", [None, "b"])
def test_masks_stand_where_they_should_whatever_is_cut(make: Any, place: str, pair: str | None) -> None:
    tokenizer = make()
    rows = [{"text": "a b", "b": "c d"}, {"text": "", "b": ""}, {"text": "a b c d e f g h", "b": "x y z"}]
    made = build("classify", tokenizer, labels=LABELS, settings={"masks": 3, "mask_place": place, "pair": pair, "max_length": 14})
    for feature in made.features(rows, labelled=False):
        ids = feature["input_ids"]
        where = [i for i, piece in enumerate(ids) if piece == tokenizer.mask_token_id]
        assert where == ([1, 2, 3] if place == "start" else [len(ids) - 4, len(ids) - 3, len(ids) - 2])
        assert len(ids) <= 14 and {len(v) for k, v in feature.items() if k != "row"} == {len(ids)}
    plain = build("classify", tokenizer, labels=LABELS, settings={"pair": pair, "max_length": 11}).features(rows, labelled=False)
    assert [[p for p in f["input_ids"] if p != tokenizer.mask_token_id] for f in made.features(rows, labelled=False)] == [
        f["input_ids"] for f in plain
    ]


def test_a_mask_token_in_the_text_is_no_mask() -> None:
    (feature,) = task().features([{"text": f"a {TOKENIZER.mask_token} b"}])
    assert feature["input_ids"].count(MASK) == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="has no mask token"):
        task(toys.bytelevel())
    with pytest.raises(UsageError, match="hinge"):
        task(problem="multi")
    with pytest.raises(UsageError, match="masks=-1"):
        task(masks=-1)
    made = task()
    with pytest.raises(ModuleError, match="0 heads with label embeddings"):
        host = Host(zoo.make("bert", headless=True)[0]).add("m", method("lora", rank=2))
        made.settle(host, "m", "m", made.features(table()), 4)
    with pytest.raises(SpecError, match="no training row has the label 'late'"):
        made.settle(hosted(made, "m"), "m", "m", made.features(table()[:4]), 4)


def test_losses_and_prototypes_are_the_formulas() -> None:
    made = task()
    host = hosted(made, "m")
    features = made.features(table())
    batch = made.collate(features)
    with torch.no_grad(), host.using("m") as model:
        out = model(**{key: batch[key] for key in made.keys})
    losses, _ = made.term_losses(out, batch)
    states = out.last_hidden_state[batch["input_ids"] == MASK].view(8, 2, -1)
    (form,) = [d.form for _, deltas in host.deltas("m") for d in deltas if isinstance(d.form, MultiMaskLabelsForm)]
    for row in range(8):
        y = int(batch["labels"][row])
        s = states[row] @ form.labels.detach().mT  # [n, M, M]
        want = sum(max(0.0, 1 - float(s[y][i, i]) + float(s[1 - y][i, i])) for i in range(2)) / 4
        assert float(losses[row]) == pytest.approx(want, rel=1e-4)
    made.settle(host, "m", "m", features, 3)
    for prediction in predict(host, "m", made, table()):
        mine = F.normalize(states[prediction.row], dim=-1)
        near = torch.stack([
            max(torch.exp(-(mine[i] - F.normalize(states[4 * y : 4 * y + 4, i].mean(0), dim=-1)).square().sum()) for i in range(2))
            for y in range(2)
        ])  # fmt: skip
        assert prediction.value == LABELS[int(near.argmax())]
        assert list(prediction.probabilities.values()) == pytest.approx((near / near.sum()).tolist(), abs=1e-4)  # type: ignore[union-attr]


def test_the_order_of_labels_does_not_matter() -> None:
    answers = []
    for labels in (LABELS, LABELS[::-1]):
        made = build("classify", TOKENIZER, labels=labels, settings={"masks": 1})
        host = hosted(made, "m")
        made.settle(host, "m", "m", made.features(table()), 4)
        answers.append([p.value for p in predict(host, "m", made, table())])
    assert answers[0] == answers[1]


def test_rows_with_modules_of_their_own_are_the_single_runs() -> None:
    made = task()
    host = hosted(made, "m", "n")
    for name in "mn":
        made.settle(host, name, name, made.features(table()), 4)
    rows = [{"text": row["text"]} for row in table()]
    mixed = predict(host, None, made, rows, per_row=["m", "n"] * 4)
    for name, start in (("m", 0), ("n", 1)):
        alone = predict(host, name, made, rows)
        for i in range(start, 8, 2):
            assert mixed[i].value == alone[i].value
            assert mixed[i].probabilities == pytest.approx(alone[i].probabilities, abs=1e-5)


OTHER = """
import sys, json
sys.path.insert(0, sys.argv[2])
from intarsia.host import Host
from intarsia.modules import load
from intarsia.tasks import from_module, predict
from tests import zoo
from tests.tasks import toys, test_prototypes
host = Host(zoo.make("bert", headless=True)[0])
module = load(sys.argv[1])
host.insert(module)
task = from_module(module, toys.wordpiece())
print(json.dumps([[p.value, p.probabilities] for p in predict(host, module.name, task, test_prototypes.table())]))
"""


@pytest.mark.parametrize("dev", [True, False])
def test_training_stores_prototypes_that_decide_alike_elsewhere(tmp_path: Path, dev: bool) -> None:
    chosen = method("perfect", reduction=8, masks=2)
    made = task(**method_settings("classify", chosen))
    host = Host(zoo.make("bert", headless=True)[0])
    host.add("m", chosen.with_head(made.head))
    recipe = Recipe(max_steps=24, batch_size=8, learning_rate=5e-3, head_learning_rate=1e-1, warmup=0.0, eval_every=6)
    result = train(host, "m", made, table(), table() if dev else None, recipe=recipe)
    found = predict(host, "m", made, table())
    assert evaluate(host, "m", made, table()).metrics["accuracy"].value >= 0.75
    if dev:
        assert result.metrics["accuracy"]["value"] == evaluate(host, "m", made, table()).metrics["accuracy"].value
    (key,) = [k for k in result.module.tensors if k.endswith("prototypes")]
    torch.testing.assert_close(result.module.tensors[key].norm(dim=-1), torch.ones(2, 2))
    assert isinstance(from_module(result.module, TOKENIZER), type(made))
    path = tmp_path / "m.safetensors"
    save(result.module, path)
    if dev:
        import json

        root = str(Path(__file__).parents[2])
        out = subprocess.run([sys.executable, "-c", OTHER, str(path), root], check=True, capture_output=True, text=True).stdout
        assert json.loads(out) == [[p.value, p.probabilities] for p in found]
    assert load(path).digest == result.module.digest
