"""Whole epochs on real texts: `train` against peft under the Trainer, from tokens to the last step."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia import bases
from intarsia.bench.speed.pairs import Pair, apart
from intarsia.bench.speed.shapes import ALL, peft_and_ours
from intarsia.data import Table
from intarsia.train import Recipe, train
from intarsia.train.task import Batch, Features, Prediction

BATCH = 16


class OwnClassifier:
    """Topic classification by the model's own frozen classifier, so that both sides train exactly the same parameters."""

    name = "classify"
    head = None
    model_head = "none"
    metric = "loss"
    higher_is_better = False
    keys = ("input_ids", "attention_mask")

    def __init__(self, examples: Sequence[Features], pad: int) -> None:
        self.examples = examples
        self.pad = pad

    @property
    def counts(self) -> Mapping[str, int]:
        return {"rows": len(self.examples)}

    def settings(self) -> dict[str, Any]:
        return {}

    def features(self, table: Any) -> Sequence[Features]:
        return self.examples

    def collate(self, features: Sequence[Features]) -> Batch:
        width = max(len(f["input_ids"]) for f in features)
        ids = torch.tensor([[*f["input_ids"], *[self.pad] * (width - len(f["input_ids"]))] for f in features])
        lengths = torch.tensor([[len(f["input_ids"])] for f in features])
        labels = torch.tensor([f["labels"] for f in features])
        return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths).long(), "labels": labels, "row": [f["row"] for f in features]}

    def terms(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs["logits"], batch["labels"], reduction="sum"), torch.tensor(len(batch["labels"]))

    def predict(self, outputs: Any, batch: Batch) -> list[Prediction]:
        return [Prediction(row, int(best)) for row, best in zip(batch["row"], outputs["logits"].argmax(-1))]

    def finish(self, predictions: Sequence[Prediction], table: Any) -> list[Prediction]:
        return sorted(predictions, key=lambda p: p.row)

    def score(self, predictions: Sequence[Prediction], table: Any) -> dict[str, Any]:
        return {}


def texts(tokenizer: Any, rows: int) -> list[dict[str, Any]]:
    """The first training rows of SIB-200 in English, which the demo brings along, as tokens."""
    with files("intarsia.demo").joinpath("data/eng_Latn/train.tsv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file, delimiter="\t"))[:rows]
    labels = sorted({row["category"] for row in table})
    return [{"row": i, "input_ids": tokenizer(r["text"], truncation=True, max_length=128)["input_ids"], "labels": labels.index(r["category"])} for i, r in enumerate(table)]


def classifier(base: Any, like: Any = None) -> Any:
    """The embedded base with a random classifier of its own and no dropout."""
    from copy import deepcopy

    from transformers import AutoModelForSequenceClassification

    config = deepcopy(base.model.config)
    config.num_labels = 7
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(base.model.base_model.state_dict(), strict=False)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    return model.eval()


@contextlib.contextmanager
def epochs(rows: int = 192, count: int = 1, layers: Sequence[int] | None = None, grouped: bool = False) -> Iterator[Pair]:
    """`count` epochs of a LoRA on all linear layers (of some blocks) of `me5-small`.

    Args:
        layers: the blocks with modules; None for all.
        grouped: let the Trainer group by length too.
    """
    from peft import LoraConfig

    base = bases.load("me5-small")
    examples = texts(base.tokenizer, rows)
    pad = int(base.tokenizer.pad_token_id)
    task: Any = OwnClassifier(examples, pad)
    first = classifier(base)
    second = classifier(base, like=first)
    targets = ALL if layers is None else rf".*encoder\.layer\.({'|'.join(map(str, layers))})\..*(query|key|value|dense)"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    table = Table.of({"text": [str(e["row"]) for e in examples]})
    with peft_and_ours(first, second, config) as (wrapped, host, _), TemporaryDirectory() as folder:
        given = {key: value for key, value in task.collate(examples[:8]).items() if key in task.keys}
        wrapped.eval()
        with torch.no_grad():
            wanted, bare = wrapped(**given).logits, second(**given).logits
            with host.using("m"):
                found = second(**given).logits

        def ours() -> None:
            train(host, "m", task, table, recipe=Recipe(epochs=count, batch_size=BATCH, learning_rate=1e-5))

        yield Pair(ours, lambda: _trainer(wrapped, examples, task, folder, count, grouped), apart(found, wanted), apart(bare, wanted))


def _trainer(wrapped: Any, examples: Sequence[Features], task: Any, folder: str, count: int, grouped: bool) -> None:
    from transformers import Trainer, TrainingArguments

    more: dict[str, Any] = {}
    if grouped:
        by = "train_sampling_strategy" if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__ else "group_by_length"
        more[by] = "group_by_length" if by != "group_by_length" else True
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=count, learning_rate=1e-5, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, **more,
    )  # fmt: skip

    def collate(features: Sequence[Features]) -> Batch:
        return {key: value for key, value in task.collate(features).items() if key != "row"}

    Trainer(model=wrapped, args=args, train_dataset=examples, data_collator=collate).train()
