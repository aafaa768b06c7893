"""The fuzz target over the reader: by hypothesis always, by atheris for a short while where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.modules.fuzz_reader import SEEDS, edited, one_input

ROOT = Path(__file__).parents[2]


@settings(max_examples=150, deadline=2000)
@given(st.binary(max_size=400))
@example(b"")
@example(SEEDS[0])
@example(SEEDS[1][:-1])
@example(b'{"__metadata__":{}}')
@example(b'{"a/b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0abcd')
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    one_input(data)


def test_edits_reach_every_part_of_a_file() -> None:
    """The target is no empty one: without edits the file is sound, one edit of it is refused."""
    for number, seed in enumerate(SEEDS):
        assert edited(bytes([number])) == seed
        assert edited(bytes([number, 9, 0, 0, 255])) == seed[:9] + b"\xff" + seed[10:]


def test_the_target_runs_under_atheris(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    command = [sys.executable, "-m", "tests.modules.fuzz_reader", "-max_total_time=5", "-timeout=5", "-rss_limit_mb=1500", f"-artifact_prefix={tmp_path}/"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - start < 120 and "Done " in done.stdout + done.stderr
