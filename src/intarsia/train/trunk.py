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


class Trunk:
    """The table of one training, and the model that begins behind it.

    Attributes:
        start: the first block that still runs.
        blocks: number of blocks of the model.
        whole: number of batches that ran as always because their tokens were not those of the table.
    """

    def __init__(self, view: Beyond, start: int, count: int, states: States, offsets: Tensor, ids: Tensor, where: Path | None = None) -> None:
        self.view = view
        self.start = start
        self.blocks = count
        self.states = states
        self.offsets = offsets
        self.ids = ids
        self.where = where
        self.whole = 0

    def model(self, batch: Batch, examples: Sequence[int]) -> nn.Module | None:
        """The shorter model, ready for this batch of examples; None where the batch must run as always."""
        mask = batch["attention_mask"].bool()
        rows = torch.cat([torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in examples])
        ids = batch["input_ids"][mask].cpu()
        if len(ids) != len(rows) or not torch.equal(ids, self.ids[rows]):
            self.whole += 1
            return None
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
        return {"blocks_left_out": self.start, "of": self.blocks, "kept": self.states.kept, "in": place, "bytes": size}

    def __str__(self) -> str:
        facts = self.facts()
        return (
            f"blocks 0 to {self.start - 1} of {self.blocks} are computed once per example and kept as {facts['kept']} in {facts['in']} "
            f"({facts['bytes'] / 2**20:.0f} MiB); trunk=off in the recipe switches it off"
        )


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
    try:
        start, path, count = _begin(host, name, task, features, recipe, steps)
        width = host.sites[str(start - 1)].features
        rows = lengths(features, task.keys)
        size = sum(rows) * bytes_per_token(width, _kept(recipe))
        states, where = _room(host, name, features, expression, recipe, start, sum(rows), width, size, folder)
    except SiteError as reason:
        return Without(str(reason))
    offsets = torch.tensor([0, *rows]).cumsum(0)
    ids = torch.cat([torch.as_tensor(feature["input_ids"]) for feature in features])
    try:
        behind = _fill(host, name, task, features, expression, recipe, head, path, start, rows, offsets, ids, states)
        states.finish()
        found = Trunk(Beyond(host.model, path, start, behind), start, count, states, offsets, ids, where)
        _prove(host, task, features, expression, recipe, head, found)
    except SiteError as reason:
        states.remove()
        if where is not None:
            shutil.rmtree(where, ignore_errors=True)
        return Without(str(reason))
    return found


def _kept(recipe: Recipe) -> Kept:
    assert recipe.trunk != "off"
    return recipe.trunk


def _begin(host: Host, name: str, task: Task, features: Sequence[Features], recipe: Recipe, steps: int) -> tuple[int, str, int]:
    """The first block that must run, the path of the blocks, their number.

    Raises:
        SiteError: the reason why everything must run.
    """
    if recipe.trunk == "off":
        raise SiteError("switched off by the recipe (trunk)")
    if steps * recipe.batch_size < 2 * len(features):
        raise SiteError("each example is seen less than twice")
    if distributed():
        raise SiteError("several processes train together")
    if recipe.precision != "fp32" or recipe.gradient_checkpointing:
        raise SiteError("it is made for fp32 without gradient checkpointing")
    path, count = blocks(host)
    start = min((_layer(site, count) for site, _ in host.deltas(name)), default=count)
    if start == 0:
        raise SiteError("the module begins at the first block")
    if reads_blocks(host, name):
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


def _layer(site: Any, count: int) -> int:
    """The block at which a site's change begins; what lies behind all blocks counts as the one after the last."""
    if site.layer is not None:
        return int(site.layer)
    return count if site.port == "logits" or site.name.split(".")[0] in AFTER else 0


def _dropout(config: Any) -> bool:
    """Whether a configuration asks for any dropout."""
    words = ("drop", "pdrop")
    return any(isinstance(value, float) and value > 0 and any(w in key for w in words) for key, value in vars(config).items())


