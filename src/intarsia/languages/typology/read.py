"""Typology from files: URIEL as the package lang2vec carries it (never imported, its arrays are read), or a CSV file.

    iso,family,S_SVO,S_SOV,P_COMPLEX_CODAS         one row a language; an empty cell is a missing value;
    kab,Afro-Asiatic>Berber,0,,1                   `family` (optional) names groups from the largest to the smallest
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.data import read as read_table
from intarsia.errors import DataError, UsageError, listing
from intarsia.languages.typology.features import Typology

LARGEST = 1 << 26  # bytes of one array file
SEPARATOR = ">"


def uriel(folder: str | os.PathLike[str] | None = None) -> Typology:
    """URIEL's 289 features of 7,970 languages, observed and imputed (kNN), with its family groups.

    Args:
        folder: with the files of lang2vec's `data`; None for those of the installed package.

    Raises:
        UsageError: the package is not installed.
        DataError: the files are not what they should be.
    """
    place, release = (Path(folder), "") if folder is not None else _installed()
    average, knn, family = (_arrays(place / f"{name}.npz") for name in ("feature_averages", "feature_predictions", "family_features"))
    languages = tuple(map(str, average["langs"]))
    features = tuple(map(str, average["feats"]))
    observed = average["data"][..., 0].astype(np.float64)
    observed[observed < 0] = np.nan
    predicted = _aligned(knn, languages, features)
    return Typology(f"URIEL (lang2vec{release})", "CC-BY-SA-4.0", languages, features, observed, predicted, _groups(family))


def _installed() -> tuple[Path, str]:
    try:
        found = distribution("lang2vec")  # by its metadata: a script of the same name lies where programs lie, and hides the package from them
        place = Path(str(found.locate_file("lang2vec"))) / "data"
        if place.is_dir():
            return place, f" {found.version}"
    except PackageNotFoundError:
        pass
    raise UsageError("typology needs the URIEL vectors of the package lang2vec: pip install 'intarsia[typology]', or give a CSV file of your own")


def _arrays(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, the limit is {LARGEST:,}")
        with np.load(path, allow_pickle=False) as held:
            found = {name: held[name] for name in ("data", "feats", "langs")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as an array file of lang2vec: {error}") from None
    if found["data"].shape[:2] != (len(found["langs"]), len(found["feats"])):
        raise DataError(f"{path}: {found['data'].shape} values for {len(found['langs'])} languages and {len(found['feats'])} features")
    return found


def _aligned(held: dict[str, Any], languages: tuple[str, ...], features: tuple[str, ...]) -> Any:
    """Values in the order of other languages and features."""
    rows = {str(name): i for i, name in enumerate(held["langs"])}
    columns = {str(name): i for i, name in enumerate(held["feats"])}
    if set(rows) != set(languages) or set(columns) != set(features):
        raise DataError("the files of lang2vec do not have the same languages and features; are they from one release?")
    index = np.ix_([rows[name] for name in languages], [columns[name] for name in features])
    return held["data"][..., 0][index].astype(np.float64)


def _groups(held: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    names = [str(name).removeprefix("F_") for name in held["feats"]]
    belongs = held["data"][..., 0] > 0
    sizes = belongs.sum(0)
    found = {}
    for code, row in zip(held["langs"], belongs):
        own = sorted(np.flatnonzero(row), key=lambda i: (-sizes[i], names[i]))
        found[str(code)] = tuple(names[i] for i in own)
    return found


def read_csv(path: str | os.PathLike[str], *, licence: str = "unknown") -> Typology:
    """Typology of one's own.

    Raises:
        DataError: no column `iso`, a value that is no number between 0 and 1, a language twice.
    """
    table = read_table(path, format="csv")
    if "iso" not in table.names:
        raise DataError(f"{path}: a typology file has a column 'iso' (ISO 639-3 codes); its columns are {listing(map(repr, table.names))}")
    codes = table.texts("iso")
    twice = [code for code, count in Counter(codes).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {listing(twice)} more than once")
    features = tuple(name for name in table.names if name not in ("iso", "family"))
    values = np.full((len(codes), len(features)), np.nan)
    for column, name in enumerate(features):
        for row, cell in enumerate(table.texts(name)):
            if cell.strip():
                values[row, column] = _number(cell, table.where(row), name)
    families = {}
    if "family" in table.names:
        families = {c: tuple(g.strip() for g in cell.split(SEPARATOR) if g.strip()) for c, cell in zip(codes, table.texts("family"))}
    return Typology(str(path), licence, tuple(codes), features, values, None, families)


def _number(cell: str, place: str, name: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise DataError(f"{place}: {name}={cell!r} is no number between 0 and 1; leave the cell empty where nothing is known")
    return value
