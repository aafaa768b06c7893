"""The script of training data, for a module's card: ISO 15924 codes, found by counting letters.

What is not here: the language, which letters do not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from intarsia.data import Table
from intarsia.data.characters import scripts
from intarsia.train.task import Task

SHARE = 0.05
"""Scripts with fewer of the letters are names and loan words."""
ROWS = 5_000
"""Rows that are looked at, evenly spread."""
_ROLES = ("text", "pair", "tokens", "source", "target", "prompt", "completion")
_CODES: Mapping[str, str] = MappingProxyType(dict(pair.rsplit(" ", 1) for pair in (
    "Latin Latn", "Cyrillic Cyrl", "Arabic Arab", "Greek Grek", "Hebrew Hebr", "Armenian Armn", "Georgian Geor", "Devanagari Deva", "Bengali Beng",
    "Gurmukhi Guru", "Gujarati Gujr", "Oriya Orya", "Tamil Taml", "Telugu Telu", "Kannada Knda", "Malayalam Mlym", "Sinhala Sinh", "Thai Thai",
    "Lao Laoo", "Tibetan Tibt", "Myanmar Mymr", "Khmer Khmr", "Ethiopic Ethi", "Tifinagh Tfng", "Nko Nkoo", "Cherokee Cher", "Canadian Syllabics Cans",
    "Mongolian Mong", "Syriac Syrc", "Thaana Thaa", "Ol Chiki Olck", "Meetei Mayek Mtei", "Vai Vaii", "Adlam Adlm", "Javanese Java", "Balinese Bali",
    "Sundanese Sund", "Coptic Copt", "Gothic Goth", "Runic Runr", "Ogham Ogam", "Bopomofo Bopo", "Yi Yiii", "Lisu Lisu", "Tai Le Tale", "New Tai Lue Talu",
    "Tai Tham Lana", "Cham Cham", "Chakma Cakm", "Limbu Limb", "Lepcha Lepc", "Kayah Li Kali", "Bamum Bamu", "Osage Osge", "Hanifi Rohingya Rohg",
    "Pahawh Hmong Hmng", "Wancho Wcho", "Warang Citi Wara", "Medefaidrin Medf", "Samaritan Samr", "Mandaic Mand", "Han Hani", "Hangul Kore",
)))  # fmt: skip
_KANA = ("Hiragana", "Katakana")


def script_of(table: Table, settings: Mapping[str, Any]) -> str:
    """Codes of the scripts of a table's texts, most frequent first, joined by `+`; "" if one has no code here.

    Args:
        settings: of the task, which name the columns that hold text; those that are defaults too (`all_settings`).
    """
    columns = text_columns(table, settings)
    step = max(1, len(table) // ROWS)
    counts = scripts(_texts(table, columns or [name for name in ("text", "tokens") if name in table.names], step))
    if any(name in counts for name in _KANA):
        merged = sum(counts.pop(name, 0) for name in (*_KANA, "Han"))
        counts = {"Japanese": merged, **counts}
    if "Hangul" in counts:
        counts["Hangul"] += counts.pop("Han", 0)
    whole = sum(counts.values())
    found = [name for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count >= SHARE * whole]
    codes = ["Jpan" if name == "Japanese" else _CODES.get(name, "") for name in found]
    return "+".join(codes) if all(codes) else ""


def text_columns(table: Table, settings: Mapping[str, Any]) -> list[str]:
    """The columns of a table that a task reads texts from; its settings name them."""
    return [name for role in _ROLES if isinstance(name := settings.get(role), str) and name in table.names]


def all_settings(task: Task) -> dict[str, Any]:
    """A task's settings with the defaults, which `Task.settings` leaves out."""
    options = getattr(task, "options", None)
    return {**({field.name: getattr(options, field.name) for field in fields(options)} if is_dataclass(options) else {}), **task.settings()}


def _texts(table: Table, columns: Iterable[str], step: int) -> Iterable[str]:
    for name in columns:
        for cell in table.column(name)[::step]:
            yield cell if isinstance(cell, str) else " ".join(cell)
