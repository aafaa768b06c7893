"""The first signal asks, the second quits; handlers are given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from intarsia.train.signals import Interrupted, stopping

LOOP = """
import sys, time
from intarsia.train.signals import Interrupted, stopping
try:
    with stopping() as stop:
        print("ready", flush=True)
        while not stop.received or sys.argv[1] == "stubborn":
            time.sleep(0.01)
        raise Interrupted("saved", stop.received)
except Interrupted as error:
    raise SystemExit(error.exit_code)
"""


def start(how: str) -> subprocess.Popen[str]:
    def heard() -> None:  # under nohup children would be born deaf to SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, "-c", LOOP, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_one_signal_ends_in_good_order(number: signal.Signals, code: int) -> None:
    process = start("polite")
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == code and f"{number.name}: finishing this step and saving; once more quits at once" in text


def test_the_second_signal_quits_at_once() -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "once more" not in process.stderr.readline():
        pass
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert Interrupted("", stop.received).exit_code == 130


def test_other_threads_catch_nothing() -> None:
    seen = []

    def work() -> None:
        with stopping() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
