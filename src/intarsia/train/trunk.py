"""`trunk`: what lies below the first block that a training changes is computed once per example, not once per epoch.

    states of block k-1 of every training example --once--> a table; each step begins at block k

Exact where nothing below block k is random or depends on the step; where that does not hold, training runs as always and the
reason is said (`Without`).  The first examples are computed both ways before the table is used, and a batch whose tokens are
not those of the table runs as always too (counted).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.compose import Expr, names
from intarsia.errors import SiteError
from intarsia.host import Host
from intarsia.host.shortcut import Beyond, Upto, blocks, reads_blocks
from intarsia.sites.address import Site
from intarsia.train.batches import collated, lengths, moved
from intarsia.train.evaluation import distributed
from intarsia.train.frozen import evaluating
from intarsia.train.recipe import Recipe
from intarsia.train.states import Kept, States, bytes_per_token
from intarsia.train.task import Batch, Features, Task, context_of

MEMORY = 2 << 30
"""Bytes of states that may lie in memory; more go into a file."""
DISK = 32 << 30
"""Bytes of a file of states."""
AFTER = ("head", "final", "pooler")
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 1e-1}


@dataclass(frozen=True, slots=True)
class Without:
    """No table, and why."""

    reason: str

    def facts(self) -> dict[str, Any]:
        """What the record says of it."""
        return {"without": self.reason}


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """Which row of the table each token of each example has.

    Attributes:
        offsets: of the examples, [E + 1].
        ids: the tokens, [offsets[-1]].
    """

    offsets: Tensor
    ids: Tensor

    @classmethod
    def of(cls, features: Sequence[Features], sizes: Sequence[int]) -> Table:
        return cls(torch.tensor([0, *sizes]).cumsum(0), torch.cat([torch.as_tensor(feature["input_ids"]) for feature in features]))

    def rows(self, batch: Batch, examples: Sequence[int]) -> Tensor | None:
        """The rows of a batch's tokens, in the order of its mask; None if these are not the examples' tokens."""
        rows = torch.cat([torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in examples])
        ids = batch["input_ids"][batch["attention_mask"].bool()].cpu()
        return rows if len(ids) == len(rows) and torch.equal(ids, self.ids[rows]) else None


class Trunk:
    """The table of one training, and the model that begins behind it.

    Attributes:
        start: the first block that still runs.
        blocks: number of blocks of the model.
        whole: number of batches that ran as always because their tokens were not those of the table.
    """

    def __init__(self, view: Beyond, start: int, count: int, states: States, table: Table, where: Path | None = None) -> None:
        self.view = view
        self.start = start
        self.blocks = count
        self.states = states
        self.table = table
        self.where = where
        self.whole = 0

    def model(self, batch: Batch, examples: Sequence[int]) -> nn.Module | None:
        """The shorter model, ready for this batch of examples; None where the batch must run as always."""
        rows = self.table.rows(batch, examples)
        if rows is None:
            self.whole += 1
            return None
        mask = batch["attention_mask"].bool()
        found = torch.zeros(*mask.shape, self.states.values.shape[1], device=mask.device)
        found[mask] = self.states.get(rows).to(mask.device)
        self.view.put(found)
        return self.view.model

    def close(self, keep: bool = False) -> None:
        """Delete the file, unless the training goes on later."""
        if not keep or self.where is not None:
            self.states.remove()
        if self.where is not None:
            shutil.rmtree(self.where, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What the record says of it."""
        place = "memory" if self.states.path is None else "file"
        size = self.states.values.numel() * self.states.values.element_size()
        return {"blocks_left_out": self.start, "of": self.blocks, "kept": self.states.kept, "in": place, "bytes": size, "whole_batches": self.whole}

    def __str__(self) -> str:
        facts = self.facts()
        return (
            f"blocks 0 to {self.start - 1} of {self.blocks} are computed once per example and kept as {facts['kept']} in {facts['in']} "
            f"({facts['bytes'] / 2**20:.0f} MiB); trunk=off in the recipe switches it off"
        )


@dataclass(frozen=True, eq=False, slots=True)
class _Training:
    """What is trained on what: the arguments of `trunk`."""

    host: Host
    name: str
    task: Task
    features: Sequence[Features]
    expression: Expr
    recipe: Recipe
    head: str | None

    @property
    def kept(self) -> Kept:
        assert self.recipe.trunk != "off"
        return self.recipe.trunk

    def batch(self, examples: Sequence[int]) -> Batch:
        """A batch as it is in the first epoch."""
        return dict(moved(collated(self.task, self.features, examples, epoch=0), self.host.model.device))

    def using(self, batch: Batch) -> Any:
        """The call of a step on this batch."""
        return self.host.using(self.expression, head=self.head, **context_of(self.task, batch))


def trunk(
    host: Host,
    name: str,
    task: Task,
    features: Sequence[Features],
    expression: Expr,
    recipe: Recipe,
    steps: int,
    *,
    head: str | None = None,
    folder: Path | None = None,
) -> Trunk | Without:
    """The table of a training, computed now; or why there is none.

    Args:
        steps: of the whole training.
        folder: where a file may lie; None for a temporary one.
    """
    training = _Training(host, name, task, features, expression, recipe, head)
    try:
        start, path, count = _begin(training, steps)
        sizes = lengths(features, task.keys)
        states, where = _room(training, start, sum(sizes), folder)
    except SiteError as reason:
        return Without(str(reason))
    table = Table.of(features, sizes)
    try:
        behind = _fill(training, path, start, sizes, table, states)
        states.finish()
        found = Trunk(Beyond(host.model, path, start, behind), start, count, states, table, where)
        _prove(training, found)
    except SiteError as reason:
        states.remove()
        if where is not None:
            shutil.rmtree(where, ignore_errors=True)
        return Without(str(reason))
    return found


