"""Reading columns, guessing them, and the registry."""

from __future__ import annotations

import dataclasses
import unicodedata

import pytest

from intarsia.data import Table
from intarsia.errors import DataError, ModuleError, SpecError, UsageError
from intarsia.tasks import CONTEXT, TASKS, base_settings, build, columns, from_module, infer_columns, infer_task
from tests import zoo
from tests.tasks import toys


def test_every_role_is_known_and_every_default_column_is_its_first_name() -> None:
    for kind in TASKS.values():
        for role in kind.roles:
            default = kind.defaults[role]
            assert default in (None, columns.ROLES[role][0])
        assert set(kind.required) <= set(kind.roles)


@pytest.mark.parametrize(
    ("names", "task", "found"),
    [
        (("index_id", "category", "text"), "classify", {"text": "text", "label": "category"}),
        (("premise", "hypothesis", "label"), "classify", {"text": "premise", "pair": "hypothesis", "label": "label"}),
        (("sentence1", "sentence2", "score"), "regress", {"text": "sentence1", "pair": "sentence2", "value": "score"}),
        (("form", "upos"), "tag", {"tokens": "form", "tags": "upos"}),
        (("tokens", "tags"), "tag", {"tokens": "tokens", "tags": "tags"}),
        (("source", "target"), "seq2seq", {"source": "source", "target": "target"}),
        (("mr", "ref"), "clm", {"prompt": "mr", "completion": "ref"}),
        (("text",), "mlm", {"text": "text"}),
        (("input", "text"), "clm", {"text": "text"}),
    ],
)
def test_columns_are_inferred(names: tuple[str, ...], task: str, found: dict[str, str]) -> None:
    cell = [("a",)] if task == "tag" else ["a"]
    assert infer_columns(Table.of(dict.fromkeys(names, cell)), task) == found


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (("tokens", "ner_tags"), "tag"),
        (("src", "tgt"), "seq2seq"),
        (("tweet", "sentiment"), "classify"),
        (("text",), "mlm"),
        (("prompt", "completion"), "clm"),
    ],
)
def test_the_task_is_inferred(names: tuple[str, ...], task: str) -> None:
    assert infer_task(Table.of({name: ["x"] for name in names})) == task


def test_columns_that_say_nothing() -> None:
    table = Table.of({"a": ["x"], "b": ["y"]})
    with pytest.raises(DataError, match="suggest no task"):
        infer_task(table)
    with pytest.raises(DataError, match=r"which column is the text.*--columns text=a"):
        infer_columns(table, "classify")


def test_lists_of_dictionaries_are_tables() -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert columns.texts(rows, "text") == ("a", "b")
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        columns.texts(rows, "txt")


def test_cells_come_in_one_unicode_form() -> None:
    decomposed = unicodedata.normalize("NFD", "ọ̀rẹ́")
    table = Table.of({"text": [decomposed], "tokens2": ["x"]})
    assert columns.texts(table, "text") == (unicodedata.normalize("NFC", decomposed),)
    assert columns.texts(table, "text", "none") == (decomposed,)
    words = Table.of({"tokens": [(decomposed, "a")]})
    assert columns.tokens(words, "tokens") == ((unicodedata.normalize("NFC", decomposed), "a"),)


def test_wrong_cells_name_their_place() -> None:
    with pytest.raises(DataError, match=r"row 2.*a finite number"):
        columns.numbers(Table.of({"v": ["1.5", "nan"]}), "v")
    with pytest.raises(DataError, match=r"row 1.*a finite number"):
        columns.numbers([{"v": "3,5"}], "v")
    with pytest.raises(DataError, match="text was expected"):
        columns.texts([{"v": ("a",)}], "v")
    with pytest.raises(DataError, match="list of words was expected"):
        columns.tokens([{"v": "a b"}], "v")
    with pytest.raises(DataError, match="holds 7"):
        columns.texts([{"v": 7}], "v")
    with pytest.raises(DataError, match="no rows"):
        columns.texts([], "v")


