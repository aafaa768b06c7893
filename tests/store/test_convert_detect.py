"""Whose format a folder or file is in: every sample is recognised, and what is not says what was looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.errors import StoreError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import save
from intarsia.store.convert import detect
from tests import zoo
from tests.shared import shared


def folders(where: str, mark: str) -> list[Path]:
    return sorted(path.parent for path in shared(where).glob(f"**/{mark}"))


def test_every_sample_is_recognised() -> None:
    peft = folders("fixtures/peft", "adapter_config.json")
    hub = folders("fixtures/adapterhub", "adapter_config.json")
    sft = folders("fixtures/adapterhub/composable_sft", "pytorch_diff.bin")
    assert len(peft) > 100 and len(hub) > 100 and len(sft) == 2
    for whose, found in (("peft", peft), ("adapterhub", hub), ("composable-sft", sft)):
        for folder in found:
            got = detect(folder)
            assert (got.format, got.path) == (whose, folder) and got.kind
    assert detect(shared("fixtures/adapterhub/bert/mam")).kind == "prefix_tuning+bottleneck"
    assert detect(shared("fixtures/adapterhub/bert/prefix_tuning")).pickled and not detect(shared("fixtures/adapterhub/bert/lora")).pickled


def test_a_file_of_a_folder_stands_for_it() -> None:
    folder = shared("fixtures/peft/llama_lora")
    assert detect(folder / "adapter_model.safetensors") == detect(folder / "adapter_config.json") == detect(folder)


def test_a_module_file(tmp_path: Path) -> None:
    module = Host(zoo.make("bert")[0]).add("m", build("lora", rank=2)).extract("m")
    save(module, tmp_path / "m.safetensors")
    assert (detect(tmp_path / "m.safetensors").format, detect(tmp_path / "m.safetensors").kind) == ("intarsia", "lora")


@pytest.mark.parametrize(("files", "message"), [
    ({}, "found nothing"), ({"x.txt": ""}, "found x.txt"), ({"a/adapter_config.json": "{}"}, "sub-folders: a"), ({"adapter_config.json": "{}"}, "peft_type"),
    ({"head_config.json": "{}"}, "prediction head"), ({"adapter_setup.json": "{}", "b/adapter_config.json": "{}"}, "composed setup.*sub-folders: b"),
])  # fmt: skip
def test_what_is_unknown_says_what_was_looked_for(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match=message):
        detect(tmp_path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "y.json").write_text(json.dumps({}))
    for path, message in (("x.bin", "weights alone"), ("y.json", "no module file"), ("z", "no such file")):
        with pytest.raises(StoreError, match=message):
            detect(tmp_path / path)
