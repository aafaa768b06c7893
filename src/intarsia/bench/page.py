"""The page `docs/measured.md` from the lines of `bench learn`: a table per task, the curve over examples, and what was seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.bench.jobs import Job

Line = Mapping[str, Any]
REFERENCE = "head"

HEAD = """# Does it learn?

Every method of `intarsia methods`, trained for a short time on real tasks, as it comes out of the box (`rate` is given where the
method's own learning rate was replaced, see `src/intarsia/bench/rates.csv`). This is a check that each method works and what it
costs, **not a ranking**: few steps, one base, no search over settings.

Anyone can repeat it (jobs that are in the file are not run again, so it can be stopped at any time):

```
intarsia bench learn --data DATA --results learn.jsonl
intarsia bench learn --results learn.jsonl --table measured.md
```

`DATA` holds `sst2/data/SST-2/{train,dev,test}.tsv` (columns sentence, label; the test file is GLUE's dev set) and
`sib200/eng_Latn/{train,dev,test}.tsv` (columns category, text).
"""


def write(lines: Sequence[Line], path: Path) -> None:
    """Write the page, and beside it the picture of the curve if there is more than one number of examples."""
    parts = [HEAD]
    last = {tuple(line.get(name) for name in Job.__dataclass_fields__): line for line in lines}  # a job that failed and was run again
    lines = list(last.values())
    machines = sorted({str(line["on"]) for line in lines if "on" in line})
    if machines:
        parts.append("Measured on: " + "; ".join(machines) + ".\n")
    for task, base, steps in sorted({(str(x["task"]), str(x["base"]), int(x["steps"])) for x in lines}):
        here = [x for x in lines if (x["task"], x["base"], x["steps"]) == (task, base, steps)]
        most = max(int(x["examples"]) for x in here)
        parts.append(table(task, base, steps, [x for x in here if x["examples"] == most], most))
        counts = sorted({int(x["examples"]) for x in here})
        if len(counts) > 1:
            picture = path.with_name(f"{path.stem}-{task}.png")
            draw(here, picture, f"{task}, {base}, {steps} steps")
            parts.append(curve(task, here, counts, picture.name))
    path.write_text("\n".join(parts), encoding="utf-8")


def table(task: str, base: str, steps: int, lines: Sequence[Line], examples: int) -> str:
    """A row per method: mean over seeds with its interval, and what it costs."""
    rows, refused = [], []
    reference = [float(x["score"]) for x in lines if x["method"] == REFERENCE and "score" in x]
    for method in sorted({str(x["method"]) for x in lines}):
        own = [x for x in lines if x["method"] == method]
        found = [x for x in own if "score" in x]
        if not found:
            why = next((str(x.get("refused") or x.get("failed")) for x in own), "")
            refused.append(f"* `{method}`: {why}")
            continue
        scores = [float(x["score"]) for x in found]
        mean, half = statistics.fmean(scores), interval(scores)
        seconds = statistics.median(float(x["step_ms"]) for x in found)
        peaks = [int(x["peak_mib"]) for x in found if x["peak_mib"] is not None]
        rate = next((x["rate"] for x in found if x.get("rate") is not None), None)
        rows.append((mean, [
            f"`{method}`", f"{mean:.3f}", "" if half is None else f"± {half:.3f}", str(len(scores)), verdict(method, scores, reference),
            f"{int(found[0]['trainable']):,}", f"{int(found[0]['stored']):,}", f"{seconds:.0f}", str(max(peaks)) if peaks else "", "" if rate is None else f"{rate:g}",
        ]))  # fmt: skip
    rows.sort(key=lambda row: -row[0])
    size = next((int(x["rows"]) for x in lines if "rows" in x), 0)
    metric = next((str(x["metric"]) for x in lines if "metric" in x), "score")
    spread = next((float(x["high"]) - float(x["low"]) for x in lines if "low" in x), 0.0)
    below = [row[1][0] for row in rows if "below" in row[1][4]]
    text = [
        f"## {task}: {examples} examples, {steps} steps of 16 on {base}\n",
        f"{metric} on {size} test rows; ± is the 95 % interval of the mean over seeds (Student's t); the test set alone leaves about "
        f"± {spread / 2:.3f}. `head` trains the classifier alone and is what the others must beat. Step time is processor time of one "
        "thread, peak memory the whole process with the base.\n",
        "| method | mean | | seeds | against `head` | trained | bytes stored | ms per step | peak MiB | rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(cells) + " |" for _, cells in rows),
        "",
    ]
    if below:
        text.append(f"Below head-only here: {', '.join(below)}.\n")
    if refused:
        text.append("Not run:\n\n" + "\n".join(refused) + "\n")
    return "\n".join(text)


def interval(scores: Sequence[float]) -> float | None:
    """Half width of the 95 % interval of a mean; None for one score."""
    if len(scores) < 2:
        return None
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(scores), 2.2)
    return t * statistics.stdev(scores) / math.sqrt(len(scores))


def verdict(method: str, scores: Sequence[float], reference: Sequence[float]) -> str:
    """How a method stands against head-only, seed by seed where both have them."""
    if method == REFERENCE or not reference:
        return ""
    gain = statistics.fmean(scores) - statistics.fmean(reference)
    if abs(gain) < 5e-4:
        return "equal"
    return f"{gain:+.3f}" if gain > 0 else f"{gain:+.3f} (below)"


def curve(task: str, lines: Sequence[Line], counts: Sequence[int], picture: str) -> str:
    """Score over the number of examples, for the methods that have more than one."""
    methods = sorted({str(x["method"]) for x in lines if x["examples"] != counts[-1] and "score" in x})
    text = [f"### Few examples\n\n![score over the number of examples]({picture})\n", "| method | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for method in methods:
        cells = []
        for count in counts:
            scores = [float(x["score"]) for x in lines if x["method"] == method and x["examples"] == count and "score" in x]
            cells.append(f"{statistics.fmean(scores):.3f} ({len(scores)})" if scores else "")
        text.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n\nIn brackets: seeds.\n"


def draw(lines: Sequence[Line], path: Path, title: str) -> None:
    """The curve as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    few = {str(x["method"]) for x in lines if x["examples"] != max(y["examples"] for y in lines)}
    for method in sorted(few):
        points: dict[int, list[float]] = {}
        for x in lines:
            if x["method"] == method and "score" in x:
                points.setdefault(int(x["examples"]), []).append(float(x["score"]))
        counts = sorted(points)
        axes.plot(counts, [statistics.fmean(points[n]) for n in counts], marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("training examples")
    axes.set_ylabel("score on the test set, mean over seeds")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
