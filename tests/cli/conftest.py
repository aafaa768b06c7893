from __future__ import annotations

import pytest

from tests.cli.run import Here


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Here:
    """`cli("methods", "lora")` -> exit code, output, errors."""
    return Here(capsys)
