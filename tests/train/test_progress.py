"""Progress: an estimate that is right, a bar on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io

import pytest

from intarsia.train.progress import Bar, Clock, Plain, Quiet, duration, reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_counts_from_where_this_run_began() -> None:
    now = iter([100.0, 104.0, 120.0])
    clock = Clock(10, done=4, now=lambda: next(now))
    assert clock.left(4) is None
    assert clock.left(6) == pytest.approx(8.0)  # two steps took four seconds, four are left
    assert clock.left(10) == 0.0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (61, "1m01s"), (3599, "59m59s"), (7620, "2h07m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_kind_fits_the_stream() -> None:
    assert isinstance(reporter(stream=io.StringIO()), Plain)
    assert isinstance(reporter(stream=Terminal()), Bar)
    assert isinstance(reporter(stream=Terminal(), quiet=True), Quiet)


def test_plain_lines_only_where_there_is_something_to_say() -> None:
    stream = io.StringIO()
    plain = Plain(stream)
    plain.start("train", 4, done=1)
    for step in (2, 3):
        plain.update(step)
    plain.update(4, {"loss": 0.51234, "learning_rate": 5e-4})
    plain.note("a [note]")
    plain.stop()
    assert stream.getvalue() == "train: 4 steps, going on after step 1\ntrain 4/4  loss 0.5123  learning rate 0.0005\na [note]\n"


def test_a_bar_shows_steps_values_and_notes_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    bar = Bar(stream)
    bar.start("train", 4)
    bar.update(3, {"loss": 0.5})
    bar.note("a [note] 1.5")
    bar.stop()
    bar.stop()
    text = stream.getvalue()
    assert "3/4" in text and "loss 0.5" in text and "a [note] 1.5\n" in text and "\x1b[3" not in text


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    quiet.start("train", 4)
    quiet.update(1, {"loss": 1.0})
    quiet.note("x")
    quiet.stop()
    assert capsys.readouterr() == ("", "")
