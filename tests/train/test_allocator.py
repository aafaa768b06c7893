"""Pages of a step are kept for the next one, and given back at the end."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from intarsia.train import allocator
from intarsia.train.allocator import pages_kept

glibc = pytest.mark.skipif(allocator._glibc() is None, reason="another C library than glibc")


def faults() -> int:
    """Pages that had to be mapped anew for a large tensor that is used again and again."""
    torch.ones(4_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


@glibc
def test_pages_are_kept_in_the_block_only() -> None:
    before = faults()
    with pages_kept() as kept:
        assert kept
        inside = faults()
        torch.ones(50_000_000)
        held = resident()
    assert inside < max(before, 10_000) / 10
    assert resident() < held - 40_000  # of the 48,800 pages of the last tensor


@glibc
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with pages_kept(False) as kept:
        assert not kept
    monkeypatch.setenv(allocator.SWITCH, "0")
    with pages_kept() as kept:
        assert not kept


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with pages_kept() as kept:
        assert not kept
