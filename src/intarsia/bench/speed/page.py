"""The page `docs/measured-speed.md`, its csv and its picture from the lines of `bench speed`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.bench.speed.cases import CASES

Line = Mapping[str, Any]

HEAD = """# Speed beside other libraries

One command measures all of it on your machine: `intarsia bench speed --results speed.jsonl --table speed.md` (needs `pip install "intarsia[peft]"`).
Both sides run in one process, in turns, after their answers were found equal; models have random weights in the shapes given.
A ratio is ours / theirs in processor time (bytes where it says so): the median over rounds, with the range. `bound` is the time of a
frozen model whose gradient goes down to the first block, which no method at all layers can do without. Targets were set before measuring.

"""


def newest(lines: Sequence[Line]) -> dict[str, Line]:
    """The last measurement of every case."""
    return {str(line["case"]): line for line in lines if line["case"] in CASES and "failed" not in line}


def write(lines: Sequence[Line], path: Path) -> None:
    """Write `<path>`, and beside it the csv and the picture of the same name."""
    found = newest(lines)
    text = HEAD + f"Measured on: {'; '.join(sorted({str(line['on']) for line in found.values()}))}.\n\n"
    text += f"![ratios]({path.stem}.png)\n\n"
    text += "| work | against | ratio | range | target | | bound | ours | theirs |\n|---|---|---|---|---|---|---|---|---|\n"
    failed = {str(line["case"]): str(line["failed"]).splitlines()[0] for line in lines if "failed" in line}
    for name, case in CASES.items():
        if name not in found:
            why = f"failed: {failed[name]}" if name in failed else "not measured"
            text += f"| {case.work} | {case.against} | {why} | | {case.target:g} | | | | |\n"
            continue
        line = found[name]
        met = "met" if line["ratio"] <= case.target else "**missed**"
        bound = f"{line['bound']:.2f}" if "bound" in line else ""
        text += (
            f"| {case.work} | {case.against} | {_ratio(line['ratio'])} | {_ratio(line['low'])}-{_ratio(line['high'])} | {case.target:g} | {met} | {bound} "
            f"| {_amount(line, 'ours')} | {_amount(line, 'theirs')} |\n"
        )
    missed = [CASES[name].work for name, line in found.items() if line["ratio"] > CASES[name].target]
    text += f"\nMissed: {'; '.join(missed)}.\n" if missed else "\nAll measured targets are met.\n"
    path.write_text(text, "utf-8")
    path.with_suffix(".csv").write_text(_csv(found), "utf-8")
    path.with_suffix(".png").write_bytes(_picture(found))


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _amount(line: Line, side: str) -> str:
    value = float(line[side])
    if line["unit"] == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _csv(found: Mapping[str, Line]) -> str:
    out = io.StringIO()
    columns = ["case", "unit", "ratio", "low", "high", "target", "bound", "ours", "theirs", "rounds", "wall_ratio", "threads", "error", "at", "on"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found[name] for name in CASES if name in found)
    return out.getvalue()


def _picture(found: Mapping[str, Line]) -> bytes:
    from matplotlib.figure import Figure

    names = [name for name in CASES if name in found]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        line, target = found[name], CASES[name].target
        axes.plot([line["low"], line["high"]], [row, row], color="tab:blue", linewidth=3, alpha=0.4)
        axes.plot(line["ratio"], row, "o", color="tab:blue")
        axes.plot(target, row, "|", color="tab:red", markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.set_xlabel("ours / theirs (dot: median, line: range, red: target)")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