def _begin(training: _Training, steps: int) -> tuple[int, str, int]:
    """The first block that must run, the path of the blocks, their number.

    Raises:
        SiteError: the reason why everything must run.
    """
    host, task, features, recipe = training.host, training.task, training.features, training.recipe
    if recipe.trunk == "off":
        raise SiteError("switched off by the recipe (trunk)")
    if steps * recipe.batch_size < 2 * len(features):
        raise SiteError("each example is seen less than twice")
    if distributed():
        raise SiteError("several processes train together")
    if recipe.precision != "fp32" or recipe.gradient_checkpointing:
        raise SiteError("it is made for fp32 without gradient checkpointing")
    path, count = blocks(host)
    start = min((_layer(site, count) for site, _ in host.deltas(training.name)), default=count)
    if start == 0:
        raise SiteError("the module begins at the first block")
    if reads_blocks(host, training.name):
        raise SiteError("the module reads the states of all blocks")
    if recipe.base_dropout and _dropout(host.model.config.get_text_config()):
        raise SiteError("dropout inside the frozen base is on (base_dropout=false switches it off)")
    if not {"input_ids", "attention_mask"} <= set(task.keys):
        raise SiteError(f"task {task.name!r} gives the model no ids with a mask")
    some = list(range(min(8, len(features))))
    first, second = (collated(task, features, some, epoch=epoch) for epoch in (0, 1))
    if any(not torch.equal(first[key], second[key]) for key in task.keys if isinstance(first.get(key), Tensor)):
        raise SiteError(f"task {task.name!r} draws its examples anew in every epoch")
    return start, path, count


def _layer(site: Site, count: int) -> int:
    """The block at which a site's change begins; what lies behind all blocks counts as the one after the last."""
    if site.layer is not None:
        return site.layer
    return count if site.port == "logits" or site.name.split(".")[0] in AFTER else 0


def _dropout(config: Any) -> bool:
    """Whether a configuration asks for any dropout."""
    return any(isinstance(value, float) and value > 0 and "drop" in key for key, value in vars(config).items())


def _room(training: _Training, start: int, tokens: int, folder: Path | None) -> tuple[States, Path | None]:
    """An empty table, or the complete file of an earlier part of the same training; and the temporary folder it lies in."""
    kept, width = training.kept, training.host.sites[str(start - 1)].features
    size = tokens * bytes_per_token(width, kept)
    if size <= MEMORY:
        return States(tokens, width, kept), None
    where = None if folder is not None else Path(tempfile.mkdtemp(prefix="intarsia-trunk-"))
    place = folder if folder is not None else where
    assert place is not None
    free = shutil.disk_usage(place).free
    if size > min(DISK, free // 2):
        if where is not None:
            shutil.rmtree(where)
        raise SiteError(f"the states take {size / 2**30:.1f} GiB, more than {min(DISK, free // 2) / 2**30:.1f} GiB of disk that may be used")
    others = {other: training.host.extract(other).digest for other in sorted(names(training.expression)) if other != training.name}
    text = hashlib.sha256()
    for feature in training.features:
        text.update(repr(list(feature["input_ids"])).encode())
    parts = [training.host.fingerprint.to_dict(), others, start, kept, text.hexdigest()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return States(tokens, width, kept, place / f"trunk-{key[:32]}.bin"), where


def _fill(training: _Training, path: str, start: int, sizes: Sequence[int], table: Table, states: States) -> tuple[None, ...] | None:
    """Run all examples up to the first block that is not left out, in batches of similar length; a complete table is only checked.

    Returns:
        What a block gives behind its states.
    """
    task, model, size = training.task, training.host.model, training.recipe.eval_batch_size
    below = Upto(model, path, start)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    with torch.no_grad(), evaluating(model):
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            batch = training.batch(chosen)
            rows = table.rows(batch, chosen)
            if rows is None:
                raise SiteError(f"task {task.name!r} gives the model other tokens than its features hold")
            if states.complete and at:
                continue
            with training.using(batch):
                below.model(**{key: batch[key] for key in task.keys if key in batch and key != "labels"})
            assert below.states is not None
            mask = batch["attention_mask"].bool()
            if below.states.shape[:2] != mask.shape:
                raise SiteError("something below the module makes the texts longer (a soft prompt)")
            if not states.complete:
                states.put(rows, below.states[mask])
    return below.behind


def _prove(training: _Training, found: Trunk) -> None:
    """The first examples give the same answer both ways.

    Raises:
        SiteError: they do not.
    """
    chosen = list(range(min(8, len(training.features))))
    batch = training.batch(chosen)
    given = {key: batch[key] for key in training.task.keys if key in batch}
    mask = batch["attention_mask"].bool()
    with torch.no_grad(), evaluating(training.host.model), training.using(batch) as model:
        short = found.model(batch, chosen)
        assert short is not None
        whole, part = model(**given)["logits"].float(), short(**given)["logits"].float()
    if whole.shape[:2] == mask.shape:
        whole, part = whole[mask], part[mask]
    difference = float((whole - part).abs().max() / whole.abs().max().clamp_min(1e-6))
    if not difference <= _TOLERANCE[training.kept]:
        raise SiteError(f"answers differ by {difference:.1e} between the whole model and the one that begins at block {found.start}")
