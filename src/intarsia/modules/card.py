"""`Card`: what a module is, from what data, how good, at what cost, and what it must not be used for.

A card travels in the module's file and may be completed later without changing the module's identity (`Module.digest`).
Training writes what it knows; the user adds the rest; `missing` says what is still lacking.  The required statements follow
Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993), with one rule added: a bias evaluation that did
not take place is called by its words, "not evaluated".

What is not here: deriving the card of a merged module, and checking a store of cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from intarsia._codec import plain, register
from intarsia.errors import SpecError

NOT_EVALUATED = "not evaluated"
"""The words a card has for a bias evaluation that did not take place."""

_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@register("data-source")
@dataclass(frozen=True, slots=True)
class DataSource:
    """Data a module was trained or evaluated on.

    Attributes:
        name: name of the collection or file.
        version: version, release date or commit.
        licence: SPDX identifier or the licence's name.
        sha256: hash of the rows as they were used, 64 hexadecimal digits, or "" if unknown.
        rows: number of rows used, None if unknown.
    """

    name: str
    version: str = ""
    licence: str = ""
    sha256: str = ""
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise SpecError(f"data source {self.name!r}: sha256 is 64 lower-case hexadecimal digits, found {self.sha256[:80]!r}")


@register("metric")
@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number.

    Attributes:
        name: `accuracy`, `macro-f1`, `chrf` ...
        split: `dev`, `test` ...
        language: BCP-47 tag, "" for all together.
        value: the number; the mean if there are several seeds.
        low: lower end of the 95 % interval, None if not computed.
        high: upper end of the same.
        n: rows it was measured on.
        seeds: training seeds it is the mean of.
    """

    name: str
    split: str
    language: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        check_language(self.language)
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise SpecError(f"metric {self.name!r}: the interval [{self.low}, {self.high}] is upside down")


@register("cost")
@dataclass(frozen=True, slots=True)
class Cost:
    """What training took.

    Attributes:
        seconds: wall time.
        device: `cpu, 2 threads`, `NVIDIA H100` ...
        trainable: number of trained parameters.
        bytes: size of the module's tensors.
    """

    seconds: float | None = None
    device: str = ""
    trainable: int | None = None
    bytes: int | None = None


