"""`data check`: the numbers of `intarsia.data.check`, exit codes, columns found or named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.data import check, read
from tests.cli.run import Here, process

TRAIN = "text,label\nthe cat sat,a\nthe dog ran,b\na bird flew,a\n"
DEV = "text,label\na fish swam,b\na bird  flew!,a\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "train.csv").write_text(TRAIN, "utf-8")
    (tmp_path / "dev.csv").write_text(DEV, "utf-8")
    return str(tmp_path / "train.csv"), str(tmp_path / "dev.csv")


def test_json_is_the_report(cli: Here, files: tuple[str, str]) -> None:
    shown = cli("data", "check", *files, "--json").ok().json
    assert shown == json.loads(json.dumps(check(*map(read, files), text="text", label="label").to_dict()))


def test_text_and_markdown(cli: Here, files: tuple[str, str]) -> None:
    out = cli("data", "check", *files).ok().out
    assert "overlap train/dev: 1 of 2 rows (0 exactly)" in out and "warning: 1 of 2 rows of dev" in out
    assert cli("data", "check", *files, "--markdown").ok().out.startswith("# Data check")


def test_a_finding_that_matters_is_exit_code_3(cli: Here, files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("text,label\nx y,c\n", "utf-8")
    result = cli("data", "check", *files)
    assert "finding: labels of dev" in result.out and "'c'" in result.error(3)
    assert json.loads(cli("data", "check", *files, "--json").out)["errors"]


def test_columns_are_found_or_named(cli: Here, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("index_id\tcategory\tphrase\n1\ta\thello you\n2\tb\tgood bye\n", "utf-8")
    assert "say which one with --text" in cli("data", "check", str(path)).error(2)
    shown = cli("data", "check", str(path), "--columns", "text=phrase,label=category", "--json").ok().json
    assert shown["splits"][0]["labels"] == {"a": 1, "b": 1}
    named = cli("data", "check", str(path), "--text", "phrase", "--label", "category", "--json").ok().json
    assert named["splits"][0]["labels"] == shown["splits"][0]["labels"]
    unlabelled = cli("data", "check", str(path), "--text", "phrase", "--label", "none", "--json").ok().json
    assert unlabelled["splits"][0]["labels"] is None


def test_bad_rows_name_file_line_and_column(cli: Here, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na b,a\nc d,b,extra\ne f,b\n", "utf-8")
    assert "x.csv:3" in cli("data", "check", str(path)).error(3)
    shown = cli("data", "check", str(path), "--skip-bad", "1", "--json").ok().json
    assert shown["splits"][0]["skipped"] == 1


def test_two_aligned_files_and_standard_input(cli: Here, tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("eins zwei\ndrei\n", "utf-8")
    (tmp_path / "a.en").write_text("one two\nthree\n", "utf-8")
    pair = f"{tmp_path / 'a.de'},{tmp_path / 'a.en'}"
    assert cli("data", "check", pair, "--label", "none", "--json").ok().json["splits"][0]["rows"] == 2
    piped = process("data", "check", "-", "--format", "text", "--json", stdin="ɣef\n\nb c\n".encode()).ok().json
    assert (piped["splits"][0]["rows"], piped["splits"][0]["empty"]) == (3, 1)


def test_usage(cli: Here, files: tuple[str, str]) -> None:
    cli("data", "check", *files, *files).error(2)
    cli("data", "check", files[0], "--max-length", "8").error(2)
    cli("data", "check", files[0], "--normalise", "NFX").error(2)
    cli("data").error(2)
