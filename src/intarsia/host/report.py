"""What a router does with data: how much of each member it uses where, how decided it is, and what that has to do with metadata.

    with watching(host) as notes:                        the weights given in this block, by whoever
    report(host, "r", "fuse(a, b; router=r)", batches, by={"lang": [...]})   runs the batches and sums them up
    picture(report)                                      PNG: layer x member

Weights are counted as shares, abs(w) / sum abs(w), over the members that have something at a site; padding is left out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intarsia.compose import Expr
from intarsia.errors import UsageError, listing
from intarsia.host.call import Note, thread
from intarsia.host.host import Host
from intarsia.host.probe import Batch, evaluating, inputs_of
from intarsia.host.prototypes import routers


@dataclass(frozen=True)
class Report:
    """Sums over all tokens (or rows) that were seen.

    Attributes:
        members: of the mixture.
        usage: mean share of every member, by site, [N]; zero for members that have nothing there.
        entropy: mean entropy of the shares by site, in nats.
        most: log of the number of members that are there, which the entropy cannot exceed, by site.
        decided: share of tokens whose largest share is above one half, by site.
        information: by key of the metadata, by site: mutual information of key and member, in nats.
        by_value: by key and value: mean share of every member over sites.
        tokens: seen at each site (rows, where a router weighs rows).
    """

    members: tuple[str, ...]
    usage: Mapping[str, Tensor]
    entropy: Mapping[str, float]
    most: Mapping[str, float]
    decided: Mapping[str, float]
    information: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by_value: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    tokens: int = 0

    def overall(self) -> dict[str, float]:
        """Mean share of every member over sites."""
        mean = torch.stack(list(self.usage.values())).mean(0)
        return dict(zip(self.members, mean.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "members": list(self.members),
            "tokens": self.tokens,
            "overall": self.overall(),
            "sites": {
                site: {
                    "usage": dict(zip(self.members, usage.tolist())), "entropy": self.entropy[site], "most": self.most[site], "decided": self.decided[site],
                    "information": {key: found[site] for key, found in self.information.items()},
                }
                for site, usage in self.usage.items()
            },
            "by_value": {key: {v: dict(zip(self.members, share.tolist())) for v, share in values.items()} for key, values in self.by_value.items()},
        }  # fmt: skip

    def lines(self) -> list[str]:
        """A table for reading."""
        width = max(map(len, (*self.usage, "site")))
        found = [f"{'site':{width}}  {'  '.join(f'{m:>8}' for m in self.members)}  entropy/most  decided"]
        for site, usage in self.usage.items():
            shares = "  ".join(f"{u:8.3f}" for u in usage.tolist())
            found.append(f"{site:{width}}  {shares}  {self.entropy[site]:6.3f}/{self.most[site]:<5.3f}  {self.decided[site]:7.1%}")
        for key, by_site in self.information.items():
            found.append(f"mutual information of member and {key}: mean {sum(by_site.values()) / len(by_site):.4f} nats, most at {max(by_site, key=by_site.__getitem__)}")
        return found


@contextmanager
def watching(host: Host) -> Iterator[list[Note]]:
    """The weights that routers give in this block and this thread, in order."""
    state, key = host._state, thread()
    before = state.watched.get(key)
    notes: list[Note] = []
    state.watched[key] = notes
    try:
        yield notes
    finally:
        if before is None:
            state.watched.pop(key, None)
        else:
            state.watched[key] = before


class _Sums:
    """Running sums of one site."""

    def __init__(self, count: int, keys: Iterable[str]) -> None:
        self.share = torch.zeros(count, dtype=torch.float64)
        self.entropy = self.decided = self.total = 0.0
        self.by: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        self.there: set[int] = set()

    def add(self, shares: Tensor, members: Sequence[int], values: Mapping[str, Sequence[str]]) -> None:
        """shares [tokens, n]; values by key, one per token."""
        wide = shares.new_zeros(len(shares), len(self.share))
        wide[:, list(members)] = shares
        self.there.update(members)
        self.share += wide.sum(0)
        self.entropy += float(-(shares * shares.clamp(min=1e-300).log()).sum())
        self.decided += float((shares.max(-1).values > 0.5).sum())
        self.total += len(shares)
        for key, each in values.items():
            for value in dict.fromkeys(each):
                chosen = torch.tensor([v == value for v in each])
                found = torch.cat([wide[chosen].sum(0), torch.tensor([float(chosen.sum())], dtype=wide.dtype)])
                self.by[key][value] = self.by[key].get(value, torch.zeros_like(found)) + found

    def information(self, key: str) -> float:
        """I(value; member) of the mean shares, in nats."""
        overall = self.share / self.total
        found = 0.0
        for sums in self.by[key].values():
            shares = sums[:-1] / sums[-1]
            found += float(sums[-1]) / self.total * float((shares * (shares.clamp(min=1e-300) / overall.clamp(min=1e-300)).log()).sum())
        return found


def report(
    host: Host,
    router: str,
    expression: Expr | str,
    batches: Iterable[Batch],
    *,
    by: Mapping[str, Sequence[str]] | None = None,
    context: Mapping[str, Sequence[Any]] | None = None,
    head: str | None = None,
) -> Report:
    """Run batches under an expression, without gradients, and say what a router did.

    Args:
        batches: inputs of the model, rows first.
        by: metadata: a value for every row of all batches, by key (language, domain ...).
        context: what the call says, a value for every row of all batches, by key.

    Raises:
        UsageError: it is no router, it was not asked, or a list has another length than there are rows.
    """
    by, context = dict(by or {}), dict(context or {})
    forms = {id(form): form for _, form in routers(host, router)}
    if not forms:
        raise UsageError(f"{router!r} is no router, so there is nothing to report of it")
    spec = next(iter(forms.values())).spec
    sums: dict[str, _Sums] = {}
    rows = 0
    with evaluating(host.model):
        for batch in batches:
            size = len(next(iter(batch.values())))
            here = {key: list(values[rows : rows + size]) for key, values in context.items()}
            _check_length(by | context, rows + size)
            with watching(host) as notes, host.using(expression, head=head, **here) as model:
                model(**inputs_of(batch))
            for note in notes:
                if id(note.owner) in forms:
                    place = sums.setdefault(note.site.name, _Sums(len(spec.parts), by))
                    _add(place, note, batch, size, {key: list(map(str, values[rows : rows + size])) for key, values in by.items()})
            rows += size
    _check_length(by | context, rows, exactly=True)
    if not sums:
        raise UsageError(f"router {router!r} was not asked for weights: there are no rows, or {expression} does not use it")
    order = [site.name for site, _ in routers(host, router) if site.name in sums]
    information = {key: {site: sums[site].information(key) for site in order} for key in by}
    by_value = {key: {v: torch.stack([sums[s].by[key][v][:-1] / sums[s].by[key][v][-1] for s in order]).mean(0) for v in sums[order[0]].by[key]} for key in by}
    return Report(
        spec.parts,
        {site: sums[site].share / sums[site].total for site in order},
        {site: sums[site].entropy / sums[site].total for site in order},
        {site: math.log(len(sums[site].there)) for site in order},
        {site: sums[site].decided / sums[site].total for site in order},
        information,
        by_value,
        int(sums[order[0]].total),
    )


def _check_length(lists: Mapping[str, Sequence[Any]], rows: int, exactly: bool = False) -> None:
    wrong = [key for key, values in lists.items() if len(values) < rows or (exactly and len(values) != rows)]
    if wrong:
        raise UsageError(f"{listing(wrong)}: {len(lists[wrong[0]])} values for {rows} rows; give one per row")


def _add(sums: _Sums, note: Note, batch: Batch, size: int, values: Mapping[str, Sequence[str]]) -> None:
    """A note's weights as one share per real token or row."""
    shares = note.weights.detach().double().cpu().abs()
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)
    mine = list(range(size)) if note.rows is None else sorted({int(r) * size // note.size for r in note.rows.tolist()})
    if shares.dim() == 1:
        shares = shares.expand(len(mine), -1)
    if len(shares) == len(mine) and shares.dim() == 2:
        sums.add(shares, note.members, {key: [each[i] for i in mine] for key, each in values.items()})
        return
    shares = shares.reshape(len(mine), -1, shares.shape[-1])
    mask = next((batch[k] for k in ("attention_mask", "decoder_attention_mask") if k in batch and batch[k].shape == (size, shares.shape[1])), None)
    real = torch.ones(shares.shape[:2], dtype=torch.bool) if mask is None else mask[mine].bool().cpu()
    owners = torch.tensor(mine)[:, None].expand(real.shape)[real].tolist()
    sums.add(shares[real], note.members, {key: [each[i] for i in owners] for key, each in values.items()})


def picture(found: Report, title: str = "") -> bytes:
    """A PNG with a row per site, a column per member, and beside them the entropy over the largest possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = list(found.usage)
    size = (2.4 + 0.7 * len(found.members), 1.2 + 0.24 * len(sites))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[max(len(found.members), 2), 1], sharey=True)
    image = left.imshow(torch.stack([found.usage[s] for s in sites]).numpy(), aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis", origin="lower")
    left.set_xticks(range(len(found.members)), list(found.members), rotation=45, ha="right", parse_math=False)
    left.set_yticks(range(len(sites)), sites)
    left.set_title(title or "mean weight", parse_math=False)
    figure.colorbar(image, ax=left)
    right.barh(range(len(sites)), [found.entropy[s] / found.most[s] if found.most[s] else 0.0 for s in sites], color="tab:gray")
    right.set_xlim(0, 1)
    right.set_title("entropy")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
