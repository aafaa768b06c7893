"""Configuration files of `train`, `eval` and `predict`: YAML, TOML or JSON, strict, with command-line flags on top.

    name: topics                        a key that is not known is refused, with the nearest known one
    base: me5-small
    task: classify
    method: lora
    method_settings: {rank: 8}
    train: train.tsv
    dev: dev.tsv
    out: runs/topics
    recipe: {epochs: 5, batch_size: 16}

Values keep their types: `no` is the string "no", 1e-4 is a number, "8" is not one.  A configuration says what to do; names of
tasks, methods and their settings are checked where they are built.  What is not here: the command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from intarsia._codec import parse_json
from intarsia.errors import IntarsiaError, StoreError, UsageError, listing, nearest
from intarsia.train import strict_yaml
from intarsia.train.recipe import Recipe

Settings = dict[str, Any]
C = TypeVar("C", bound="Configuration")
_MEMBER = re.compile(r"str|int|float|none|list\[.*\]")  # what pydantic appends to a location for a member of a union


class Strict(BaseModel):
    """Unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _recipe_section() -> type[Strict]:
    hints = typing.get_type_hints(Recipe)
    members: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(Recipe)}
    section: type[Strict] = create_model("RecipeSection", __base__=Strict, __doc__=Recipe.__doc__, **members)
    return section


RecipeSection = _recipe_section()
"""The fields of `Recipe` as a section of a configuration file."""


class Configuration(Strict):
    """Base of the three kinds."""

    def check(self) -> None:
        """Raise UsageError for values out of range."""


class TrainConfig(Configuration):
    """What `intarsia train` does."""

    name: str = Field(description="name of the new module")
    base: str = Field(description="embedded name, local path or hub id of the base model")
    task: str = Field(description="classify, regress, tag, parse, mlm, clm, seq2seq")
    task_settings: Settings = Field(default_factory=dict, description="columns, label scheme, text prefix ... of the task")
    method: str = Field(default="lora", description="method by the literature's name")
    method_settings: Settings = Field(default_factory=dict, description="arguments of the method")
    method_seed: int = Field(default=0, ge=0, description="seed of the initial values")
    train: str | list[str] = Field(description="training data: one file or several")
    dev: str | list[str] | None = Field(default=None, description="data that selects the best checkpoint")
    format: str | None = Field(default=None, description="format of the data files, where their names do not say it")
    read_settings: Settings = Field(default_factory=dict, description="column names, delimiter, encoding ... of the reader")
    modules: dict[str, str] = Field(default_factory=dict, description="stored modules by name, frozen")
    expression: str | None = Field(default=None, description="what runs while training; default: the new module alone")
    new: dict[str, Settings] = Field(default_factory=dict, description="more new modules that are trained along: method and its settings, by name")
    along: dict[str, float | None] = Field(default_factory=dict, description="modules trained along, with a learning rate each or null for their method's")
    roles: dict[str, str] = Field(default_factory=dict, description="what the module is about, e.g. language: swh")
    card: Settings = Field(default_factory=dict, description="fields of the card that training cannot know")
    out: str = Field(description="run directory")
    recipe: RecipeSection = Field(default_factory=RecipeSection, description="hyper-parameters")  # type: ignore[valid-type]

    def build_recipe(self) -> Recipe:
        """The recipe; raises UsageError for values out of range."""
        return Recipe(**self.recipe.model_dump())  # type: ignore[attr-defined]

    def check(self) -> None:
        self.build_recipe()


class EvalConfig(Configuration):
    """What `intarsia eval` does."""

    base: str = Field(description="embedded name, local path or hub id of the base model")
    modules: dict[str, str] = Field(description="stored modules by name")
    expression: str | None = Field(default=None, description="what runs; default: the only module")
    head: str | None = Field(default=None, description="the module whose head answers, where several have one")
    data: dict[str, str] = Field(description="evaluation data by the name of the split or language")
    format: str | None = Field(default=None, description="format of the data files, where their names do not say it")
    read_settings: Settings = Field(default_factory=dict, description="column names, delimiter, encoding ... of the reader")
    task_settings: Settings = Field(default_factory=dict, description="settings that differ from those stored with the module")
    batch_size: int = Field(default=64, ge=1, description="examples of one forward pass")
    predictions: str | None = Field(default=None, description="folder for predictions per row")
    out: str | None = Field(default=None, description="file for the metrics (json)")


