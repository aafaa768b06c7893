"""Configuration files: strict, helpful, overridden by flags, saved whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import StoreError, UsageError
from intarsia.train import EvalConfig, PredictConfig, Recipe, TrainConfig, load_config, save_config, schema

LEAST: dict[str, Any] = {"name": "topics", "base": "me5-small", "task": "classify", "train": "train.tsv", "out": "runs/topics"}
YAML = "name: topics\nbase: me5-small\ntask: classify\ntrain: [a.tsv, b.tsv]\nout: runs/topics\nroles: {language: no}\nrecipe:\n  learning_rate: 1e-4\n  epochs: 3\n"
TOML = 'name = "topics"\nbase = "me5-small"\ntask = "classify"\ntrain = ["a.tsv", "b.tsv"]\nout = "runs/topics"\n[roles]\nlanguage = "no"\n[recipe]\nlearning_rate = 1e-4\nepochs = 3\n'
needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in the standard library from 3.11 on")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.yml", "\ufeff" + YAML), pytest.param("c.toml", TOML, marks=needs_tomllib)])
def test_files_of_each_kind_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    config = load_config(TrainConfig, write(tmp_path, name, text))
    assert config.train == ["a.tsv", "b.tsv"] and config.roles == {"language": "no"} and config.method == "lora"
    assert config.build_recipe() == Recipe(learning_rate=1e-4, epochs=3)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", YAML)
    config = load_config(TrainConfig, path, {"recipe.epochs": 7, "dev": "dev.tsv", "task_settings.text": "sentence"})
    assert config.build_recipe() == Recipe(learning_rate=1e-4, epochs=7)
    assert config.dev == "dev.tsv" and config.task_settings == {"text": "sentence"}


def test_the_resolved_configuration_comes_back(tmp_path: Path) -> None:
    config = load_config(TrainConfig, write(tmp_path, "c.yaml", YAML), {"roles.language": "no", "card.title": "1e-4"})
    for name in ("saved.json", "saved.yaml"):
        save_config(config, tmp_path / name)
        assert load_config(TrainConfig, tmp_path / name) == config
    assert json.loads((tmp_path / "saved.json").read_text("utf-8"))["recipe"]["batch_size"] == Recipe().batch_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metod": "lora"}, "unknown key 'metod'; did you mean 'method'?"),
        ({"recipe.epoch": 3}, "unknown key 'recipe.epoch'; did you mean 'epochs'?"),
        ({"learning_rate": 1e-4}, "unknown key 'learning_rate'; it belongs to the section 'recipe'"),
        ({"recipe.out": "x"}, "unknown key 'recipe.out'; it belongs to the top level"),
        ({"recipe.epochs": "3"}, "recipe.epochs should be a valid number, found '3'"),
        ({"recipe.batch_size": 16.0}, "recipe.batch_size should be a valid integer, found 16.0"),
        ({"recipe.select_best": 1}, "recipe.select_best should be a valid boolean, found 1"),
        ({"recipe.schedule": "lin"}, "recipe.schedule should be 'linear', 'cosine' or 'constant', found 'lin'"),
        ({"recipe.batch_size": 0}, "batch_size is a whole number, at least 1; found 0"),
        ({"train": 3}, "train should be a valid string or a valid list, found 3"),
        ({"recipe": 3}, "recipe should be a valid section, found 3"),
        ({"method_seed": -1}, "method_seed should be greater than or equal to 0, found -1"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, overrides={**LEAST, **change})
    assert message in str(caught.value) and str(caught.value).startswith("options: ")


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, write(tmp_path, "c.yaml", "name: 3\nbase: b\nnonsense: 1\n"))
    for part in ("c.yaml: ", "name should be a valid string, found 3", "unknown key 'nonsense'", "'task' is missing", "'out' is missing"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.yaml", b"- 1\n", "found list"),
        ("c.yaml", b"a: \xff", "not UTF-8 at byte 3"),
        ("c.json", b'{"a": 1, "a": 2}', "stands twice"),
        ("c.json", b'{"a": NaN}', "NaN"),
        ("c.txt", b"a: 1", "a configuration is a .yaml, .yml, .toml or .json file"),
        pytest.param("c.toml", b"a = 1979-05-27", "put it in quotes", marks=needs_tomllib),
        pytest.param("c.toml", b"a = [inf]", "put it in quotes", marks=needs_tomllib),
        pytest.param("c.toml", b"a = 1\na = 2", "c.toml", marks=needs_tomllib),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, path)
    assert message in str(caught.value) and name in str(caught.value)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", YAML)
    with pytest.raises(StoreError, match=r"confg\.yaml.*did you mean 'config\.yaml'"):
        load_config(TrainConfig, tmp_path / "confg.yaml")


def test_the_other_kinds() -> None:
    assert load_config(EvalConfig, overrides={"base": "b", "modules.m": "m.safetensors", "data.dev": "dev.tsv"}).batch_size == 64
    assert load_config(PredictConfig, overrides={"base": "b", "modules.m": "m.safetensors"}).input == "-"
    with pytest.raises(UsageError, match="batch_size should be greater than or equal to 1, found 0"):
        load_config(PredictConfig, overrides={"base": "b", "modules.m": "m.safetensors", "batch_size": 0})


@pytest.mark.parametrize("kind", ["train", "eval", "predict"])
def test_schemas_describe_every_key(kind: str) -> None:
    found = json.loads(json.dumps(schema(kind)))
    assert found["additionalProperties"] is False
    assert all("description" in value or "$ref" in value for value in found["properties"].values())


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, intarsia.train.config, intarsia.train.signals, intarsia.train.lock, intarsia.train.progress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
