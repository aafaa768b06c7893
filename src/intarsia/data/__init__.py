"""Strict readers, label inventories and `check`; nothing here imports torch or transformers."""

from intarsia.data.readers import FORMATS, read
from intarsia.data.source import Limits
from intarsia.data.table import Cell, Table, concat

__all__ = ["FORMATS", "Cell", "Limits", "Table", "concat", "read"]