@register("card")
@dataclass(frozen=True, slots=True)
class Card:
    """The card of a module; every field may be left empty while it is being written.

    Attributes:
        title: one line.
        description: a paragraph.
        languages: BCP-47 tags (`swh`, `kab-Latn`, `pt-BR`).
        script: ISO 15924 code, where it is not in the tags.
        task: `topic classification`, `ner`, `mlm` ...
        data: what it was trained and evaluated on.
        base: name of the base model, for people; the module's fingerprint is what counts.
        method: name of the method, for people; the module's specification is what counts.
        recipe: training settings, plain values.
        metrics: measured numbers.
        cost: what training took.
        bias_evaluation: what was found, or the words "not evaluated".
        intended_use: what it is for.
        out_of_scope: what it must not be used for.
        licence: SPDX identifier of the module itself.
        contact: whom to ask.
        warnings: what a user must know, one sentence each.
        parents: digests of modules it was made from.
    """

    title: str = ""
    description: str = ""
    languages: tuple[str, ...] = ()
    script: str = ""
    task: str = ""
    data: tuple[DataSource, ...] = ()
    base: str = ""
    method: str = ""
    recipe: Mapping[str, object] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    cost: Cost | None = None
    bias_evaluation: str = NOT_EVALUATED
    intended_use: str = ""
    out_of_scope: str = ""
    licence: str = ""
    contact: str = ""
    warnings: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("languages", "data", "metrics", "warnings", "parents"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise SpecError(f"card: {name} is a sequence, found the string {value[:80]!r}; write ({value[:20]!r},)")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "recipe", plain(dict(self.recipe), "$.recipe"))
        for tag in self.languages:
            check_language(tag)

    def missing(self) -> list[str]:
        """What a complete card still lacks, one phrase each; empty if it is complete."""
        lacking = [name for name in _REQUIRED if not getattr(self, name)]
        for source in self.data:
            lacking += [f"data {source.name!r}: {what}" for what in ("licence", "sha256") if not getattr(source, what)]
        for metric in self.metrics:
            where = " ".join(x for x in (metric.name, metric.split, metric.language) if x)
            if metric.low is None or metric.high is None:
                lacking.append(f"metric {where}: interval")
            if not metric.seeds:
                lacking.append(f"metric {where}: seeds")
        return lacking

    def to_markdown(self) -> str:
        """The card as a README for people and for the Hugging Face Hub (which reads the block at the top)."""
        parts = [_front_matter(self), f"# {_line(self.title) or 'Untitled module'}"]
        parts += [self.description.strip()] if self.description.strip() else []
        parts += ["".join(f"> **Warning:** {_line(w)}\n" for w in self.warnings).rstrip()] if self.warnings else []
        about = [("Languages", ", ".join(self.languages)), ("Script", self.script), ("Task", self.task), ("Base", self.base),
                 ("Method", self.method), ("Licence", self.licence), ("Contact", self.contact), ("Made from", ", ".join(self.parents))]
        parts.append(_table(("", ""), [(key, value) for key, value in about if value]))
        for heading, text in (("Intended use", self.intended_use), ("Out of scope", self.out_of_scope), ("Bias evaluation", self.bias_evaluation)):
            parts.append(f"## {heading}\n\n{text.strip() or 'Not stated.'}")
        if self.metrics:
            rows = [(m.name, m.split, m.language, f"{m.value:.4g}", _interval(m), _text(m.n), ", ".join(map(str, m.seeds))) for m in self.metrics]
            parts.append("## Evaluation\n\n" + _table(("metric", "split", "language", "value", "95 % interval", "rows", "seeds"), rows))
        if self.data:
            rows_data = [(d.name, d.version, d.licence, _text(d.rows), d.sha256) for d in self.data]
            parts.append("## Data\n\n" + _table(("source", "version", "licence", "rows", "sha256"), rows_data))
        if self.recipe:
            parts.append("## Recipe\n\n" + _table(("setting", "value"), [(k, json.dumps(v, ensure_ascii=False)) for k, v in sorted(self.recipe.items())]))
        if self.cost:
            costs = [(f.name, _text(getattr(self.cost, f.name))) for f in fields(self.cost) if getattr(self.cost, f.name) not in (None, "")]
            parts.append("## Cost\n\n" + _table(("", ""), costs))
        return "\n\n".join(part for part in parts if part) + "\n"


_REQUIRED = ("title", "languages", "task", "data", "base", "method", "recipe", "metrics", "bias_evaluation", "intended_use",
             "out_of_scope", "licence", "contact")


def check_language(tag: str) -> None:
    """Refuse what is not a BCP-47 tag by its shape; whether the code exists is not looked up.

    Raises:
        SpecError: the tag is malformed; `eng_Latn` is answered with `eng-Latn`.
    """
    if tag and not _TAG.fullmatch(tag):
        better = tag.replace("_", "-")
        hint = f"; write {better!r}" if _TAG.fullmatch(better) else ""
        raise SpecError(f"{tag[:80]!r} is not a BCP-47 language tag such as 'swh' or 'kab-Latn'{hint}")


def _front_matter(card: Card) -> str:
    """YAML block, every string quoted, so that `no` stays Norwegian."""
    entries: list[tuple[str, str | list[str]]] = [
        ("library_name", "intarsia"), ("language", list(card.languages)), ("license", card.licence), ("base_model", card.base),
        ("datasets", [d.name for d in card.data]), ("tags", ["intarsia", *([card.method] if card.method else [])]),
    ]
    lines = [
        f"{key}: {_yaml(value)}" if isinstance(value, str) else f"{key}: [{', '.join(map(_yaml, value))}]" for key, value in entries if value
    ]
    return "\n".join(["---", *lines, "---"])


def _yaml(text: str) -> str:
    """A double-quoted YAML string; JSON's would not do, as YAML has no surrogate pairs."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"[{metric.low:.4g}, {metric.high:.4g}]"


def _text(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _line(text: str) -> str:
    """One line: line breaks would end a heading, a quote or a table row."""
    return " ".join(text.split())


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A markdown table; a bar inside a cell is escaped."""

    def row(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(_line(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    body = [row(cells) for cells in rows]
    return "\n".join([row(header), "|" + "---|" * len(header), *body]) if body else ""