class PredictConfig(Configuration):
    """What `intarsia predict` does."""

    base: str = Field(description="embedded name, local path or hub id of the base model")
    modules: dict[str, str] = Field(description="stored modules by name")
    expression: str | None = Field(default=None, description="what runs; default: the only module")
    head: str | None = Field(default=None, description="the module whose head answers, where several have one")
    input: str = Field(default="-", description="file to read, or - for lines of standard input")
    format: str | None = Field(default=None, description="format of the input, where its name does not say it")
    read_settings: Settings = Field(default_factory=dict, description="column names, delimiter, encoding ... of the reader")
    task_settings: Settings = Field(default_factory=dict, description="settings that differ from those stored with the module")
    batch_size: int = Field(default=64, ge=1, description="examples of one forward pass")
    out: str = Field(default="-", description="file to write, or - for standard output")


KINDS: Mapping[str, type[Configuration]] = {"train": TrainConfig, "eval": EvalConfig, "predict": PredictConfig}


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of a kind of configuration, for editors."""
    if kind not in KINDS:
        raise UsageError(f"unknown kind of configuration {kind!r}{nearest(kind, KINDS)} known: {listing(KINDS)}")
    return KINDS[kind].model_json_schema()


def load_config(kind: type[C], path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """A configuration from a file, with values on top.

    Args:
        kind: `TrainConfig`, `EvalConfig` or `PredictConfig`.
        path: a .yaml, .yml, .toml or .json file; None for the overrides alone.
        overrides: values by dotted key (`recipe.epochs`), as the command line's flags give them; they win.

    Raises:
        UsageError: an unknown key, a value of another type, a missing key; all problems at once.
        StoreError: the file cannot be read.
    """
    values = {} if path is None else read_file(path)
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    where = "options" if path is None else os.fspath(path)
    try:
        config = kind.model_validate(values)
        config.check()
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_problems(kind, error))) from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return config


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in a configuration file, by the kind its name says."""
    name, suffix = os.fspath(path), Path(path).suffix.lower()
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        known = os.listdir(Path(path).parent) if Path(path).parent.is_dir() else ()
        hint = nearest(Path(path).name, known) if isinstance(error, FileNotFoundError) else ""
        raise StoreError(f"cannot read the configuration {name}: {error.strerror or error}{hint}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 at byte {error.start}") from None
    if suffix in (".yaml", ".yml"):
        values = strict_yaml.loads(text, name)
    elif suffix == ".json":
        try:
            values = parse_json(text, name)
        except IntarsiaError as error:
            raise UsageError(str(error)) from None
    elif suffix == ".toml":
        values = _toml(text, name)
    else:
        raise UsageError(f"{name}: a configuration is a .yaml, .yml, .toml or .json file")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{name}: a configuration is a list of `key: value`, found {type(values).__name__}")
    return values


def save_config(config: Configuration, path: str | os.PathLike[str]) -> None:
    """Write a configuration with all its values (JSON, which is YAML too); `load_config` reads it back."""
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode("utf-8")

    from intarsia.modules.atomic import write_atomic  # its package needs torch; reading a configuration does not

    write_atomic(path, [data], len(data))


def _toml(text: str, name: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise UsageError(f"{name}: reading TOML needs Python 3.11, or: pip install tomli; or write the file as YAML") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: {error}") from None
    _check_plain(values, name)
    return values


def _check_plain(value: Any, where: str) -> None:
    """Refuse what TOML knows and a configuration does not: dates, times, infinity, NaN."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}: {key}")
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where)
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{where}: {value} is neither a string, a finite number nor true/false; put it in quotes")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"option {key!r}: {section!r} is not a section in the configuration file, it is {values!r}")
    values[last] = value


def _problems(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence per key that pydantic found a problem with; the members of a union are joined."""
    wrong: dict[str, tuple[list[str], Any]] = {}
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not (isinstance(part, str) and _MEMBER.fullmatch(part)))
        if item["type"] == "extra_forbidden":
            found.append(f"unknown key {key!r}{_suggest(kind, key)}")
        elif item["type"] == "missing":
            found.append(f"the key {key!r} is missing")
        else:
            wanted = item["msg"].removeprefix("Input should be ").replace("dictionary or instance of RecipeSection", "section")
            wrong.setdefault(key, ([], item["input"]))[0].append(wanted)
    return found + [f"{key} should be {' or '.join(dict.fromkeys(w))}, found {v!r}" for key, (w, v) in wrong.items()]


def _suggest(kind: type[BaseModel], key: str) -> str:
    *section, last = key.split(".")
    known = _sections(kind)
    here = known.get(".".join(section), [])
    if close := nearest(last, here):
        return close
    for other, names in known.items():
        if last in names:
            return f"; it belongs to {'the section ' + repr(other) if other else 'the top level'}"
    for other, names in known.items():
        if close := nearest(last, names):
            return close.replace("'", f"'{other}.", 1) if other else close
    return f" (known: {listing(here, 30)})"


def _sections(kind: type[BaseModel]) -> dict[str, list[str]]:
    found = {"": list(kind.model_fields)}
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found[name] = list(inner.model_fields)
    return found
