"""Several modules of an expression trained together: everything else bit-identical, two-speed rates, resumed exactly; context by column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.data import Table
from intarsia.errors import UsageError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import load
from intarsia.train import Recipe, train
from intarsia.train.signals import Interrupted
from intarsia.train.task import batch_context, context_of, with_context
from tests import zoo
from tests.host.kit import disturb
from tests.train.make import NO_DROPOUT, Classify, table

SKILLS = ("s0", "s1", "s2")
MIX = "fuse(s0, s1, s2; router=z, space=phi)"


class Told(Classify):
    """Hears from a column which task a row is of."""

    class options:
        context = "task=corpus"


def tasks(rows: int = 40, seed: int = 0) -> Table:
    plain = table(rows, seed)
    return Table.of({"text": list(plain["text"]), "label": list(plain["label"]), "corpus": ["x" if i % 3 else "y" for i in range(rows)]})


def host() -> tuple[Host, Told]:
    model, _ = zoo.make("bert", headless=True, **NO_DROPOUT["bert"])
    carrier, task = Host(model), Told()
    for seed, name in enumerate(SKILLS):
        carrier.add(name, build("lora", rank=2), seed=seed)
    carrier.add("other", build("lora", rank=2))
    disturb(carrier, "other")
    carrier.router("z", "polytropon", SKILLS, tasks=("x", "y"), prior=0.01, head=task.head)
    return carrier, task


def along(carrier: Host, task: Any, recipe: Recipe, **more: Any) -> Any:
    return train(carrier, "z", task, tasks(), tasks(20, 1), recipe=recipe, expression=MIX, along={"s0": 2e-3, "s1": 2e-3, "s2": None}, **more)


RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=2e-2, eval_every=3, save_every=3)


def test_polytropon_trains_skills_and_table(tmp_path: Path) -> None:
    carrier, task = host()
    frozen = carrier.extract("other").digest
    start = {name: {k: v.detach().clone() for k, v in carrier.tensors(name).items()} for name in ("z", *SKILLS)}
    result = along(carrier, task, RECIPE, run_dir=tmp_path / "run")
    assert carrier.extract("other").digest == frozen
    for name in ("z", *SKILLS):
        moved = [k for k, v in carrier.tensors(name).items() if not torch.equal(v, start[name][k])]
        assert len(moved) == len(start[name]), (name, moved)
    stored = {name: load(tmp_path / "run" / "along" / f"{name}.safetensors") for name in SKILLS}
    assert {n: m.digest for n, m in stored.items()} == {n: carrier.extract(n).digest for n in SKILLS} == {n: m.digest for n, m in result.others.items()}
    assert {m.digest for m in stored.values()} <= set(result.module.requires) and stored["s0"].card.method == "lora"
    assert stored["s0"].card.cost is not None and stored["s0"].card.cost.trainable == stored["s0"].n_parameters
    finished = along(carrier, task, RECIPE, run_dir=tmp_path / "run", resume=True)
    assert {n: m.digest for n, m in finished.others.items()} == {n: m.digest for n, m in result.others.items()}


def test_resumed_is_the_same(tmp_path: Path) -> None:
    carrier, task = host()
    whole = along(carrier, task, RECIPE)

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 4:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

    carrier, task = host()
    with pytest.raises(Interrupted):
        along(carrier, task, RECIPE, run_dir=tmp_path / "run", callbacks=[Stop()])
    carrier, task = host()
    resumed = along(carrier, task, RECIPE, run_dir=tmp_path / "run", resume=True)
    assert resumed.module.digest == whole.module.digest
    assert {n: m.digest for n, m in resumed.others.items()} == {n: m.digest for n, m in whole.others.items()}


def test_refusals() -> None:
    carrier, task = host()
    for bad, sentence in ((["z"], "another module of the expression"), (["other"], "another module of the expression")):
        with pytest.raises(UsageError, match=sentence):
            train(carrier, "z", task, tasks(), expression=MIX, along=bad)
    carrier.add("sparse", build("lt_sft", density=0.1))
    with pytest.raises(UsageError, match="phases or step rules of its own"):
        train(carrier, "z", task, tasks(), expression=f"{MIX} >> sparse", along=["sparse"])


def test_context_of_columns() -> None:
    task, rows = Told(), tasks(4)
    features = with_context(task, task.features(rows), rows)
    batch = {**task.collate(features[1:3]), **batch_context(features[1:3])}
    assert context_of(task, batch) == {"task": ["x", "x"]}
    Told.options.context = "task=korpus"
    try:
        with pytest.raises(UsageError, match=r"no column 'korpus'.*corpus"):
            with_context(task, features, rows)
        Told.options.context = "task"
        with pytest.raises(UsageError, match="a list of KEY=COLUMN"):
            with_context(task, features, rows)
    finally:
        Told.options.context = "task=corpus"


def test_names_that_look_alike_have_files_of_their_own() -> None:
    from pathlib import Path

    from intarsia.train.loop import along_path

    names = ("a/b", "a-b", "a:b", "a%2Fb", "kpelle", "ɛʋɛ")
    assert len({along_path(Path("run"), name) for name in names}) == len(names)
    assert all(along_path(Path("run"), name).parent == Path("run/along") for name in names)
