"""The page `docs/measured.md` from the lines of `bench learn`: a table per task, the curve over examples, and what was seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.bench.jobs import BASE, SET, SOURCES, Job, Source, current, rate_of
from intarsia.bench.tune import GAIN, SEED, chosen, own, scores_of
from intarsia.methods import METHODS
from intarsia.tasks.metrics import METRICS

Line = Mapping[str, Any]

COLLAPSE = 0.05

HEAD = """# Does it learn?

Every method of `intarsia methods`, trained for a short time on real tasks: 100 steps say whether a method learns and what it costs.
This is **not a ranking**: few steps, one base, almost no search over settings.  `rate` is given where the method's own learning rate
(its paper's, for longer trainings) was replaced by a multiple of it that learns more on *dev* data of SST-2 in one seed; the same was
done for `head`; what was tried stands at the end of this page and in `src/intarsia/bench/rates.csv`.

Anyone can repeat it.  Jobs that are in the file are not run again, so each of these can be stopped at any time and goes on where it was:

```
intarsia bench learn --data DATA --results docs/measured/learn-sst2.jsonl --tasks sst2
intarsia bench learn --data DATA --results docs/measured/learn-sib200.jsonl --tasks sib200
intarsia bench learn --data DATA --results docs/measured/learn-e2e.jsonl --tasks e2e
intarsia bench learn --data DATA --results docs/measured/learn-sst2.jsonl --tasks sst2 --examples 16,64,256 --only full,head,lora,pfeiffer,prefix,bitfit
intarsia bench learn --table docs/measured.md --results docs/measured/learn-sst2.jsonl,docs/measured/learn-sib200.jsonl,docs/measured/learn-e2e.jsonl,docs/measured/tune-sst2.jsonl
```

`DATA` holds `sst2/data/SST-2/{train,dev,test}.tsv` (columns sentence, label; the test file is GLUE's dev set),
`sib200/eng_Latn/{train,dev,test}.tsv` (columns category, text) and `e2e/{devset,testset_w_refs}.csv` (columns mr, ref).
On E2E six methods run; full fine-tuning of its base, 135 million parameters, is left out as too long for this machine.
The rates are chosen by `intarsia bench learn --data DATA --tasks sst2 --results docs/measured/tune-sst2.jsonl --tune src/intarsia/bench/rates.csv`.
"""


def write(lines: Sequence[Line], path: Path) -> None:
    """Write the page, and beside it the picture of the curve if there is more than one number of examples."""
    parts = [HEAD]
    tried = [line for line in lines if line.get("split") == "dev"]
    lines = latest([line for line in lines if "split" not in line])
    machines = sorted({str(line["on"]) for line in lines if "on" in line})
    if machines:
        parts.append("Measured on: " + "; ".join(machines) + ".\n")
    if settings := [f"`{name}`: " + ", ".join(f"{k}={v}" for k, v in sorted(values.items())) for name, values in sorted(SET.items())]:
        more = [f"`{name}` on {task.name}: " + ", ".join(f"{k}={v}" for k, v in values.items()) for task in SOURCES.values() for name, values in task.set.items()]
        parts.append("Settings that are not the method's own: " + "; ".join([*settings, *more]) + ".\n")
    for task, base, steps in sorted({(str(x["task"]), str(x["base"]), int(x["steps"])) for x in lines}):
        here = [x for x in lines if (x["task"], x["base"], x["steps"]) == (task, base, steps)]
        most = max(int(x["examples"]) for x in here)
        parts.append(table(task, base, steps, [x for x in here if x["examples"] == most], most))
        counts = sorted({int(x["examples"]) for x in here})
        if len(counts) > 1:
            picture = path.with_name(f"{path.stem}-{task}.png")
            draw(here, picture, f"{task}, {base}, {steps} steps")
            parts.append(curve(task, here, counts, picture.name))
    if tried:
        parts.append(tuned(tried))
    path.write_text("\n".join(parts), encoding="utf-8")


def tuned(lines: Sequence[Line]) -> str:
    """What was tried for the learning rates, on dev data."""
    found = scores_of(lines)
    seeds = "".join(f" (`{name}`: seed {SEED[name]}, where its own rate fails)" for name in sorted(SEED) if name in found)
    text = [
        "## Learning rates that were tried\n",
        f"Score on {max(int(x.get('rows', 0)) for x in lines)} dev rows of {lines[0]['task']}, seed 0{seeds}. Another rate takes the place of a method's own where it brings at least "
        f"{GAIN:g}; methods that are alike (`ALIKE` in `src/intarsia/bench/tune.py`) share the multiple.\n",
        "| method | its own rate | other rates | taken |\n|---|---|---|---|",
    ]
    taken = chosen(lines)
    for method, scores in sorted(found.items()):
        others = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in sorted(scores.items(), key=lambda pair: pair[0] or 0) if rate is not None)
        first = f"{own(method):g}: {scores[None]:.3f}" if None in scores else ""
        text.append(f"| `{method}` | {first} | {others} | {f'{taken[method][0]:g}' if method in taken else 'its own'} |")
    if "perfect" in taken:
        text.append(
            "\nPERFECT learns nothing to speak of at its paper's rate here: the paper trains 6000 steps of 32, its label embeddings start at 1e-4, and no gradient reaches "
            "the adapters before these have grown. Sixty times fewer steps need about thirty times the rate; the base having no head for masked words plays no part, "
            "for the method reads the states at the masks and not that head."
        )
    return "\n".join(text) + "\n"


def latest(lines: Sequence[Line]) -> list[Line]:
    """One line per job, and only those with the learning rate and the settings that their method has here now."""
    last = {Job.of(line): line for line in lines}  # a job that failed and was run again
    return [line for job, line in last.items() if current(line) and job.rate == rate_of(job.task, job.method)]


def known(task: str) -> Source:
    """What is known of a task; of an unknown one that it is a classification."""
    return SOURCES.get(task) or Source(task, "", None, "", "")


def table(task: str, base: str, steps: int, lines: Sequence[Line], examples: int) -> str:
    """A row per method: mean over seeds with its interval, and what it costs."""
    rows, refused = [], []
    about = known(task)
    reference = [float(x["score"]) for x in lines if x["method"] == about.reference and "score" in x]
    metric = next((str(x["metric"]) for x in lines if "metric" in x), "accuracy")
    sign = 1 if METRICS[metric].higher_is_better else -1
    for method in sorted({str(x["method"]) for x in lines}):
        own = [x for x in lines if x["method"] == method]
        found = [x for x in own if "score" in x]
        if not found:
            why = next((str(x.get("refused") or x.get("failed")) for x in own), "")
            refused.append(f"* `{method}`: {why}")
            continue
        scores = [float(x["score"]) for x in found]
        mean, half = statistics.fmean(scores), interval(scores)
        seconds = [float(x["step_ms"]) for x in found if "step_ms" in x]
        peaks = [int(x["peak_mib"]) for x in found if x.get("peak_mib") is not None]
        rate = next((x["rate"] for x in found if x.get("rate") is not None), None)
        rows.append((mean, [
            f"`{method}`", f"{mean:.3f}", "" if half is None else f"± {half:.3f}", str(len(scores)), "" if method == about.reference else verdict(lines, method, about.reference, sign),
            f"{int(found[0].get('trainable', 0)):,}", f"{int(found[0].get('stored', 0)):,}", f"{statistics.median(seconds):.0f}" if seconds else "",
            str(max(peaks)) if peaks else "", "" if rate is None else f"{rate:g}",
        ]))  # fmt: skip
    rows.sort(key=lambda row: -sign * row[0])
    size = next((int(x["rows"]) for x in lines if "rows" in x), 0)
    spread = next((float(x["high"]) - float(x["low"]) for x in lines if "low" in x), 0.0)
    worse = [row[1][0] for row in rows if "worse" in row[1][4] or row[1][4] == "equal"]
    sure = sum("+" in row[1][4] and "?" not in row[1][4] and int(row[1][3]) > 1 for row in rows)
    absent = [f"`{name}`" for name in about.methods or METHODS if name not in {str(x["method"]) for x in lines}]
    what = {"head": "`head` trains the classifier alone and is what the others must beat", "base": "`base` is the model as it is"}[about.reference]
    text = [
        f"## {task}: {examples} examples, {steps} steps of {about.batch} on {base}\n",
        f"{metric} on {size} test rows ({'higher' if sign > 0 else 'lower'} is better); ± is the 95 % interval of the mean over seeds (Student's t); "
        f"the test set alone leaves about ± {spread / 2:.3f}. {what}; the gain over it is the mean over the seeds that both have, with a question "
        "mark where its own 95 % interval holds zero. Step time is processor time of one thread, peak memory the whole process with the base.\n",
        f"| method | mean | | seeds | gain over `{about.reference}` | trained | bytes stored | ms per step | peak MiB | rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(cells) + " |" for _, cells in rows),
        "",
    ]
    if reference:
        text.append(f"No better than `{about.reference}` in the mean: {', '.join(worse) or 'none'}. {len(rows) - 1 - len(worse)} of {len(rows) - 1} are better in the mean, {sure} of them by more than the seeds differ.\n")
    if fallen := collapsed(lines, about.reference, sign):
        text.append(f"Collapsed in single seeds (more than {COLLAPSE:g} worse than `{about.reference}` in the same seed): {', '.join(fallen)}.\n")
    if refused:
        text.append("Not run:\n\n" + "\n".join(refused) + "\n")
    if absent:
        text.append(f"Not measured yet: {', '.join(absent)}.\n")
    return "\n".join(text)


def interval(scores: Sequence[float]) -> float | None:
    """Half width of the 95 % interval of a mean; None for one score."""
    if len(scores) < 2:
        return None
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(scores), 2.2)
    return t * statistics.stdev(scores) / math.sqrt(len(scores))


def collapsed(lines: Sequence[Line], reference: str, sign: int) -> list[str]:
    """Methods and seeds that are far worse than the reference: usually a learning rate that is too high."""
    against = {x["seed"]: float(x["score"]) for x in lines if x["method"] == reference and "score" in x}
    worse = [x for x in lines if "score" in x and x["seed"] in against and sign * (float(x["score"]) - against[x["seed"]]) < -COLLAPSE]
    return [f"`{x['method']}` (seed {x['seed']}: {float(x['score']):.3f})" for x in worse]


def verdict(lines: Sequence[Line], method: str, reference: str, sign: int) -> str:
    """How a method stands against the reference: the mean gain, seed by seed where both have them."""
    scores = {name: {int(x["seed"]): float(x["score"]) for x in lines if x["method"] == name and "score" in x} for name in (method, reference)}
    against = scores[reference]
    if len(against) == 1 and known(str(lines[0]["task"])).reference == BASE:
        against = dict.fromkeys(scores[method], next(iter(against.values())))  # no seed changes the base
    gains = [sign * (score - against[seed]) for seed, score in scores[method].items() if seed in against]
    if not gains:
        return ""
    gain, half = statistics.fmean(gains), interval(gains)
    text = f"{gain:+.3f}" + ("?" if half is not None and half >= abs(gain) else "")
    return text if gain > 0 else f"{text} (worse)" if gain < 0 else "equal"


def curve(task: str, lines: Sequence[Line], counts: Sequence[int], picture: str) -> str:
    """Score over the number of examples, for the methods that have more than one, and what it says of full fine-tuning."""
    methods = sorted({str(x["method"]) for x in lines if x["examples"] != counts[-1] and "score" in x})
    text = [f"### Few examples\n\n![score over the number of examples]({picture})\n", "| method | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    means: dict[tuple[str, int], float] = {}
    for method in methods:
        cells = []
        for count in counts:
            scores = [float(x["score"]) for x in lines if x["method"] == method and x["examples"] == count and "score" in x]
            half = interval(scores)
            if scores:
                means[method, count] = statistics.fmean(scores)
            cells.append((f"{statistics.fmean(scores):.3f}" + ("" if half is None else f" ± {half:.3f}") + f" ({len(scores)})") if scores else "")
        text.append(f"| `{method}` | " + " | ".join(cells) + " |")
    text.append("\nIn brackets: seeds.\n")
    if "full" in methods:
        text.append(
            "He et al. 2021, Mahabadi et al. 2021 and Han et al. 2021 report that parameter-efficient training beats full fine-tuning when data are few. Seen here "
            "(means over seeds, so within the intervals above; all train for the same number of steps):\n"
        )
        for count in counts:
            if ("full", count) not in means:
                continue
            others = [m for m in methods if m not in ("full", "head") and (m, count) in means]
            above = [f"`{m}`" for m in others if means[m, count] > means["full", count]]
            text.append(f"* {count} examples: {len(above)} of {len(others)} are above full fine-tuning ({means['full', count]:.3f})" + (f": {', '.join(above)}." if above else "."))
    return "\n".join(text) + "\n"


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
