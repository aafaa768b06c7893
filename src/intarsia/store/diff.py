"""`compare`: two modules side by side, layer by layer: support overlap, sign conflict, cosine.

What is compared is the true change of the weights, multiplied out (B A and not B or A), wherever it follows from the modules
alone; a low-rank product can be the same with quite different factors.  Where it does not (adapters, prompts, factors that
follow from a seed), tensors of the same name and shape are compared as they are stored, and the result says so.

    overlap    |both not zero| / |at least one not zero|
    conflict   share of the entries that are not zero in both where the signs differ (TIES: Yadav et al. 2023, arXiv 2306.01708)
    cosine     of the two changes as vectors; None where one is zero

What is not here: merging (`modules.merging`), and the base's weights, which none of this needs.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from intarsia.errors import ModuleError, StoreError
from intarsia.modules import Module, write_atomic
from intarsia.modules.merging import matrix
from intarsia.modules.terms import Term, layer_of, terms, total
from intarsia.store.pointers import order

What = Literal["change", "relative change", "stored tensors"]
Get = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Compared:
    """One place at which both modules, or one of them, change the model.

    Attributes:
        place: site and kind, or the name of a stored tensor.
        layer: the layer it belongs to.
        what: what was compared: `What`, several of a layer joined by a comma.
        norms: Frobenius norms; None where a module does not change this place.
        entries: number of values compared, 0 where one module has none.
        either: entries that are not zero in at least one.
        both: entries that are not zero in both.
        opposed: entries of `both` with different signs.
        product: scalar product of the two.
    """

    place: str
    layer: str
    what: str
    norms: tuple[float | None, float | None]
    entries: int = 0
    either: int = 0
    both: int = 0
    opposed: int = 0
    product: float = 0.0

    @property
    def overlap(self) -> float | None:
        return self.both / self.either if self.either else None

    @property
    def conflict(self) -> float | None:
        return self.opposed / self.both if self.both else None

    @property
    def cosine(self) -> float | None:
        return _cosine(self.product, *(norm or 0.0 for norm in self.norms))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two modules side by side.

    Attributes:
        names: of the two.
        places: every place at which one of them changes the model.
        unlike: why the two can hardly be compared: other bases, other contexts; "" if nothing.
    """

    names: tuple[str, str]
    places: tuple[Compared, ...]
    unlike: str

    @property
    def layers(self) -> list[Compared]:
        """The places of each layer put together, in the order of the model; and `whole` for all that could be compared."""
        found: dict[str, list[Compared]] = {}
        for place in self.places:
            found.setdefault(place.layer, []).append(place)
        return [_together(layer, parts) for layer, parts in sorted(found.items(), key=lambda item: order(item[0]))]

    @property
    def whole(self) -> Compared:
        return _together("whole", self.places)


def compare(a: Module, b: Module, names: tuple[str, str] | None = None) -> Comparison:
    """Compare two modules.

    Args:
        names: what to call them; None for their own names.

    Places that only one of them changes count for its support: their overlap is 0.  So do tensors of one name and other shapes.
    """
    unlike = a.base.difference(b.base) or ""
    if unlike:
        unlike = f"they belong to different bases: {unlike}"
    elif dict(a.context) != dict(b.context):
        unlike = "they were made for different settings of what is read (context)"
    try:
        places = _places(changes(a), changes(b))
    except ModuleError:  # one of them is no sum of changes of weights
        places = _places(_stored(a), _stored(b))
    return Comparison(names or (a.name, b.name), tuple(places), unlike)


def changes(module: Module) -> dict[str, tuple[What, Get]]:
    """By place the change of the weight there, multiplied out when it is asked for; a head's tensors as they are stored.

    Raises:
        ModuleError: the module is no sum of changes; or, when a change is asked for, that follows from more than the module.
    """
    grouped: dict[str, list[Term]] = {}
    for term in terms(module):
        kind = f"relative {term.form}" if term.relative else term.form  # a share of what is there and an addition are not compared
        grouped.setdefault(f"{term.site} ({kind})", []).append(term)
    if not grouped:
        return _stored(module)
    found: dict[str, tuple[What, Get]] = {
        place: ("relative change" if parts[0].relative else "change", partial(_change, parts)) for place, parts in grouped.items()
    }
    heads = {patch.name for patch in module.method.patches if patch.port == "logits"}
    return {**found, **{key: held for key, held in _stored(module).items() if key.partition("/")[2].partition(".")[0] in heads}}


