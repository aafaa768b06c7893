"""Completing a card: `complete` puts in statements given as `key=value`, `advice` says what to type for what is missing.

Keys are the card's fields; of its parts `data.1.licence` (the first source; `data.licence` is every source), `cost.device`,
`recipe.epochs`.  The number after the last source makes a new one.  What was measured or follows from the module's making
(metrics, parents) is not typed in; metrics are added from the file that `intarsia eval --out` writes (`measured`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from intarsia.errors import SpecError, UsageError, listing, nearest
from intarsia.modules.card import NOT_EVALUATED, Card, Cost, DataSource, Metric
from intarsia.modules.licences import canonical

EXAMPLES: Mapping[str, str] = MappingProxyType({
    "title": 'title="News topics in Swahili"', "description": 'description="..."', "languages": "languages=swh,kab-Latn", "script": "script=Latn",
    "task": 'task="topic classification"', "base": "base=owner/name", "method": "method=lora", "licence": "licence=CC-BY-4.0",
    "contact": "contact=mail@example.org", "intended_use": 'intended_use="..."', "out_of_scope": 'out_of_scope="..."',
    "bias_evaluation": f'bias_evaluation="{NOT_EVALUATED}"', "warnings": 'warnings="..."', "data": 'data.1.name="..."', "cost": "cost.seconds=3600",
    "recipe": "recipe.epochs=3", "origin": 'origin="https://..."', "sha256": "sha256=<64 hexadecimal digits>",
})  # fmt: skip
"""What a statement looks like, by field."""
_MADE = MappingProxyType({
    "metrics": "metrics are measured: intarsia eval ... --out eval.json, then intarsia card set FILE --eval eval.json",
    "parents": "parents follow from how the module was made",
    "parent_names": "parents follow from how the module was made",
})
_TEXTS = tuple(f.name for f in fields(Card) if f.type == "str")
_LISTS = ("languages", "warnings")
_PARTS = ("data", "cost", "recipe")
KEYS = (*_TEXTS, *_LISTS, *_PARTS)
_SCRIPTS = re.compile(r"[A-Z][a-z]{3}(\+[A-Z][a-z]{3})*")


def complete(card: Card, statements: Mapping[str, Any]) -> Card:
    """The card with these statements; what it says elsewhere stays.

    Args:
        statements: value by key.  Text is taken as it is; lists may be lists or separated by commas; warnings are added to
            those there are, never taken away.

    Raises:
        UsageError: an unknown key, with the nearest known one, or a value of another type.
        SpecError: a value that the card refuses (a malformed tag or digest).
    """
    for key, value in _flat(statements).items():
        field, _, rest = key.partition(".")
        if field in _MADE:
            raise UsageError(f"card: {key} is not for typing in; {_MADE[field]}")
        if field not in KEYS or (bool(rest) and field not in _PARTS) or (not rest and field in _PARTS):
            like = EXAMPLES[field] if field in _PARTS else ""
            known = listing(KEYS, 30)
            raise UsageError(f"card: no statement {key!r}{nearest(field, KEYS) if field not in KEYS else ''}; " + (f"write e.g. {like}" if like else f"known: {known}"))
        if field == "data":
            card = replace(card, data=_sources(card.data, rest, value))
        elif field == "cost":
            card = replace(card, cost=_part(card.cost or Cost(), "cost", rest, value))
        elif field == "recipe":
            card = replace(card, recipe={**card.recipe, rest: value})
        elif field in _LISTS:
            several: Any = {field: _several(card, field, value)}
            card = replace(card, **several)
        else:
            text: Any = {field: _text(field, value)}
            card = replace(card, **text)
    return card


def advice(card: Card) -> list[tuple[str, str]]:
    """What a complete card still lacks, as a phrase, with what to type after `intarsia card set FILE` for it."""
    return [(phrase, _how(place)) for place, phrase in card.gaps()]


def measured(card: Card, document: Mapping[str, Any], split: str | None = None) -> Card:
    """The card with the metrics of an evaluation; those of the same name, split and language are replaced.

    Args:
        document: what `intarsia eval --out` wrote.  The name of a data file is the split, or `split:language`.

    Raises:
        SpecError: the document is none of an evaluation.
    """
    seed = card.recipe.get("seed")
    seeds = (seed,) if isinstance(seed, int) and not isinstance(seed, bool) else ()
    found: dict[tuple[str, str, str], Metric] = {(m.name, m.split, m.language): m for m in card.metrics}
    try:
        for name, entry in document["data"].items():
            part, _, language = name.partition(":")
            for metric, score in entry["metrics"].items():
                found[metric, part, language] = Metric(metric, part, language, float(score["value"]), score["low"], score["high"], score["n"], seeds)
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"not the result of an evaluation: no data with metrics in it ({error!r}); write one with: intarsia eval ... --out eval.json") from None
    return replace(card, metrics=tuple(found.values()))


def _how(place: str) -> str:
    field, _, rest = place.partition(".")
    if field == "metrics":
        return "--eval eval.json   (of: intarsia eval -m FILE test=TEST_FILE --out eval.json)"
    if field == "data" and rest:
        number, _, what = rest.partition(".")
        return f"data.{number}.{EXAMPLES[what]}"
    return EXAMPLES[field]


def _flat(values: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """`{"data": {"licence": "MIT"}}` -> `{"data.licence": "MIT"}`, as configuration files nest."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{lead}{key}.") if isinstance(value, Mapping) else {f"{lead}{key}": value}
    return found


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"card: {key} is a text, found {value!r}; write {EXAMPLES.get(key.rpartition('.')[2], key + '=...')}")
    value = value.strip()
    if key.endswith("licence"):
        return canonical(value)
    if key == "script" and value and not _SCRIPTS.fullmatch(value):
        raise UsageError(f"card: script {value[:80]!r} is no ISO 15924 code such as Latn, or several as Latn+Cyrl")
    return value


