"""The demo's two pictures: cost against quality, and accuracy per language.  Colours are told apart by the colour-blind
(Okabe & Ito) and the marks in grey."""

from __future__ import annotations

import io
from typing import Any

from intarsia.demo.outcome import Outcome, language_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")


def cost_quality(outcome: Outcome) -> bytes:
    """Trained parameters (logarithmic) against test accuracy, with intervals, as PNG."""
    figure, axes = _figure(6.4, 4.2)
    for i, t in enumerate(outcome.trained):
        low, high = 100 * (t.test.value - t.test.low), 100 * (t.test.high - t.test.value)
        axes.errorbar(t.trainable, 100 * t.test.value, yerr=[[low], [high]], fmt=MARKS[i % 6], color=COLOURS[i % 6], capsize=3, markersize=8,
                      label=f"{t.method}: {t.trainable:,}")  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_xlabel(f"trained parameters (the base has {outcome.parameters:,})")
    axes.set_ylabel("test accuracy, English (%)")
    axes.set_title("Cost against quality")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _png(figure)


def languages(outcome: Outcome) -> bytes:
    """Accuracy per language of single modules and compositions, with intervals, as PNG."""
    figure, axes = _figure(9, 4.2)
    codes = list(outcome.transfers[0].scores)
    width = 0.8 / len(outcome.transfers)
    for i, t in enumerate(outcome.transfers):
        places = [n + (i - (len(outcome.transfers) - 1) / 2) * width for n in range(len(codes))]
        values = [100 * t.scores[code].value for code in codes]
        errors = [[100 * (t.scores[c].value - t.scores[c].low) for c in codes], [100 * (t.scores[c].high - t.scores[c].value) for c in codes]]
        label = t.name if t.name == t.expression else f"{t.name}: {t.expression}"
        axes.bar(places, values, width, yerr=errors, color=COLOURS[i % 6], hatch=HATCHES[i % 6], edgecolor="white", error_kw={"elinewidth": 0.8},
                 label=label)  # fmt: skip
    axes.set_xticks(range(len(codes)), [language_name(code) for code in codes])
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 100)
    axes.set_title("Trained on English only (* not among the languages of the base's vocabulary)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
