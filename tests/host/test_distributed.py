"""DDP and FSDP2 on two gloo processes give the single process's outputs, gradients and module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(families: str, methods: str) -> list[str]:
    """Run the worker under torchrun and return the lines it printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.host.distributed_worker", families, methods,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("ok")]


def test_ddp_and_fsdp2() -> None:
    assert len(launch("bert,llama-tied,t5", "lora,pfeiffer,prefix")) == 9


@pytest.mark.slow
def test_ddp_and_fsdp2_every_method() -> None:
    assert len(launch("bert,llama-tied,t5,gpt2", "full,freeze_k,ln,ia3,houlsby,parallel,prompt,bitfit")) == 32
