"""The file formats of other libraries, read into modules and written from them, with a report of what could not be carried."""

from intarsia.store.convert.adapterhub import read_adapterhub
from intarsia.store.convert.adapterhub_fusion import Setup, read_fusion, read_setup, write_fusion, write_setup
from intarsia.store.convert.adapterhub_write import write_adapterhub
from intarsia.store.convert.detect import Detected, detect
from intarsia.store.convert.export import export_lora
from intarsia.store.convert.peft_read import read_peft
from intarsia.store.convert.peft_write import write_peft
from intarsia.store.convert.report import Report
from intarsia.store.convert.sft import read_sft, write_sft

__all__ = [
    "Detected",
    "Report",
    "Setup",
    "detect",
    "export_lora",
    "read_adapterhub",
    "read_fusion",
    "read_peft",
    "read_setup",
    "read_sft",
    "write_adapterhub",
    "write_fusion",
    "write_peft",
    "write_setup",
    "write_sft",
]
