"""The page on formats lists what the code reads and writes, row by row."""

from __future__ import annotations

from pathlib import Path

from intarsia.store.convert.adapterhub import FIELDS
from intarsia.store.convert.formats import FORMATS, table
from intarsia.store.convert.peft_config import DEFAULTS
from intarsia.store.convert.peft_kinds import KINDS

PAGE = Path(__file__).parents[2] / "docs/formats.md"


def test_the_page_is_up_to_date() -> None:
    _, mark, rest = PAGE.read_text().partition("<!-- table -->\n")
    assert mark and rest.strip() == table().strip(), "write it again: python -m tests.store.test_convert_docs"


def test_every_registered_kind_has_a_row() -> None:
    assert {row.kind for row in FORMATS["peft"]} == set(DEFAULTS)
    assert {row.kind for row in FORMATS["AdapterHub"] if row.reads} - {"heads", "fusion", "union"} == set(FIELDS)


def test_rows_say_what_is_written() -> None:
    special = {"LN_TUNING", "PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE", "TRAINABLE_TOKENS"}
    written = {kind.peft_type for kind in KINDS if kind.write is not None} | special & set(DEFAULTS)
    assert {row.kind for row in FORMATS["peft"] if row.writes} == written


if __name__ == "__main__":
    head, mark, _ = PAGE.read_text().partition("<!-- table -->\n")
    PAGE.write_text(f"{head}{mark}{table()}\n")