def _room(
    host: Host,
    name: str,
    features: Sequence[Features],
    expression: Expr,
    recipe: Recipe,
    start: int,
    tokens: int,
    width: int,
    size: int,
    folder: Path | None,
) -> tuple[States, Path | None]:
    """An empty table, or the complete file of an earlier part of the same training; and the temporary folder it lies in."""
    if size <= MEMORY:
        return States(tokens, width, _kept(recipe)), None
    where = None if folder is not None else Path(tempfile.mkdtemp(prefix="intarsia-trunk-"))
    place = folder if folder is not None else where
    assert place is not None
    free = shutil.disk_usage(place).free
    if size > min(DISK, free // 2):
        if where is not None:
            shutil.rmtree(where)
        raise SiteError(f"the states take {size / 2**30:.1f} GiB, more than {min(DISK, free // 2) / 2**30:.1f} GiB of disk that may be used")
    others = {other: host.extract(other).digest for other in sorted(names(expression)) if other != name}
    text = hashlib.sha256()
    for feature in features:
        text.update(repr(list(feature["input_ids"])).encode())
    parts = [host.fingerprint.to_dict(), others, start, recipe.trunk, text.hexdigest()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return States(tokens, width, _kept(recipe), place / f"trunk-{key[:32]}.bin"), where


def _fill(
    host: Host,
    name: str,
    task: Task,
    features: Sequence[Features],
    expression: Expr,
    recipe: Recipe,
    head: str | None,
    path: str,
    start: int,
    sizes: Sequence[int],
    offsets: Tensor,
    ids: Tensor,
    states: States,
) -> tuple[None, ...] | None:
    """Run all examples up to the first block that is not left out, in batches of similar length."""
    below = Upto(host.model, path, start)
    order = sorted(range(len(features)), key=sizes.__getitem__)
    device = host.model.device
    with torch.no_grad(), evaluating(host.model):
        for at in range(0, len(order), recipe.eval_batch_size):
            chosen = order[at : at + recipe.eval_batch_size]
            batch = moved(collated(task, features, chosen, epoch=0), device)
            mask = batch["attention_mask"].bool()
            rows = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in chosen])
            found = batch["input_ids"][mask].cpu()
            if len(found) != len(rows) or not torch.equal(found, ids[rows]):
                raise SiteError(f"task {task.name!r} gives the model other tokens than its features hold")
            if states.complete and at:
                continue
            with host.using(expression, head=head, **context_of(task, batch)):
                below.model(**{key: batch[key] for key in task.keys if key in batch and key != "labels"})
            assert below.states is not None
            if below.states.shape[:2] != mask.shape:
                raise SiteError("something below the module makes the texts longer (a soft prompt)")
            if not states.complete:
                states.put(rows, below.states[mask])
    return below.behind


def _prove(host: Host, task: Task, features: Sequence[Features], expression: Expr, recipe: Recipe, head: str | None, found: Trunk) -> None:
    """The first examples give the same answer both ways.

    Raises:
        SiteError: they do not.
    """
    chosen = list(range(min(8, len(features))))
    batch = moved(collated(task, features, chosen, epoch=0), host.model.device)
    given = {key: batch[key] for key in task.keys if key in batch}
    mask = batch["attention_mask"].bool()
    with torch.no_grad(), evaluating(host.model), host.using(expression, head=head, **context_of(task, batch)) as model:
        short = found.model(batch, chosen)
        assert short is not None
        whole, part = model(**given)["logits"].float(), short(**given)["logits"].float()
    if whole.shape[:2] == mask.shape:
        whole, part = whole[mask], part[mask]
    difference = float((whole - part).abs().max() / whole.abs().max().clamp_min(1e-6))
    if not difference <= _TOLERANCE[recipe.trunk]:
        raise SiteError(f"answers differ by {difference:.1e} between the whole model and the one that begins at block {found.start}")
