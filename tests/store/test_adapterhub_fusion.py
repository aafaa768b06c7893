"""AdapterHub's fusions and composed setups: reference outputs, there and back, and by name what means something else there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.errors import ModuleError, StoreError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import dumps, loads
from intarsia.store.convert import Setup, detect, read_fusion, read_setup, write_fusion, write_setup
from tests import zoo
from tests.host.kit import disturb, run, small
from tests.store.adapterhub import ARCHITECTURES, case, copied_to, hosted

FUSIONS = ("comp_fuse_dynamic", "comp_fuse_static", "comp_fuse_double", "comp_stack_fuse")
OTHERS = ("comp_stack", "comp_batchsplit")
FAST = {("t5", "comp_fuse_double"), ("gpt2", "comp_fuse_static"), ("llama", "comp_stack_fuse")}
MATRIX = [pytest.param(a, c, marks=() if a == "bert" or (a, c) in FAST else pytest.mark.slow) for a in ARCHITECTURES for c in (*FUSIONS, *OTHERS)]


def setup(architecture: str, name: str) -> Setup:
    return read_setup(case(architecture, name), sites=hosted(architecture).sites, base=hosted(architecture).fingerprint)


def states(architecture: str, found: Setup) -> Tensor:
    host = hosted(architecture)
    for name, module in found.modules.items():
        host.insert(loads(dumps(module)), name=name)
    try:
        with torch.no_grad(), host.using(found.expression if isinstance(found.expression, str) else list(found.expression)):
            return host.model(**load_file(case(architecture, "inputs.safetensors"))).last_hidden_state
    finally:
        for name in found.modules:
            host.remove(name)


@pytest.mark.parametrize(("architecture", "name"), MATRIX)
def test_outputs_are_the_reference(architecture: str, name: str, tmp_path: Path) -> None:
    found = setup(architecture, name)
    given, want = load_file(case(architecture, "inputs.safetensors")), load_file(case(architecture, name) / "reference.safetensors")["last_hidden_state"]
    real = torch.ones(want.shape[:2], dtype=torch.bool) if architecture == "t5" else given["attention_mask"].bool()
    off = (states(architecture, found) - want)[real].abs().max()
    assert off < 1e-5 * max(1.0, float(want.abs().max()))
    if found.expression == "fuse(a, b; router=fusion)":
        host = hosted(architecture)
        write_setup(found.modules, "fusion", tmp_path / "out", sites=host.sites, model_type=host.model.config.model_type)
        again = read_setup(tmp_path / "out", sites=host.sites, base=host.fingerprint)
        assert again.modules == found.modules and again.expression == found.expression
        for part in ("a,b/model_adapter_fusion.safetensors", "a/adapter.safetensors"):
            theirs, ours = (load_file(p / part) for p in (case(architecture, name), tmp_path / "out"))
            assert theirs.keys() == ours.keys() and all(torch.equal(t, ours[key]) for key, t in theirs.items())
        theirs, ours = (json.loads((p / "a,b/adapter_fusion_config.json").read_text()) for p in (case(architecture, name), tmp_path / "out"))
        assert {k: v for k, v in theirs.items() if k != "model_name"} == {k: v for k, v in ours.items() if k != "model_name"}
        assert json.loads((tmp_path / "out/adapter_setup.json").read_text()) == json.loads((case(architecture, name) / "adapter_setup.json").read_text())


def test_a_reader_that_shares_no_code_accepts_it(tmp_path: Path) -> None:
    from tests.store.peers import oracle

    found, host = setup("bert", "comp_fuse_double"), hosted("bert")
    write_setup(found.modules, "fusion", tmp_path / "out", sites=host.sites, model_type="bert")
    given = load_file(case("bert", "inputs.safetensors"))
    got = oracle("adapterhub_reader").Model("bert", str(tmp_path / "out")).forward(given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(got, load_file(case("bert", "comp_fuse_double") / "reference.safetensors")["last_hidden_state"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "message"), [
    ("comp_fuse_par", "once more"), ("comp_parallel", "'Parallel'"), ("comp_split", "'Split'"), ("comp_lora_stack", "follow on one another"), ("comp_stack_inv", "first alone"),
])  # fmt: skip
def test_what_means_something_else_there(name: str, message: str) -> None:
    with pytest.raises(ModuleError, match=message):
        setup("bert", name)


def test_weights_of_an_average_mean_what_they_say() -> None:
    found = setup("bert", "comp_average")
    assert found.expression == "0.25*(a) + 0.75*(b)" and any("once more" in note for report in found.reports for note in report.notes)


def test_ours_there_and_back(tmp_path: Path) -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, small("pfeiffer"), seed=seed)
        disturb(host, name, seed)
    host.router("f", "fusion", ["a", "b"])
    disturb(host, "f", 3)
    modules = {name: host.extract(name) for name in ("a", "b", "f")}
    write_setup(modules, "f", tmp_path / "out", sites=host.sites, model_type="bert")
    found = read_setup(tmp_path / "out", sites=host.sites, base=host.fingerprint)
    assert modules["f"].tensors.keys() == found.modules["fusion"].tensors.keys()
    assert all(torch.equal(t, found.modules["fusion"].tensors[key]) for key, t in modules["f"].tensors.items())
    with host.using("fuse(a, b; router=f)"):
        want = run(model, inputs)
    host.remove("f").remove("a").remove("b")
    for name, module in found.modules.items():
        host.insert(module, name=name)
    with host.using(found.expression):  # type: ignore[arg-type]
        torch.testing.assert_close(run(model, inputs), want, atol=1e-6, rtol=1e-6)


def test_a_fusion_alone(tmp_path: Path) -> None:
    folder = case("bert", "comp_fuse_dynamic") / "a,b"
    assert (detect(folder).format, detect(folder).kind) == ("adapterhub", "fusion")
    host = hosted("bert")
    module, report = read_fusion(folder, sites=host.sites, base=host.fingerprint)
    assert any("add-and-norm" in note for note in report.notes)
    write_fusion(module, tmp_path / "out", sites=host.sites, model_type="bert")
    assert read_fusion(tmp_path / "out", sites=host.sites, base=host.fingerprint)[0] == module
    said = write_fusion(replace(module, context={"language": "sw"}), tmp_path / "said", sites=host.sites, model_type="bert")
    assert len(said.left_out) == 1 and "the context" in said.left_out[0]
    drawn = tuple(replace(patch, form=replace(patch.form, sampler="gumbel")) for patch in module.method.patches)  # type: ignore[type-var]
    with pytest.raises(ModuleError, match="sampler"):
        write_fusion(replace(module, method=replace(module.method, patches=drawn)), tmp_path / "drawn", sites=host.sites, model_type="bert")
    with pytest.raises(ModuleError, match="none of the modules"):
        write_setup({"a": module}, "f", tmp_path / "none", sites=host.sites, model_type="bert")
    with pytest.raises(ModuleError, match="is none of"):
        read_fusion(folder, sites=host.sites, base=host.fingerprint, members={"x": module})
    bad = copied_to(folder, tmp_path / "bad")
    raw = json.loads((bad / "adapter_fusion_config.json").read_text())
    (bad / "adapter_fusion_config.json").write_text(json.dumps({**raw, "new": 1}))
    with pytest.raises(ModuleError, match="no field 'new'"):
        read_fusion(bad, sites=host.sites, base=host.fingerprint)
    for setting in ({"temperature": True}, {"query": False}, {"new": 1}):
        (bad / "adapter_fusion_config.json").write_text(json.dumps({**raw, "config": {**raw["config"], **setting}}))
        with pytest.raises(ModuleError, match="is not read"):
            read_fusion(bad, sites=host.sites, base=host.fingerprint)


def test_a_setup_of_heads_is_said(tmp_path: Path) -> None:
    folder = copied_to(case("bert", "comp_stack"), tmp_path / "x")
    raw = json.loads((folder / "adapter_setup.json").read_text())
    (folder / "adapter_setup.json").write_text(json.dumps({**raw, "head_setup": "h"}))
    found = read_setup(folder, sites=hosted("bert").sites, base=hosted("bert").fingerprint)
    assert any("head_setup" in note for report in found.reports for note in report.notes)


def test_setups_that_are_not_whole(tmp_path: Path) -> None:
    host = hosted("bert")
    raw = json.loads((case("bert", "comp_fuse_dynamic") / "adapter_setup.json").read_text())
    for name, node in (("../x", {"type": "single", "children": ["../x"]}), ("a", raw["adapter_setup"])):
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        (folder / "adapter_setup.json").write_text(json.dumps({**raw, "adapter_setup": node}))
        with pytest.raises(StoreError, match="no folder"):
            read_setup(folder, sites=host.sites, base=host.fingerprint)
    (folder / "adapter_setup.json").write_text(json.dumps({**raw, "new": 1}))
    with pytest.raises(ModuleError, match="no field 'new'"):
        read_setup(folder, sites=host.sites, base=host.fingerprint)
    (folder / "adapter_setup.json").write_text(json.dumps({**raw, "adapter_setup": {"type": "Fuse"}}))
    with pytest.raises(ModuleError, match="children"):
        read_setup(folder, sites=host.sites, base=host.fingerprint)
    with pytest.raises(ModuleError, match="no attention over"):
        model, _ = zoo.make("bert")
        write_fusion(Host(model).add("m", build("pfeiffer")).extract("m"), tmp_path / "m", sites=host.sites, model_type="bert")
