"""The contract of the command line: quick, quiet, one line per error, the same in poor surroundings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from intarsia.cli import run as running
from intarsia.cli.console import alignments, size_text, table_text
from intarsia.errors import DataError, IntarsiaError, ModuleError, StoreError, UsageError
from tests.cli.run import Here, cpu_seconds, environment, process

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "tokenizers", "pydantic", "huggingface_hub")
LIMIT = 0.3


def test_nothing_heavy_is_imported() -> None:
    code = f"import sys, intarsia, intarsia.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_is_quick() -> None:
    """Under 0.3 s of CPU time, start of the interpreter included; of ten tries one must do, as other processes disturb."""
    command = [sys.executable, "-m", "intarsia", "--help"]
    tries = (cpu_seconds(command) for _ in range(10))
    assert any(seconds < LIMIT for seconds in tries)


def test_help_names_every_verb(cli: Here) -> None:
    out = cli("--help").ok().out
    for verb in ("demo", "data", "inspect", "methods", "train", "eval", "predict", "module", "bases"):
        assert f" {verb} " in out, verb
    assert cli().ok().out == out


def test_every_verb_has_help_and_the_common_options(cli: Here) -> None:
    verbs = ("demo", "data check", "inspect", "methods", "train", "eval", "predict", "module show", "bases")
    for verb in verbs:
        out = cli(*verb.split(), "--help").ok().out
        for option in ("--json", "--quiet", "--debug"):
            assert option in out, (verb, option)


def test_version(cli: Here) -> None:
    assert cli("--version").ok().out.startswith("intarsia 0.")


@pytest.mark.parametrize("words", [("mthods",), ("methods", "--bogus"), ("inspect", "--json=3"), ("data", "check")])
def test_usage_errors_are_one_line(cli: Here, words: tuple[str, ...]) -> None:
    cli(*words).error(2)


def test_nearest_verb_is_offered(cli: Here) -> None:
    assert "methods" in cli("mthods").error(2)


@pytest.mark.parametrize(
    ("error", "code"),
    [(IntarsiaError("a"), 1), (UsageError("a"), 2), (DataError("a"), 3), (ModuleError("a"), 4), (StoreError("a"), 5),
     (OSError(28, "No space left on device", "/x"), 5), (ZeroDivisionError("a"), 1), (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_exit_codes(cli: Here, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(running, "_run", fail)
    line = cli("methods").error(code)
    assert ("this is a bug" in line) == isinstance(error, ZeroDivisionError)


def test_an_error_of_many_lines_becomes_one(cli: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> int:
        raise DataError("first\nsecond\x1b[31m\r\tthird")

    monkeypatch.setattr(running, "_run", fail)
    assert cli("methods").error(3) == "error: first second [31m third"


def test_debug_shows_the_traceback(cli: Here) -> None:
    result = cli("methods", "pfeifer", "--debug")
    assert result.code == 2 and "Traceback" in result.err and result.err.splitlines()[-1].startswith("error: unknown method")


def test_broken_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m intarsia bases | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "0" and done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int) -> None:
    # reads standard input, which never comes
    child = subprocess.Popen(
        [sys.executable, "-m", "intarsia", "data", "check", "--format", "text", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    time.sleep(1.5)
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (code, "") and err.startswith("error: ") and "Traceback" not in err


POOR = {
    "posix": {"LC_ALL": "POSIX", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "no home": {"HOME": None, "XDG_CACHE_HOME": None, "INTARSIA_CACHE": None},
    "home that is not there": {"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": None},
}


@pytest.mark.parametrize("name", POOR)
def test_poor_surroundings(name: str, tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "kabyle.csv")
    with open(file, "w", encoding="utf-8") as stream:
        stream.write("text,label\nɣef yizan n tefsut,ⵣ\nazul ꞌ,b\n")
    assert process("--help", env=POOR[name]).ok().out
    human = process("data", "check", file, env=POOR[name]).ok()
    assert "nothing to object to" in human.out and human.err == ""
    assert set(process("data", "check", file, "--json", env=POOR[name]).ok().json["splits"][0]["labels"]) == {"ⵣ", "b"}
    process("data", "check", "ɣ.csv", env=POOR[name]).error(3)
    process("bases", env=POOR[name]).ok()


def test_no_colour_when_asked_or_not_a_terminal() -> None:
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {}):
        for words in (("--help",), ("bases",)):
            assert "\x1b" not in process(*words, env=env).ok().out


def test_table_never_cuts_what_is_not_shown_on_a_terminal() -> None:
    long = "x" * 500
    text = table_text(["name", "n"], [[long, 1234567], ["b", None]])
    assert text.splitlines() == [f"{'name':<500}          n", f"{long}  1,234,567", f"{'b':<500}          -"]


def test_table_is_not_markup() -> None:
    assert "[bold]:smile:[/]" in table_text(["a"], [["[bold]:smile:[/]"]])


def test_alignment_and_sizes() -> None:
    assert alignments(3, [["1", "a", "-"], ["2.5 %", "1", "+3"]]) == ["right", "left", "right"]
    assert [size_text(n) for n in (12, 1_500, 612_000, 1_240_000, 2 * 10**9)] == ["12 B", "1.5 kB", "612 kB", "1.2 MB", "2.0 GB"]


def test_the_page_of_public_names_is_complete() -> None:
    import intarsia

    assert set(intarsia.__all__) == set(intarsia._NAMES)
    for name in intarsia.__all__:
        assert getattr(intarsia, name) is not None
        assert name in dir(intarsia)
    with pytest.raises(AttributeError, match=r"Hst.*did you mean 'Host'"):
        _ = intarsia.Hst
