"""One of several processes of a training: `python -m tests.train.worker FUNCTION ARGUMENTS`, started by `launch`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(world: int, *arguments: str, code: int = 0, timeout: float = 240) -> list[str]:
    """Run `world` processes of this file that know each other; returns what each printed, fails if one ends otherwise than by `code`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(world):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.train.worker", *arguments]
        running.append(subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    found = []
    try:
        for process in running:
            found.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, found):
        assert process.returncode == code, (process.returncode, text[-4000:])
    return found


def update(kind: str, **settings: Any) -> dict[str, Any]:
    """What training changes in each tensor of a new module."""
    import torch

    from intarsia.train import Recipe, train
    from tests.train import make

    rows = settings.pop("rows", 16)
    host, task = make.host(kind)
    recipe = Recipe(**{"learning_rate": 0.3, "head_learning_rate": 0.3, "optimiser": "sgd", "clip": None, "warmup": 0.0,
                       "schedule": "constant", "epochs": 1, **settings})  # fmt: skip
    start = {key: tensor.detach().clone() for key, tensor in host.tensors("m").items()}
    result = train(host, "m", task, make.table(rows), recipe=recipe)
    # the calibrated centre and scale of a head are measured, not trained
    return {key: tensor - start[key] for key, tensor in result.module.tensors.items() if not torch.equal(tensor, start[key])}


def updates(out: str, jobs: str) -> None:
    """Updates by name, into a file per process."""
    import torch

    torch.save({name: update(**job) for name, job in json.loads(jobs).items()}, f"{out}.{os.environ['RANK']}")


def run(folder: str, mode: str) -> None:
    """A run of `test_resume`: `whole`, `stop` (a signal comes to the last process in step 4), `resume`, or `poisoned`."""
    from intarsia.errors import IntarsiaError
    from intarsia.train import train
    from tests.train import make, test_loop, test_resume

    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    callbacks = [test_resume.SignalAfter(4, signal.SIGTERM)] if mode == "stop" and last else []
    try:
        if mode == "poisoned":
            host, _ = make.host("classify")
            train(host, "m", test_loop.Poisoned(), make.table(24), recipe=test_resume.RECIPE)
        result = test_resume.run(Path(folder), callbacks=callbacks, resume=mode == "resume")
    except IntarsiaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(error.exit_code) from None
    print(json.dumps({"digest": result.module.digest, "metrics": result.metrics, "steps": result.steps}), flush=True)


def thin(method: str) -> None:
    """Print the digest of a module whose method moves its entries."""
    from tests.train import test_thinning

    print(json.dumps({"digest": test_thinning.run(method)[1].module.digest}), flush=True)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    {"updates": updates, "run": run, "thin": thin}[sys.argv[1]](*sys.argv[2:])
