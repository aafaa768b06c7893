"""`Card`: what a module is, from what data, how good, at what cost, and what it must not be used for.

A card travels in the module's file and may be completed later without changing the module's identity (`Module.digest`).
Training writes what it knows; the user adds the rest; `missing` says what is still lacking.  The required statements follow
Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993), with one rule added: a bias evaluation that did
not take place is called by its words, "not evaluated".

What is not here: completing a card from `field=value` and what to type for a missing statement (`completing.py`), the card as
markdown (`readme.py`), the card of a merged module (`derived.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from intarsia._codec import plain, register
from intarsia.errors import SpecError

NOT_EVALUATED = "not evaluated"
"""The words a card has for a bias evaluation that did not take place."""

UNKNOWN = "unknown"
"""The licence of what was made from works whose licences do not say it; a card with it is not complete."""

_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_SCRIPT = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z]{3})*-[A-Z][a-z]{3}(-.*)?")
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
        origin: where it comes from: an address, a reference, who collected it.
    """

    name: str
    version: str = ""
    licence: str = ""
    sha256: str = ""
    rows: int | None = None
    origin: str = ""

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
        script: ISO 15924 code, where it is not in the tags; several are joined by `+`.
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
        parent_names: what those were called, in the same order.
        conflicts: digests of modules it must not be used together with.
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
    parent_names: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("languages", "data", "metrics", "warnings", "parents", "parent_names", "conflicts"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise SpecError(f"card: {name} is a sequence, found the string {value[:80]!r}; write ({value[:20]!r},)")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "recipe", plain(dict(self.recipe), "$.recipe"))
        for tag in self.languages:
            check_language(tag)
        if self.parent_names and len(self.parent_names) != len(self.parents):
            raise SpecError(f"card: {len(self.parents)} parents and {len(self.parent_names)} names of them")

    def named_parents(self) -> list[tuple[str, str]]:
        """Name ("" if unknown) and digest of every module it was made from."""
        return list(zip(self.parent_names or ("",) * len(self.parents), self.parents))

    def gaps(self) -> list[tuple[str, str]]:
        """What a complete card still lacks: where (`licence`, `data.1.origin`, `metrics.2`), and as a phrase."""
        found = [(name, name) for name in _REQUIRED if not getattr(self, name)]
        if self.licence == UNKNOWN:
            found.append(("licence", "licence"))
        if self.languages and not self.script and not all(map(_SCRIPT.fullmatch, self.languages)):
            found.append(("script", "script"))
        for i, source in enumerate(self.data, 1):
            found += [(f"data.{i}.{what}", f"data {source.name!r}: {what}") for what in ("origin", "licence", "sha256") if not getattr(source, what)]
        for i, metric in enumerate(self.metrics, 1):
            where = " ".join(x for x in (metric.name, metric.split, metric.language) if x)
            if metric.low is None or metric.high is None:
                found.append((f"metrics.{i}", f"metric {where}: interval"))
            if not metric.seeds:
                found.append((f"metrics.{i}", f"metric {where}: seeds"))
        return found

    def missing(self) -> list[str]:
        """What a complete card still lacks, one phrase each; empty if it is complete."""
        return [phrase for _, phrase in self.gaps()]

    def to_markdown(self) -> str:
        """The card as a README for people and for the Hugging Face Hub, see `readme.render`."""
        from intarsia.modules.readme import render

        return render(self)


_REQUIRED = ("title", "languages", "task", "data", "base", "method", "recipe", "metrics", "cost", "bias_evaluation", "intended_use",
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
