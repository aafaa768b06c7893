"""A module as a value and as a file: `Module`, `Card`, `save`, `load`."""

from intarsia.modules.atomic import sweep_temporary, write_atomic
from intarsia.modules.card import NOT_EVALUATED, UNKNOWN, Card, Cost, DataSource, Metric
from intarsia.modules.compact import compact
from intarsia.modules.completing import complete
from intarsia.modules.file import Header, check_finite, dumps, load, loads, put_card, read_header, recarded, save
from intarsia.modules.module import DTYPES, Module, Owned
from intarsia.modules.names import check_name, quoted

__all__ = [
    "DTYPES",
    "NOT_EVALUATED",
    "UNKNOWN",
    "Card",
    "Cost",
    "DataSource",
    "Header",
    "Metric",
    "Module",
    "Owned",
    "check_finite",
    "check_name",
    "compact",
    "complete",
    "dumps",
    "load",
    "loads",
    "put_card",
    "quoted",
    "read_header",
    "recarded",
    "save",
    "sweep_temporary",
    "write_atomic",
]
