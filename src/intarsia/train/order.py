"""Which examples make up which optimiser step: a pure function of lengths, batch size, seed and epoch.

    epoch -> steps of `batch_size` examples -> pieces, dealt out to processes and accumulation

The examples of a step do not depend on how the step is cut up, and no random state is carried along, so a run can be
resumed at any step and repeated with any number of processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from intarsia.errors import TrainingError
from intarsia.train.rng import seed_of

POOL = 32
"""Steps among which examples are sorted by length."""


@dataclass(frozen=True, slots=True)
class Item:
    """One example at one time.

    Attributes:
        index: of the feature.
        epoch: from 0.
        counts: False for an example that only keeps a process company that has none left; its loss is not counted.
    """

    index: int
    epoch: int
    counts: bool = True


def steps(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, grouped: bool = True) -> list[list[int]]:
    """The examples of every optimiser step of an epoch; each example occurs once.

    Args:
        lengths: of the examples, in tokens.
        grouped: sort by length within pools of shuffled examples, then shuffle the steps.
    """
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if not grouped:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    pool = POOL * batch_size
    order = [i for start in range(0, len(order), pool) for i in sorted(order[start : start + pool], key=lengths.__getitem__)]
    cut = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    full, rest = [s for s in cut if len(s) == batch_size], [s for s in cut if len(s) < batch_size]
    return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + rest


def pieces(examples: Sequence[int], world: int, accumulation: int) -> list[list[list[int]]]:
    """The pieces of one step per process: `result[rank]` is a list of micro-batches, as many on every process.

    Sizes differ by one at most.  A last step with few examples has fewer pieces; a piece may be empty only if there are
    fewer examples than processes.
    """
    each = min(accumulation, math.ceil(len(examples) / world))
    count = each * world
    bounds = [-(-i * len(examples) // count) for i in range(count + 1)]
    parts = [list(examples[a:b]) for a, b in itertools.pairwise(bounds)]
    return [parts[rank::world] for rank in range(world)]


class Pieces(Sampler[list[Item]]):
    """The micro-batches of one process in one epoch, for a `DataLoader`.

    Args:
        lengths: of the examples.
        batch_size: examples of a step.
        accumulation: micro-batches of a step on each process.
        seed: of the order.
        grouped: by length.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int,
        seed: int,
        grouped: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < world * accumulation:
            raise TrainingError(
                f"a step of batch_size={batch_size} examples cannot be cut into {world} processes x {accumulation} pieces; "
                "raise batch_size (it counts all examples of a step) or lower accumulation"
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.grouped = grouped
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self.accumulation + min(self.accumulation, math.ceil(rest / self.world))

    def __iter__(self) -> Iterator[list[Item]]:
        for examples in steps(self.lengths, self.batch_size, self.seed, self.epoch, self.grouped):
            for piece in pieces(examples, self.world, self.accumulation)[self.rank]:
                company = [Item(examples[0], self.epoch, counts=False)]
                yield [Item(i, self.epoch) for i in piece] or company
