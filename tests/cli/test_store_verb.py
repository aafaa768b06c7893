"""`store`: the verbs on a small module, their JSON, and one line for what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.cli.running import defaults, module_files
from intarsia.cli.sources import pinned, read_modules
from intarsia.errors import UsageError
from intarsia.modules import Card, load, save
from tests.cli.run import Here
from tests.modules import make
from tests.store.small import lora


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "swh.safetensors"
    save(make.module(requires=()), path)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTARSIA_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def test_the_way_of_a_module(cli: Here, file: Path, tmp_path: Path, place: Path) -> None:
    added = cli("store", "add", str(file), "--tag", "best", "--json").ok().json
    assert added["names"] == ["swh@1", "swh@best"] and added["store"] == str(place)
    (row,) = cli("store", "ls", "--lang", "sw", "--method", "lora", "--json").ok().json
    assert row["sha256"] == added["sha256"] and row["languages"] == ["swh"] and row["size"] == file.stat().st_size
    assert cli("store", "ls", "--lang", "kab", "--json").ok().json == []
    assert "swh@best" in cli("store", "ls").ok().out
    assert cli("store", "show", "swh@best", "--json").ok().json["digest"] == load(file).digest
    assert added["sha256"] in cli("store", "show", added["sha256"][:8]).ok().out
    assert cli("store", "tag", "swh", "good", "--json").ok().json["tag"] == "swh@good"
    told = cli("store", "verify", "swh@best", "--json").ok().json
    assert told["problems"] == [] and "licence" in told["cards"]["swh@1"]
    assert "the card of swh@1 lacks: " in cli("store", "verify").ok().out
    out = tmp_path / "out.safetensors"
    cli("store", "export", "swh@good", str(out)).ok()
    assert out.read_bytes() == file.read_bytes()
    assert cli("store", "rm", "swh", "--json").ok().json == {"removed": ["swh@best", "swh@good", "swh@1"]}
    assert cli("store", "gc", "--json").ok().json["removed"] == []
    assert cli("store", "gc", "--grace", "0", "--dry-run", "--json").ok().json["removed"] == [added["sha256"]]
    assert cli("store", "gc", "--grace", "0", "--json").ok().json["removed"] == [added["sha256"]]
    assert "no modules" in cli("store", "ls").ok().out


@pytest.fixture
def kin(tmp_path: Path) -> dict[str, Path]:
    """Module files: `lang`, `task` that requires it, `foe`."""
    lang = lora(0, "lang", layers=(0,), card=Card(languages=("kab-Latn",)), roles={"language": "kab"})
    made = {"lang": lang, "task": lora(1, "task", layers=(0,), requires=(lang.digest,)), "foe": lora(2, "foe", layers=(0,), rank=3)}
    for name, each in made.items():
        save(each, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in made}


def test_relations(cli: Here, kin: dict[str, Path]) -> None:
    assert "--allow-missing" in cli("store", "add", str(kin["task"])).error(5)
    for name in ("lang", "task"):
        cli("store", "add", str(kin[name])).ok()
    cli("store", "add", str(kin["foe"]), "--conflicts", "lang").ok()
    shown = cli("store", "show", "task", "--json").ok().json
    assert [each["names"] for each in shown["relations"]["requires"]] == [["lang@1"]]
    out = cli("store", "show", "lang").ok().out
    assert "needed by" in out and "task@1" in out and "conflicts" in out and "foe@1" in out
    assert cli("store", "tree").ok().out.splitlines()[1:] == ["task@1: lora; seed 1, 2", "  requires lang@1: lora"]
    lines = cli("store", "tree", "task", "--json").ok().json
    assert [(line["depth"], line["relation"], line["names"]) for line in lines] == [(0, None, ["task@1"]), (1, "requires", ["lang@1"])]
    cli("store", "tree", "--missing").error(2)


def test_tree_of_languages(cli: Here, kin: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise UsageError("not installed")

    monkeypatch.setattr("intarsia.languages.typology.uriel", absent)
    assert "no modules" in cli("store", "tree", "--languages").ok().out
    cli("store", "add", str(kin["lang"])).ok()
    found = cli("store", "tree", "--languages")
    assert "kab (Latn): lang@1" in found.ok().out and "no family tree" in found.err
    data = tmp_path / "families.csv"
    data.write_text("iso,family\nkab,Afro-Asiatic>Berber\nshi,Afro-Asiatic>Berber\nfin,Uralic\n", "utf-8")
    out = cli("store", "tree", "--languages", "--families", str(data)).ok().out
    assert out.splitlines()[:3] == ["Afro-Asiatic  1 of 2", "  Berber  1 of 2", "    kab (Latn): lang@1"] and "Uralic" not in out
    assert "shi: none" in cli("store", "tree", "--languages", "--families", str(data), "--missing").ok().out
    told = cli("store", "tree", "--languages", "--families", str(data), "--json").ok().json
    assert (told["covered"], told["below"][0]["known"]) == (1, 2)
    cli("store", "tree", "lang", "--languages").error(2)


def test_diff(cli: Here, kin: dict[str, Path], tmp_path: Path) -> None:
    cli("store", "add", str(kin["lang"])).ok()
    told = cli("store", "diff", "lang@1", str(kin["foe"]), "--picture", str(tmp_path / "d.svg"), "--json").ok().json
    assert [row["place"] for row in told["rows"]] == ["0.attn.q", "0.attn.v"] and told["whole"]["overlap"] == 1.0 and not told["equal"]
    assert (tmp_path / "d.svg").read_text().startswith("<?xml")
    cli("store", "diff", "lang", "lang", "--picture", str(tmp_path / "d.svg")).error(5)
    assert "the same module" in cli("store", "diff", "lang", str(kin["lang"]), "--places").ok().out


def test_bundles_and_remotes(cli: Here, kin: dict[str, Path], tmp_path: Path, place: Path) -> None:
    assert cli("store", "import", str(tmp_path), "--json").ok().json["names"] == ["foe@1", "lang@1", "task@1"]
    told = cli("store", "export", "task", str(tmp_path / "all.tar"), "--json").ok().json
    assert told["names"] == ["task@1"] and len(told["files"]) == 2 and len(told["required"]) == 1
    second = ("--store", str(tmp_path / "second"))
    assert "2 modules" in cli("store", "import", str(tmp_path / "all.tar"), *second).ok().out
    far = str(tmp_path / "far")
    assert cli("store", "push", far, "task", "foe", "--json").ok().json["names"] == ["task@1", "foe@1"]
    assert "1 module in the store" in cli("store", "pull", far, "task@1", *second).ok().out  # what it requires is there
    assert "1 of them because others require" in cli("store", "pull", far, "task", "--store", str(tmp_path / "third")).ok().out
    cli("store", "verify", *second).ok()
    assert "--allow-network" in cli("store", "pull", "s3://bucket/modules", "task").error(2)
    assert "--all" in cli("store", "push", far).error(2)
    assert "bundle" in cli("store", "export", "task", "foe", str(tmp_path / "two.safetensors")).error(2)
    (tmp_path / "evil.tar").write_bytes((tmp_path / "all.tar").read_bytes()[:-1])
    assert "nothing was taken" in cli("store", "import", str(tmp_path / "evil.tar")).error(4)
    cli("store", "tag", "foe", "best", "--if-match", "none").ok()
    assert "another process" in cli("store", "tag", "foe", "best", "--if-match", "none").error(5)


def test_modules_of_the_store_on_the_command_line(cli: Here, kin: dict[str, Path], tmp_path: Path) -> None:
    for name in ("lang", "task"):
        cli("store", "add", str(kin[name])).ok()
    cli("store", "add", str(kin["foe"]), "--conflicts", "lang").ok()
    words = ("merge", "0.5*lang + t", "-m", "store:lang", "-m", "t=store:task@1", "--to-module")
    assert cli(*words, str(tmp_path / "one.safetensors")).ok().err == ""
    cli("merge", "0.5*store:lang + store:task@latest", "--to-module", str(tmp_path / "two.safetensors")).ok()
    files = ("-m", f"lang={kin['lang']}", "-m", f"t={kin['task']}")
    cli("merge", "0.5*lang + t", *files, "--to-module", str(tmp_path / "three.safetensors")).ok()
    assert len({load(tmp_path / f"{name}.safetensors").digest for name in ("one", "two", "three")}) == 1
    alone = cli("merge", "2*t", "-m", "t=store:task", "--to-module", str(tmp_path / "four.safetensors")).ok()
    assert "'t' was trained on top of 'lang'" in alone.err and alone.err.startswith("warning: ")
    both = ("merge", "store:lang + store:foe", "--to-module", str(tmp_path / "five.safetensors"))
    assert "must not be used together" in cli(*both).error(2)
    assert "no 'nobody'" in cli("merge", "2*store:nobody", "--to-module", str(tmp_path / "six.safetensors")).error(5)
    cli("store", "rm", "lang").ok()
    cli("store", "add", str(tmp_path / "one.safetensors"), "--allow-missing").ok()
    assert cli("merge", "2*t", "-m", "t=store:task", "--to-module", str(tmp_path / "seven.safetensors")).ok()  # kept, though nameless


def test_a_module_that_lost_what_it_requires(cli: Here, kin: dict[str, Path], tmp_path: Path) -> None:
    cli("store", "add", str(kin["task"]), "--allow-missing").ok()
    assert "requires the module with digest" in cli("merge", "2*t", "-m", "t=store:task", "--to-module", str(tmp_path / "x.safetensors")).error(5)
    assert "requires digest" in cli("store", "verify").error(4)
    assert "not in this store" in cli("store", "show", "task").ok().out


def test_references_are_pinned_when_they_are_read(cli: Here, kin: dict[str, Path], place: Path) -> None:
    """What a run keeps in its configuration means the same bytes when it goes on, whatever a tag points at by then."""
    cli("store", "add", str(kin["lang"]), "--tag", "best").ok()
    sha256 = cli("store", "show", "lang", "--json").ok().json["sha256"]
    for given in (module_files(["lang=store:lang@best"]), pinned({}, "store:lang"), defaults({}, {"base": "b", "modules": {"lang": "store:lang"}})["modules"]):
        assert set(given.values()) == {f"store:{sha256}"}
    assert module_files(["store:lang"]) == {"lang": f"store:{sha256}"}
    cli("store", "add", str(kin["foe"]), "--name", "lang", "--tag", "best").ok()
    assert read_modules(given)["lang"].digest == load(kin["lang"]).digest


def test_another_folder(cli: Here, file: Path, tmp_path: Path, place: Path) -> None:
    cli("store", "add", str(file), "--store", str(tmp_path / "other")).ok()
    assert not place.exists() and len(cli("store", "ls", "--store", str(tmp_path / "other"), "--json").ok().json) == 1


def test_errors_are_one_line(cli: Here, file: Path, place: Path, tmp_path: Path) -> None:
    cli("store", "rm", "swh").error(5)
    cli("store", "add", str(tmp_path / "nothing")).error(5)
    cli("store", "add", str(file), "--name", "../up").error(2)
    added = cli("store", "add", str(file), "--json").ok().json
    assert "no 'swh@7'" in cli("store", "show", "swh@7").error(5)
    assert "not a registered language" in cli("store", "ls", "--lang", "zzq").error(2)
    cli("store", "export", "swh", str(file)).error(5)
    cli("store", "gc", "--grace", "-1").error(2)
    blob = place / "blobs" / f"{added['sha256']}.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    assert "1 problem" in cli("store", "verify").error(4)
    listed = cli("store", "ls", "--json").ok()
    assert listed.json[0]["problem"] and "warning: " in listed.err
    for words in (("ls", "--task", "x"), ("tree",), ("tree", "--languages")):
        assert "warning: " in cli("store", *words).ok().err, "what cannot be read is left out, and said"
