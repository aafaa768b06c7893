"""A card as a README in markdown: for people, and with the block at the top that the Hugging Face Hub reads.

The block's keys follow the Hub's specification of model cards (huggingface/hub-docs, modelcard.md): languages by their ISO
639 code (whole BCP-47 tags beside them), licences by the Hub's own names, metrics as a `model-index` with the interval,
the rows and the seeds among a metric's arguments.  Content never becomes structure: every string is quoted or escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from intarsia.modules.card import UNKNOWN, Card, Metric
from intarsia.modules.licences import LICENCES, canonical

PIPELINES: Mapping[str, str] = MappingProxyType({
    "classify": "text-classification", "tag": "token-classification", "mlm": "fill-mask", "clm": "text-generation",
})  # fmt: skip
"""The Hub's names of tasks, where it has one."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_FILE = re.compile(r"\.(csv|tsv|jsonl?|conll\w*|iob2?|txt|parquet|gz|zip|xz)(\W|$)", re.IGNORECASE)


def render(card: Card, *, library: str = "intarsia", base_model: str | None = None) -> str:
    """The card as markdown.

    Args:
        library: what loads the files beside it: `intarsia` or, for a whole checkpoint, `transformers`.
        base_model: the base's repository on the Hub (`owner/name`); None for the card's base, if it has that form.
    """
    parts = [front_matter(card, library, base_model), f"# {_title(card)}"]
    parts += [card.description.strip()] if card.description.strip() else []
    parts += ["".join(f"> **Warning:** {_line(w)}\n" for w in card.warnings).rstrip()] if card.warnings else []
    parents = ", ".join(f"{name} ({digest})" if name else digest for name, digest in card.named_parents())
    about = [("Languages", ", ".join(card.languages)), ("Script", card.script), ("Task", card.task), ("Base", card.base),
             ("Method", card.method), ("Licence", card.licence), ("Contact", card.contact), ("Made from", parents)]
    parts.append(_table(("", ""), [(key, value) for key, value in about if value]))
    for heading, text in (("Intended use", card.intended_use), ("Out of scope", card.out_of_scope), ("Bias evaluation", card.bias_evaluation)):
        parts.append(f"## {heading}\n\n{text.strip() or 'Not stated.'}")
    if card.metrics:
        rows = [(m.name, m.split, m.language, f"{m.value:.4g}", interval_text(m), _text(m.n), ", ".join(map(str, m.seeds))) for m in card.metrics]
        parts.append("## Evaluation\n\n" + _table(("metric", "split", "language", "value", "95 % interval", "rows", "seeds"), rows))
    if card.data:
        sources = [(d.name, d.version, d.origin, d.licence, _text(d.rows), d.sha256) for d in card.data]
        parts.append("## Data\n\n" + _table(("source", "version", "origin", "licence", "rows", "sha256"), sources))
    if card.recipe:
        parts.append("## Recipe\n\n" + _table(("setting", "value"), [(k, json.dumps(v, ensure_ascii=False)) for k, v in sorted(card.recipe.items())]))
    if card.cost:
        costs = [(f.name, _text(getattr(card.cost, f.name))) for f in fields(card.cost) if getattr(card.cost, f.name) not in (None, "")]
        parts.append("## Cost\n\n" + _table(("", ""), costs))
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(card: Card, library: str, base_model: str | None) -> str:
    """The block at the top."""
    entries: dict[str, Any] = {"library_name": library, "language": list(dict.fromkeys(tag.partition("-")[0].lower() for tag in card.languages))}
    if any("-" in tag for tag in card.languages):
        entries["language_bcp47"] = list(card.languages)
    entries |= _licence(card.licence)
    if base_model or _REPOSITORY.fullmatch(card.base):
        entries |= {"base_model": base_model or card.base, "base_model_relation": "adapter" if library == "intarsia" else "merge"}
    entries["datasets"] = list(dict.fromkeys(d.name for d in card.data if _DATASET.fullmatch(d.name) and not _FILE.search(d.name)))
    entries["pipeline_tag"] = PIPELINES.get(card.task, "")
    entries["tags"] = list(dict.fromkeys(["intarsia", *([card.method] if card.method else [])]))
    entries["model-index"] = _results(card)
    lines = _block({key: value for key, value in entries.items() if value})
    return "\n".join(["---", *lines, "---"])


def _licence(licence: str) -> dict[str, str]:
    """The Hub's name of a licence; one it does not know is `other` with a name of its own."""
    if licence.strip() in ("", UNKNOWN):
        return {"license": licence.strip()}
    row = LICENCES.get(canonical(licence))
    if row is not None:
        return {"license": row.hub}
    return {"license": "other", "license_name": _slug(licence)}


def _results(card: Card) -> list[dict[str, Any]]:
    """The card's metrics as a model index: one result per split and language."""
    names = {source.name for source in card.data}
    task = {"type": PIPELINES.get(card.task, "other"), **({"name": card.task} if card.task else {})}
    groups: dict[tuple[str, str], list[Metric]] = {}
    for metric in card.metrics:
        groups.setdefault((metric.split, metric.language), []).append(metric)
    results = []
    for (split, language), metrics in groups.items():
        data = next(iter(names)) if len(names) == 1 else " ".join(word for word in (split, language, "data") if word)
        dataset: dict[str, Any] = {"type": _slug(data), "name": data, **({"split": split} if split else {})}
        if language:
            dataset["args"] = {"language": language}
        results.append({"task": task, "dataset": dataset, "metrics": [_measured(metric) for metric in metrics]})
    return [{"name": _title(card), "results": results}] if results else []


def _measured(metric: Metric) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if metric.low is not None and metric.high is not None:
        about |= {"interval": [metric.low, metric.high], "confidence": 0.95}
    about |= {"rows": metric.n} if metric.n is not None else {}
    about |= {"seeds": list(metric.seeds)} if metric.seeds else {}
    return {"type": metric.name, "name": metric.name, "value": metric.value, **({"args": about} if about else {})}


def _block(value: Mapping[str, Any], indent: str = "") -> list[str]:
    """A mapping in YAML; lists of plain values stand in a line."""
    lines: list[str] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            lines += [f"{indent}{key}:", *_block(inner, indent + "  ")]
        elif isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
            lines.append(f"{indent}{key}:")
            for member in inner:
                first, *rest = _block(member, indent + "  ")
                lines += [f"{indent}- {first.lstrip()}", *rest]
        elif isinstance(inner, list):
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, inner))}]")
        else:
            lines.append(f"{indent}{key}: {_scalar(inner)}")
    return lines


def _scalar(value: Any) -> str:
    """A value in YAML; every string is quoted, so that `no` stays Norwegian, and every float has its point."""
    if isinstance(value, str):  # not JSON's escapes: YAML has no surrogate pairs
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    text = repr(value)
    if isinstance(value, float) and "." not in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}.0e{exponent}"
    return text


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:96] or "unnamed"


def _title(card: Card) -> str:
    return _line(card.title) or "Untitled module"


def interval_text(metric: Metric) -> str:
    """The 95 % interval, "" if there is none."""
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
