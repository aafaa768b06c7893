"""One thread (tiny models lose by more), and no pictures: they take half a second each, only their own test draws one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "curve" not in request.node.name:
        monkeypatch.setattr("intarsia.train.curve.draw", lambda history, metric, title: b"")
