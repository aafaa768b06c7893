"""Typology: what is missing stays missing, imputed values are never observed ones, another file has the same interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from intarsia.errors import DataError, UsageError
from intarsia.languages.tags import alternatives, iso639_3
from intarsia.languages.typology import Glottolog, Typology, read_csv, uriel

CSV = """iso,family,S_SVO,S_SOV,S_VSO,P_TONE
kab,Afro-Asiatic>Berber,0,,1,0
shi,Afro-Asiatic>Berber,0,0,1,
ara,Afro-Asiatic>Semitic,0,0,1,0
swa,Bantu,1,0,0,1
eng,,1,0,0,0
"""


@pytest.fixture
def own(tmp_path: Path) -> Typology:
    (tmp_path / "t.csv").write_text(CSV, "utf-8")
    return read_csv(tmp_path / "t.csv")


def test_codes() -> None:
    assert [iso639_3(tag) for tag in ("sw", "swh", "kab-Latn", "en")] == ["swa", "swh", "kab", "eng"]
    assert set(alternatives("swh")) == {"swh", "swa"} and alternatives("swa")[0] == "swa" and "swh" in alternatives("swa")
    with pytest.raises(UsageError, match="not a registered language"):
        iso639_3("xx-Yyyy-nonsense")


def test_missing_values_are_explicit(own: Typology) -> None:
    vector = own.vector("kab", ("syntax",))
    assert vector.values.tolist() == [0, 0, 1] and vector.mask.tolist() == [True, False, True] and vector.observed == 2
    assert own.vector("kab", ("syntax",), "mean").values[1] == 0.0 and own.vector("shi", ("phonology",), "mean").values[0] == pytest.approx(0.25)
    with pytest.raises(UsageError, match="no imputed values"):
        own.vector("kab", ("syntax",), "knn")
    with pytest.raises(UsageError, match="no imputed values"):
        own.twins("kab", ("syntax",), "knn")
    with pytest.raises(UsageError, match="not one of"):
        own.nearest("kab", missing="men")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no features of the block 'inventory'"):
        own.vector("kab", ("inventory",))


def test_distances_are_over_what_both_have(own: Typology) -> None:
    assert own.distance("kab", "shi").distance == pytest.approx(0) and own.distance("kab", "shi").shared == 2
    assert own.distance("kab", "swa").distance == pytest.approx(1)
    near = own.nearest("kab", least=1)
    assert [n.language for n in near[:2]] == ["ara", "shi"] or [n.language for n in near[:2]] == ["shi", "ara"]
    assert own.distance("shi", "ara", ("phonology",)).shared == 0 and np.isnan(own.distance("shi", "ara", ("phonology",)).distance)
    assert own.nearest("swh", ("swa", "eng"), least=1)[0].language == "eng"  # not its own macro-language


def test_families(own: Typology) -> None:
    assert own.path("kab") == ("Afro-Asiatic", "Berber", "kab")
    assert own.relatives("kab") == (("shi", 2), ("ara", 1))
    with pytest.raises(UsageError, match="has no language 'fin'"):
        own.code("fin")


@pytest.mark.parametrize(("cell", "message"), [("kab,,2,,,", "between 0 and 1"), ("kab,,x,,,", "between 0 and 1"), ("kab,,0,,,\nkab,,0,,,", "more than once")])
def test_bad_files_are_refused(tmp_path: Path, cell: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"iso,family,S_SVO,S_SOV,S_VSO,P_TONE\n{cell}\n", "utf-8")
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "t.csv")


def test_glottolog(tmp_path: Path) -> None:
    head = "ID,Name,Family_ID,Level,ISO639P3code\n"
    rows = "afro1255,Afro-Asiatic,,family,\nkaby1243,Kabyle,afro1255,language,kab\ntach1250,Tachelhit,afro1255,language,shi\nbasq1248,Basque,,language,eus\n"
    (tmp_path / "languages.csv").write_text(head + rows, "utf-8")
    tree = Glottolog.read(tmp_path)
    assert tree.path("kab") == ("afro1255", "kaby1243") and tree.path("eu") == ("basq1248",) and not tree.deep
    assert tree.relatives("kab", ("shi", "eus", "kab")) == (("shi", 1),)
    (tmp_path / "values.csv").write_text("Language_ID,Parameter_ID,Value\nkaby1243,classification,afro1255/berb1260\nkaby1243,level,language\n", "utf-8")
    deep = Glottolog.read(tmp_path)
    assert deep.path("kab") == ("afro1255", "berb1260", "kaby1243") and deep.deep


def test_uriel() -> None:
    """The sizes and shares of the data package, as published."""
    pytest.importorskip("lang2vec")
    found = uriel()
    assert len(found.languages) == 7970
    sizes = {block: len(found.columns((block,))) for block in ("syntax", "phonology", "inventory")}
    assert sizes == {"syntax": 103, "phonology": 28, "inventory": 158}
    missing = {block: float(np.isnan(found.observed[:, found.columns((block,))]).mean()) for block in sizes}
    assert missing == {"syntax": pytest.approx(0.885, abs=5e-4), "phonology": pytest.approx(0.931, abs=5e-4), "inventory": pytest.approx(0.785, abs=5e-4)}
    assert found.imputed is not None and set(np.unique(found.imputed)) == {0.0, 1.0}
    lacks = {code: int((~found.vector(code).mask).sum()) for code in ("quy", "bxr", "kpv", "sme")}
    assert lacks == {"quy": 89, "bxr": 103, "kpv": 53, "sme": 58}
    knn = found.vector("bxr", missing="knn")
    assert knn.imputed and knn.observed == 0
    assert found.path("glv")[0] == "Indo-European" and found.relatives("glv")[0][0] in ("gla", "ghc")
    one, many = found.distance("kab", "shi", missing="knn"), {n.language: n for n in found.nearest("kab", k=7969, missing="knn")}
    assert many["shi"].distance == pytest.approx(one.distance)