def _several(card: Card, field: str, value: Any) -> tuple[str, ...]:
    if field == "languages":
        words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) and word for word in words):
            raise UsageError(f"card: languages are BCP-47 tags, found {value!r}; write {EXAMPLES[field]}")
        return tuple(words)
    added = [value] if isinstance(value, str) else value
    if not isinstance(added, Sequence) or not all(isinstance(one, str) and one.strip() for one in added):
        raise UsageError(f"card: warnings are sentences, found {value!r}; write {EXAMPLES[field]}")
    return tuple(dict.fromkeys((*card.warnings, *(one.strip() for one in added))))


def _sources(data: tuple[DataSource, ...], rest: str, value: Any) -> tuple[DataSource, ...]:
    number, _, what = rest.partition(".") if rest.partition(".")[0].isdecimal() else ("", "", rest)
    if not number:
        if not data:
            raise UsageError(f"card: data.{rest}: there is no source yet; begin with {EXAMPLES['data']}")
        return tuple(_part(source, "data", what, value) for source in data)
    index = int(number) - 1
    if not 0 <= index <= len(data):
        raise UsageError(f"card: data.{number}: there are {len(data)} sources, numbered from 1; data.{len(data) + 1}.name makes a new one")
    if index == len(data):
        if what != "name":
            raise UsageError(f"card: data.{number} is a new source; name it first: data.{number}.name=\"...\"")
        return (*data, DataSource(_text("name", value)))
    return (*data[:index], _part(data[index], "data", what, value), *data[index + 1 :])


def _part(part: Any, field: str, what: str, value: Any) -> Any:
    """A source or the cost with one of its fields set."""
    kinds = {f.name: str(f.type) for f in fields(part)}
    if what not in kinds:
        raise UsageError(f"card: {field} has no {what!r}{nearest(what, kinds)} known: {listing(kinds)}")
    if kinds[what] == "str":
        return replace(part, **{what: _text(f"{field}.{what}", value)})
    whole = kinds[what].startswith("int")
    number = _number(value, whole)
    if number is None or number < 0:
        raise UsageError(f"card: {field}.{what} is {'a whole number' if whole else 'a number'}, found {value!r}")
    return replace(part, **{what: number})


def _number(value: Any, whole: bool) -> int | float | None:
    if isinstance(value, bool):
        return None
    try:
        found: int | float = int(str(value)) if whole else float(str(value))
    except ValueError:
        return None
    return found if found == found and abs(found) < 2**63 else None