def test_label_inventories() -> None:
    table = Table.of({"label": ["1", "0", "10", "0"]})
    assert columns.inventory(table, table["label"], "label").names == (
        "0",
        "1",
        "10",
    )  # strings, in the order of numbers
    with pytest.raises(DataError, match="nothing to learn"):
        columns.inventory(table, ["a", "a"], "label")
    with pytest.raises(DataError, match=r"row 2.*empty label"):
        columns.inventory(table, ["a", "", "b"], "label")
    with pytest.raises(DataError, match="differ only in case"):
        columns.inventory(table, ["Sports", "sports "], "label")


def test_build_refuses_what_it_does_not_know() -> None:
    tokenizer = toys.wordpiece()
    with pytest.raises(SpecError, match="unknown task 'classfy'; did you mean 'classify'"):
        build("classfy", tokenizer)
    with pytest.raises(UsageError, match="no setting 'prefx'; did you mean 'prefix'"):
        build("classify", tokenizer, labels=["a", "b"], settings={"prefx": "x"})
    with pytest.raises(UsageError, match="no column 'txt'; did you mean 'text'"):
        build("classify", tokenizer, labels=["a", "b"], columns={"txt": "x"})
    with pytest.raises(UsageError, match="max_length: expected"):
        build("classify", tokenizer, labels=["a", "b"], settings={"max_length": "long"})
    with pytest.raises(UsageError, match="needs its labels"):
        build("classify", tokenizer)
    with pytest.raises(UsageError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        build("classify", tokenizer, labels=["a", "b"], settings={"metric": "acuracy"})
    with pytest.raises(UsageError, match="NFX"):
        build("classify", tokenizer, labels=["a", "b"], settings={"normalise": "NFX"})


@dataclasses.dataclass
class Stored:
    """What `from_module` reads of a module."""

    context: dict[str, object]
    labels: tuple[str, ...] | None
    name: str = "m"


CASES = {
    "classify": ({"text": "t", "prefix": "query: ", "problem": "multi"}, ("b", "a")),
    "regress": ({"value": "score"}, None),
    "tag": ({"overlap": 3, "max_length": 20}, ("O", "B-X", "I-X")),
    "parse": ({"heads": "h", "arc_width": 8, "max_length": 20}, ("det", "root")),
    "mlm": ({"lm_head": "new", "rate": 0.2, "whole_words": True}, None),
    "clm": ({"prompt": "p", "completion": "c", "generate": True}, None),
    "seq2seq": ({"beams": 4}, None),
    "align": ({"how": "contrastive", "both": False}, None),
}


def test_every_task_has_a_case() -> None:
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("name", CASES)
def test_settings_rebuild_the_task(name: str) -> None:
    settings, labels = CASES[name]
    task = build(name, toys.unigram(), labels=labels, settings=settings)
    stored = task.settings()
    assert stored["name"] == name and stored["max_length"] == settings.get("max_length", 64)
    again = from_module(Stored({CONTEXT: stored}, labels), toys.unigram())
    assert type(again) is type(task) and again.options == task.options and again.labels == task.labels
    assert again.head == task.head and again.metric == task.metric


def test_a_module_without_a_task_is_refused() -> None:
    with pytest.raises(ModuleError, match="does not say which task"):
        from_module(Stored({}, None), toys.unigram())


def test_a_model_settles_what_follows_from_it() -> None:
    tokenizer = toys.wordpiece(int(1e30))
    headless, _ = zoo.make("bert", headless=True)
    with_head, _ = zoo.make("bert")
    fresh = build("mlm", tokenizer, model=headless)
    assert fresh.head is not None and fresh.model_head == "none" and fresh.max_length == 64
    own = build("mlm", tokenizer, model=with_head)
    assert own.head is None and own.model_head == "masked-lm"


def test_settings_of_a_base() -> None:
    @dataclasses.dataclass
    class Base:
        pooling: str | None
        text_prefix: str

    assert base_settings("classify", Base("cls", "query: ")) == {"prefix": "query: ", "pooling": "first"}
    assert base_settings("tag", Base("mean", "query: ")) == {"prefix": "query: "}
    assert base_settings("clm", Base(None, "")) == {}
