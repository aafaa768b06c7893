"""Whole epochs on real texts: `train` against peft under the Trainer, from tokens to the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib.resources import as_file, files
from tempfile import TemporaryDirectory
from typing import Any

import torch

from intarsia import bases, tasks
from intarsia.bench.speed.pairs import Pair
from intarsia.bench.speed.shapes import ALL, answers_apart, peft_and_ours
from intarsia.data import read
from intarsia.train import Recipe, train
from intarsia.train.task import Batch, Features

BATCH = 16


def classifier(base: Any, like: Any = None) -> Any:
    """The embedded base with a random classifier of its own and no dropout."""
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
    """`count` epochs of a LoRA on all linear layers (of some blocks) of `me5-small`, on topics of SIB-200 in English.

    Both sides answer with the model's own frozen classifier, so that they train exactly the same parameters.

    Args:
        layers: the blocks with modules; None for all.
        grouped: let the Trainer group by length too.
    """
    from peft import LoraConfig

    base = bases.load("me5-small")
    with as_file(files("intarsia.demo") / "data/eng_Latn/train.tsv") as path:  # the sentences that the demo brings along
        table = read(path, columns="text,label=category")[:rows]
    task = tasks.build("classify", base.tokenizer, table=table, settings={"max_length": 128})
    task.head = None
    examples = task.features(table)
    first = classifier(base)
    second = classifier(base, like=first)
    targets = ALL if layers is None else rf".*encoder\.layer\.({'|'.join(map(str, layers))})\..*(query|key|value|dense)"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    with peft_and_ours(first, second, config) as (wrapped, host, _), TemporaryDirectory() as folder:
        batch = task.collate(examples[:8])
        given = {key: batch[key] for key in task.keys if key in batch}
        error, signal = answers_apart(wrapped, host, given)

        def ours() -> None:
            train(host, "m", task, table, recipe=Recipe(epochs=count, batch_size=BATCH, learning_rate=1e-5))

        yield Pair(ours, lambda: _trainer(wrapped, examples, task, folder, count, grouped), error, signal)


def _trainer(wrapped: Any, examples: Sequence[Features], task: Any, folder: str, count: int, grouped: bool) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

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

    trainer = Trainer(model=wrapped, args=args, train_dataset=examples, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
