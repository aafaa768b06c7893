"""What the demo finds, as values, and the rows of its tables; the screen and the report show the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from intarsia.data import DataReport
from intarsia.data.report import percent
from intarsia.demo.plan import LANGUAGES, SOURCE, UNSEEN, Plan
from intarsia.tasks.resample import Difference

Rows = tuple[list[str], list[list[object]]]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, slots=True)
class Trained:
    """One line of the method table.

    Attributes:
        trainable: parameters, the head's among them.
        share: of the base's parameters.
        dev, test: accuracy on English.
        seconds: training time.
        file: the module, and `bytes` its size.
    """

    method: str
    trainable: int
    share: float
    dev: Accuracy
    test: Accuracy
    seconds: float
    file: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expression on all languages.

    Attributes:
        name: for tables: a method, `stack`, `average`.
        expression: what ran.
        scores: accuracy by language folder.
        answers: the label given to each row, all languages one after the other.
        gain: over the better single module, on all languages together; None for single modules.
    """

    name: str
    expression: str
    scores: Mapping[str, Accuracy]
    answers: tuple[str, ...]
    gain: Difference | None = None


@dataclass(slots=True)
class Outcome:
    """All that the demo found; filled in as it goes.

    Attributes:
        base: name of the base, and `parameters`, `weights`, `source`, `licence` what is known of it.
        machine: where it ran.
        checks: by language folder; English with its three files.
        best: the module of the pair with the better dev accuracy.
        transfers: single modules and compositions on all languages.
        seconds: wall time of the whole demo.
        files: what was written.
    """

    plan: Plan
    base: str
    parameters: int
    weights: str
    source: str
    licence: str
    machine: str
    checks: dict[str, DataReport] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)
    best: str = ""
    transfers: list[Transfer] = field(default_factory=list)
    seconds: float = 0.0
    files: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "base": {"name": self.base, "parameters": self.parameters, "weights": self.weights, "source": self.source, "licence": self.licence},
            "machine": self.machine,
            "methods": [
                {"method": t.method, "trainable": t.trainable, "share": t.share, "dev": asdict(t.dev), "test": asdict(t.test),
                 "seconds": round(t.seconds, 3), "file": str(t.file), "bytes": t.bytes}
                for t in self.trained
            ],
            "best": self.best,
            "expressions": [
                {"name": t.name, "expression": t.expression, "languages": {code: asdict(s) for code, s in t.scores.items()},
                 "gain": None if t.gain is None else {"value": t.gain.value, "low": t.gain.low, "high": t.gain.high, "n": t.gain.size}}
                for t in self.transfers
            ],
            "warnings": [f"{code}: {line}" for code, report in self.checks.items() for line in report.warnings],
            "seconds": round(self.seconds, 3),
            "files": [str(path) for path in self.files],
        }  # fmt: skip


def language_name(code: str) -> str:
    """Name of a language, marked with `*` where the base's vocabulary was not made for it."""
    return LANGUAGES[code] + ("*" if code in UNSEEN else "")


def check_table(outcome: Outcome) -> Rows:
    """The data check, one row per file."""
    head = ["language", "file", "rows", "labels", "pieces/word", "longest", "cut", "words with unknown pieces", "also in train"]
    rows: list[list[object]] = []
    for code, report in outcome.checks.items():
        also = {o.second: o.normalised for o in report.overlaps if o.first == "train"}
        for split in report.splits:
            if (code == SOURCE or split.name == "test") and (p := split.pieces):
                rows.append([language_name(code), split.name, split.rows, len(split.labels or ()), f"{p.per_word:.2f}", p.lengths.most,
                             p.truncated, percent(p.unknown_share), also.get(split.name)])  # fmt: skip
    return head, rows


def method_table(outcome: Outcome) -> Rows:
    """One row per trained module."""
    head = ["method", "trainable", "%", "dev accuracy", "test accuracy", "time", "file"]
    return head, [
        [t.method, t.trainable, f"{100 * t.share:.3f}", str(t.dev), str(t.test), f"{t.seconds:.0f} s", f"{t.bytes / 1000:,.0f} kB"]
        for t in outcome.trained
    ]


def language_table(transfers: Sequence[Transfer]) -> Rows:
    """One row per language, one column per expression."""
    head = ["language", *(t.name if t.name == t.expression else f"{t.name}: {t.expression}" for t in transfers)]
    codes = list(transfers[0].scores)
    return head, [[language_name(code), *(str(t.scores[code]) for t in transfers)] for code in codes]


def gain_line(transfer: Transfer, best: str) -> str:
    """What a composition gained over the better single module, in words."""
    gain = transfer.gain
    assert gain is not None
    verdict = "no clear difference" if gain.low <= 0 <= gain.high else "better" if gain.value > 0 else "worse"
    return (
        f"{transfer.name} against {best} alone, all languages: {100 * gain.value:+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] (paired, n={gain.size:,}): {verdict}"
    )
