"""The script of training data, from its letters."""

from __future__ import annotations

import pytest

from intarsia.data import Table
from intarsia.train.script import _CODES, all_settings, script_of


@pytest.mark.parametrize(("texts", "script"), [
    (["Habari ya asubuhi", "7"], "Latn"), (["ⴰⵣⵓⵍ", "azul"], "Latn+Tfng"), (["नमस्ते दुनिया"], "Deva"), (["今日は晴れです"], "Jpan"), (["한국어 漢字"], "Kore"), (["中文"], "Hani"),
    (["Привет, мир, и ещё очень много других слов по-русски", "ok"], "Cyrl"), (["ᱥᱟᱱᱛᱟᱲᱤ"], "Olck"), (["12 34", ""], ""), (["𐎠𐎭𐎶"], ""),
])  # fmt: skip
def test_scripts(texts: list[str], script: str) -> None:
    assert script_of(Table.of({"text": texts}), {}) == script


def test_labels_are_no_text_and_tokens_are() -> None:
    table = Table.of({"sentence": ["наука"], "label": ["science and much more of it"]})
    assert script_of(table, {"text": "sentence", "label": "label"}) == "Cyrl"
    assert script_of(Table.of({"tokens": [["мир", "ok"]], "tags": [["B-LOC", "O"]]}), {"tokens": "tokens"}) == "Cyrl+Latn"
    assert script_of(table, {}) == "", "nothing says which column is text"


def test_codes_are_of_iso_15924() -> None:
    assert all(len(code) == 4 and code.istitle() for code in _CODES.values()) and len(set(_CODES.values())) == len(_CODES)


def test_columns_of_the_default_names_are_read_too() -> None:
    """`Task.settings` leaves defaults out; with them translations have a script, and both texts of a pair count."""
    from intarsia.tasks import build
    from tests.tasks import toys

    task = build("seq2seq", toys.bytelevel())
    assert "source" not in task.settings()
    assert script_of(Table.of({"source": ["мир"], "target": ["ειρηνη"]}), all_settings(task)) == "Grek+Cyrl"
    task = build("classify", toys.bytelevel(), labels=("a", "b"), settings={"pair": "other"})
    assert script_of(Table.of({"text": ["мир"], "other": ["ειρηνη"], "source": ["web"]}), all_settings(task)) == "Grek+Cyrl"
