"""The training curve: a picture, and the numbers behind it as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.modules import write_atomic

CSV = "curve.csv"
PICTURE = "curve.png"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "head_learning_rate", "gradient_norm", "dev_loss", "dev_metric", "seconds")


def write_curve(folder: Path, history: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """Write `curve.csv` and `curve.png`.

    Args:
        history: lines of `metrics.jsonl`.
        metric: name of the dev metric.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    data = text.getvalue().encode("utf-8")
    write_atomic(folder / CSV, [data], len(data))
    picture = draw(history, metric, title)
    write_atomic(folder / PICTURE, [picture], len(picture))


def draw(history: Sequence[Mapping[str, Any]], metric: str, title: str) -> bytes:
    """A PNG: losses on the left axis, the dev metric on the right one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    lines = []
    for column, label, style in (("loss", "training loss", "-"), ("dev_loss", "dev loss", "o--")):
        steps, values = _points(history, column)
        if steps:
            lines += left.plot(steps, values, style, color="tab:blue" if column == "loss" else "tab:cyan", label=label, markersize=4)
    left.set_xlabel("optimiser step")
    left.set_ylabel("loss per term")
    left.set_title(_drawable(title))
    left.grid(alpha=0.3)
    steps, values = _points(history, "dev_metric")
    if steps:
        right = left.twinx()
        lines += right.plot(steps, values, "s-", color="tab:red", label=f"dev {metric}", markersize=4)
        right.set_ylabel(metric)
    if lines:
        figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=3)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _points(history: Sequence[Mapping[str, Any]], column: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[column]) for entry in history if isinstance(entry.get(column), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _drawable(title: str) -> str:
    """Names of modules may use any script, the picture's font has few of them, and `$` begins a formula."""
    return "".join(c if c.isascii() and c != "$" else "?" for c in title)
