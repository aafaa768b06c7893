"""From features to the micro-batches that the trainer consumes, and to the batches of an evaluation.

What is random about an example (masks) is the task's business and depends on its `epoch`, which is set here: a number while
training, None in evaluation.  Random draws of a task that ignores this come under a seed of epoch and examples, so they
too depend neither on what was drawn before nor on resuming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from intarsia.train.order import Item, Pieces
from intarsia.train.rng import kept, seed_of
from intarsia.train.task import Batch, Features, Task, batch_context


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-batch.

    Attributes:
        batch: what the task's `collate` gave.
        terms: number of loss terms; 0 if the batch only keeps the process company.
        counts: whether its loss counts.
        rows: rows of the training table, for messages.
        examples: their numbers among the features.
    """

    batch: Batch
    terms: int
    counts: bool
    rows: tuple[int, ...]
    examples: tuple[int, ...] = ()


class _Items(Dataset[Item]):
    """Items come back as they are; their features are looked up where batches are made."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: Item) -> Item:
        return item


class Loader(DataLoader[Micro]):
    """The micro-batches of one process.

    Args:
        task: collates.
        features: of the training table.
        plan: which examples come when.
    """

    def __init__(self, task: Task, features: Sequence[Features], plan: Pieces) -> None:
        super().__init__(
            _Items(len(features)),  # type: ignore[arg-type]
            batch_sampler=plan,
            collate_fn=Collate(task, features),
            generator=torch.Generator().manual_seed(0),  # or each pass would draw from the global generator
        )
        self.plan = plan

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch comes next."""
        self.plan.set_epoch(epoch)


class Collate:
    """A micro-batch from items."""

    def __init__(self, task: Task, features: Sequence[Features]) -> None:
        self.task = task
        self.features = features

    def __call__(self, items: Sequence[Item]) -> Micro:
        chosen = [item.index for item in items]
        batch = collated(self.task, self.features, chosen, epoch=items[0].epoch)
        counts = all(item.counts for item in items)
        rows = tuple(int(row) for row in batch.get("row", ()))
        return Micro(batch, self.task.terms(batch) if counts else 0, counts, rows, tuple(chosen))


def collated(task: Task, features: Sequence[Features], chosen: Sequence[int], epoch: int | None) -> Batch:
    """One batch of the chosen examples as they are in an epoch; None for evaluation."""
    before = getattr(task, "epoch", None)
    with kept():
        torch.manual_seed(seed_of("batch", epoch, *chosen))
        try:
            if hasattr(task, "epoch"):
                task.epoch = epoch
            members = [features[i] for i in chosen]
            return {**task.collate(members), **batch_context(members)}
        finally:
            if hasattr(task, "epoch"):
                task.epoch = before


def lengths(features: Sequence[Features], keys: Sequence[str]) -> list[int]:
    """Length of each example: of its first entry among the model's keys that has one."""
    for key in keys:
        if features and hasattr(features[0].get(key), "__len__"):
            return [len(feature[key]) for feature in features]
    return [0] * len(features)


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def evaluation_batches(task: Task, features: Sequence[Features], size: int) -> Iterator[Batch]:
    """All examples in batches of similar length; what is random is the same every time."""
    long = lengths(features, task.keys)
    order = sorted(range(len(features)), key=lambda i: (-long[i], i))
    for start in range(0, len(order), size):
        yield collated(task, features, order[start : start + size], epoch=None)