def _change(parts: Sequence[Term]) -> Tensor:
    return matrix(*total([(term.scale, term.factor, term.tensors) for term in parts]))


def _stored(module: Module) -> dict[str, tuple[What, Get]]:
    return {key: ("stored tensors", partial(_same, tensor)) for key, tensor in module.tensors.items() if tensor.is_floating_point()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _places(ours: Mapping[str, tuple[What, Get]], theirs: Mapping[str, tuple[What, Get]]) -> list[Compared]:
    """One place after the other, so that no more than two changes are in memory."""
    found = []
    for place in sorted({*ours, *theirs}, key=order):
        what = (ours.get(place) or theirs[place])[0]
        first, second = (held[place][1]() if place in held else None for held in (ours, theirs))
        found.append(_compared(place, what, first, second))
    return found


def _compared(place: str, what: What, ours: Tensor | None, theirs: Tensor | None) -> Compared:
    layer = layer_of(place.partition("/")[0].partition(" ")[0])
    first, second = (None if tensor is None else tensor.to(torch.float64) for tensor in (ours, theirs))
    norms = tuple(None if tensor is None else float(tensor.norm()) for tensor in (first, second))
    assert len(norms) == 2
    if first is None or second is None or first.shape != second.shape:
        either = sum(int((tensor != 0).sum()) for tensor in (first, second) if tensor is not None)
        return Compared(place, layer, what, norms, either=either)
    here, there = first != 0, second != 0
    return Compared(
        place, layer, what, norms, first.numel(), int((here | there).sum()), int((here & there).sum()),
        int((first.sign() * second.sign() < 0).sum()), float((first * second).sum()),
    )  # fmt: skip


def _together(name: str, parts: Sequence[Compared]) -> Compared:
    norms = tuple(
        math.sqrt(math.fsum((part.norms[side] or 0.0) ** 2 for part in parts)) if any(part.norms[side] is not None for part in parts) else None
        for side in (0, 1)
    )
    assert len(norms) == 2
    what = ", ".join(dict.fromkeys(part.what for part in parts)) or "change"
    entries, either, both, opposed = (sum(getattr(part, key) for part in parts) for key in ("entries", "either", "both", "opposed"))
    return Compared(name, name, what, norms, entries, either, both, opposed, math.fsum(part.product for part in parts))


def _cosine(product: float, one: float, other: float) -> float | None:
    return max(-1.0, min(1.0, product / (one * other))) if one > 0 and other > 0 else None


def picture(found: Comparison, path: str | os.PathLike[str]) -> Path:
    """Draw overlap, sign conflict and cosine per layer as a PNG, SVG or PDF file (by its ending).

    Raises:
        StoreError: the ending is another, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = Path(path)
    if target.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise StoreError(f"cannot draw {target}: the ending says the format; expected .png, .svg or .pdf")
    layers = found.layers
    figure = Figure(figsize=(9, max(2.5, 0.26 * len(layers) + 1.4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (title, key, low) in zip(axes, (("support overlap", "overlap", 0.0), ("sign conflict", "conflict", 0.0), ("cosine", "cosine", -1.0))):
        heights = [getattr(layer, key) for layer in layers]
        ax.barh(range(len(layers)), [0.0 if value is None else value for value in heights], color="#4c72b0")
        for row, value in enumerate(heights):
            if value is None:
                ax.text(0.0, row, " -", va="center", fontsize=7)
        ax.set_xlim(low, 1.0)
        ax.set_title(title, fontsize=10)
        ax.axvline(0.0, color="black", linewidth=0.6)
    axes[0].set_yticks(range(len(layers)), [layer.layer for layer in layers], fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(f"{found.names[0]} and {found.names[1]}", fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix[1:].lower(), dpi=120)
    return write_atomic(target, [drawn.getvalue()], drawn.tell())
