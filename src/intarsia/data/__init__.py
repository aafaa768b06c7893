"""Strict readers and writers, label inventories, tag schemes and `check`; nothing here imports torch or transformers."""

from intarsia.data.check import check, normal_form
from intarsia.data.labels import LabelMap, twins
from intarsia.data.readers import FORMATS, read
from intarsia.data.report import DataReport
from intarsia.data.source import Limits, normalise
from intarsia.data.spans import Span, detect_scheme, irregularities, spans, tags_of, to_iob2
from intarsia.data.table import Cell, Table, concat
from intarsia.data.writer import json_line, write, write_jsonl

__all__ = [
    "FORMATS",
    "Cell",
    "DataReport",
    "LabelMap",
    "Limits",
    "Span",
    "Table",
    "check",
    "concat",
    "detect_scheme",
    "irregularities",
    "json_line",
    "normal_form",
    "normalise",
    "read",
    "spans",
    "tags_of",
    "to_iob2",
    "twins",
    "write",
    "write_jsonl",
]
