"""Whatever a peer's files hold, reading them ends in a module or in an error of ours: no crash, no hang, no other exception."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from intarsia.errors import IntarsiaError
from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.sites import fingerprint, resolve
from intarsia.store.convert import read_adapterhub, read_peft
from tests.store.adapterhub import cached, case
from tests.store.peers import tiny
from tests.store.test_peft_read import sample

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(10**9, 10**12), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5),
    st.lists(st.one_of(st.integers(0, 3), st.text(max_size=3)), max_size=3), st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=2),
)  # fmt: skip
QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def spoilt(source: Path, weights: str, data: st.DataObject, inside: str | None) -> Path:
    """A copy in which some fields and one tensor are something else."""
    folder = Path(tempfile.mkdtemp()) / "copy"
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    fields = config[inside] if inside and data.draw(st.booleans()) else config
    for key in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)):
        if data.draw(st.booleans()):
            del fields[key]
        else:
            fields[key] = data.draw(VALUES)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(source / weights)
    key = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["keep", "keep", "shape", "cut", "type", "name", "gone"])):
        case "shape":
            tensors[key] = torch.ones(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        case "cut":
            tensors[key] = tensors[key][:1].clone()
        case "type":
            tensors[key] = tensors[key].to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.float16, torch.bfloat16])))
        case "name":
            tensors[data.draw(st.sampled_from([f"{key}.x", key[3:], key.replace("0", "9"), "x"]))] = tensors.pop(key)
        case "gone":
            del tensors[key]
    save_file(tensors, folder / weights)
    return folder


def sound_or_refused(read: Any, host: Host) -> None:
    """The module is stored and put on its model, or refused on the way."""
    try:
        module, _ = read()
        assert isinstance(module, Module)
        host.insert(loads(dumps(module)), name="fuzzed")
        host.remove("fuzzed")
    except IntarsiaError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["lora", "lora_dora", "ia3", "lokr", "oft", "gralora", "vera", "fourierft", "prefix", "prompt_tuning", "ln_tuning", "boft", "randlora", "vblora", "adaption_prompt",
                                  "supertuning", "trainable_tokens"])  # fmt: skip
def test_peft(name: str) -> None:
    source, model = sample(f"llama_{name}"), tiny("llama")
    sites, base, host = resolve(model), fingerprint(model), Host(tiny("llama"))

    @QUIET
    @given(st.data())
    def run(data: st.DataObject) -> None:
        folder = spoilt(source, "adapter_model.safetensors", data, None)
        try:
            sound_or_refused(lambda: read_peft(folder, sites=sites, base=base, weights=model.state_dict(), model=model), host)
        finally:
            shutil.rmtree(folder.parent)

    run()


@pytest.mark.parametrize("name", ["seq_bn", "scaled_par_bn", "seq_bn_gated", "lora", "lora_gated", "ia3"])
def test_adapterhub(name: str) -> None:
    source, model = case("gpt2", name), cached("gpt2")
    sites, base, host = resolve(model), fingerprint(model), Host(model)

    @QUIET
    @given(st.data())
    def run(data: st.DataObject) -> None:
        folder = spoilt(source, "adapter.safetensors", data, "config")
        try:
            sound_or_refused(lambda: read_adapterhub(folder, sites=sites, base=base), host)
        finally:
            shutil.rmtree(folder.parent)

    try:
        run()
    finally:
        host.close()
