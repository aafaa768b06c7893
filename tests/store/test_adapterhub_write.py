"""Writing AdapterHub's folders: samples return tensor by tensor and field by field, a reader that shares no code with ours accepts
them, and modules of ours return bit by bit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.host import Host
from intarsia.methods import Method, Patch, build, union
from intarsia.modules import Module
from intarsia.patches import Add, Attend, Bottleneck, Concat, Coupling, Gated, LowRank, Renorm, Tokens
from intarsia.store.convert import read_adapterhub, write_adapterhub
from tests import zoo
from tests.host.kit import disturb, run
from tests.store.adapterhub import CASES, FAST, case, hosted, read, unpickled, weights
from tests.store.peers import oracle

#: fields that say how a training began or went, which a module does not keep
_TRAINING = ("init_weights",)
#: fields that say the same in another way: gates take the place of alpha / r
_SAME = {"lora_gated": {"alpha"}, "unipelt": {"alpha"}, "seq_bn_leaveout_rfmap": {"reduction_factor"}}
MATRIX = [pytest.param(a, kind, marks=() if (a == "bert" and kind not in ("par_bn", "lora", "compacterpp")) or (a, kind) in FAST else pytest.mark.slow) for a, kind in CASES]


def write(module: Module, host: Host, folder: Path) -> Any:
    return write_adapterhub(module, folder, sites=host.sites, model_type=host.model.config.model_type)


@cache
def bare(family: str) -> tuple[Host, dict[str, Tensor]]:
    """One host per family; tests leave no module on it."""
    model, inputs = zoo.make(family)
    return Host(model), inputs


@pytest.mark.parametrize(("architecture", "name"), MATRIX)
def test_samples_return(name: str, architecture: str, tmp_path: Path) -> None:
    folder = unpickled(case(architecture, name), tmp_path / "sample")
    module, _ = read(folder, architecture)
    host = hosted(architecture)
    model = host.model
    assert write_adapterhub(module, tmp_path / "out", sites=host.sites, model_type=model.config.model_type, weights=weights(architecture), config=model.config).complete
    assert read(tmp_path / "out", architecture)[0] == module
    theirs, ours = (load_file(p / "adapter.safetensors") for p in (folder, tmp_path / "out"))
    if name != "vera":  # read and written as the product that it is
        lead = {key.partition(".")[0] + "." for key in theirs if "shared_parameters" in key and not key.startswith("shared")}  # the sample's class has a head
        theirs = {key.removeprefix(next(iter(lead), "")): t for key, t in theirs.items() if ".pool." not in key}
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(t, ours[key]) for key, t in theirs.items() if not ("parametrizations" in key or (name == "loreft" and ".units.1." in key)))
        configs = [json.loads((p / "adapter_config.json").read_text()) for p in (folder, tmp_path / "out")]
        assert configs[0].keys() == configs[1].keys()
        assert all(configs[0][key] == configs[1][key] for key in ("hidden_size", "model_type", "name"))
        pairs = zip(*(found["config"].get("configs", [found["config"]]) for found in configs))
        for theirs, ours in pairs:
            skipped = {*_TRAINING, *_SAME.get(name, ()), *({"original_ln_after", "residual_before_ln"} if name == "seq_bn_residual_after_ln" and architecture not in ("bert", "xlmr") else ())}
            assert {k: v for k, v in theirs.items() if k not in skipped} == {k: v for k, v in ours.items() if k not in skipped}
    if architecture in ("bert", "xlmr"):
        reader = oracle("adapterhub_reader").Model(architecture, str(tmp_path / "out"))
        given = load_file(case(architecture, "inputs.safetensors"))
        want = load_file(case(architecture, name) / "reference.safetensors")["last_hidden_state"]
        got = reader.forward(given["input_ids"], given["attention_mask"], subtract=name != "direft")
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def _gated(form: Any, read: str) -> Any:
    return Gated(form, read, masked=False)  # type: ignore[arg-type]


UNIPELT = Method("unipelt", (
    Patch("adapter", "ffn", _gated(Bottleneck(4, read="normed"), "normed")), Patch("lora", "attn.{q,v}", _gated(build("lora", rank=2).patches[0].form, "input")),
    Patch("prefix", "attn.mem", _gated(Attend(3, 6), "reads"), Concat(), "mem"),
))  # fmt: skip
DORA = Method("dora", (Patch("dora", "attn.{q,v}", Renorm(LowRank(2), 1.5, scaled_norm=False, whole=True)),))
PROMPT = Method("prompt", (Patch("prompt", "seq", Tokens(4, "after_first", init="uniform", behind=True), Concat(), "seq"),))
SETTINGS: dict[str, tuple[Method, str]] = {
    "pfeiffer": (build("pfeiffer", reduction=4), "bert gpt2 llama t5 bart distilbert"), "norm": (build("pfeiffer", width=5, norm="in", activation="gelu"), "bert llama"),
    "houlsby": (build("houlsby", width=4, norms=False), "bert gpt2 t5 bart distilbert"), "inside": (build("houlsby", width=4, norms=False, norm="both", residual="inside"), "bert t5"),
    "lora": (build("lora", rank=3, alpha=5.0, at="attn.{q,v}"), "bert gpt2 llama t5 bart distilbert"), "lora_top": (build("lora", rank=2, at="attn.{q,k,v}", layers="1"), "bert llama"),
    "scaled": (build("pfeiffer", layers="0", learn_scale=True), "bert gpt2"), "madx": (build("madx", reduction=4, invertible_reduction=3.0), "bert gpt2 llama"),
    "madx_encoder": (build("madx", reduction=4, stem="encoder.stem"), "t5 bart"), "compacter": (build("compacter", width=8, norms=False), "bert gpt2 t5"),
    "phm": (build("phm_adapter", width=8, n=4, norms=False), "bert llama"), "loreft": (build("loreft", rank=2, first=2, last=2, tied=False), "bert gpt2"),
    "noreft": (build("noreft", rank=2, first=0, last=2), "bert llama"), "prefix": (build("prefix", length=3, reparameterise=6), "bert gpt2 bart"),
    "prefix_plain": (build("prefix", length=3, reparameterise=None), "llama"), "prompt": (PROMPT, "bert distilbert"), "dora": (DORA, "bert llama"), "unipelt": (UNIPELT, "bert llama"),
    "mam": (union("mam", build("prefix", length=3, reparameterise=None), Method("p", (Patch("adapter", "ffn", Bottleneck(4, read="residual"), Add(2.0)),))), "bert gpt2"),
}  # fmt: skip
PAIRS = [pytest.param(name, family, marks=() if family == "bert" or (name, family) == ("madx_encoder", "t5") else pytest.mark.slow) for name, (_, families) in SETTINGS.items() for family in families.split()]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_ours_there_and_back(name: str, family: str, tmp_path: Path) -> None:
    """The same numbers at the same places, and the same outputs."""
    host, inputs = bare(family)
    host.add("m", SETTINGS[name][0])
    try:
        disturb(host, "m", 2)
        module = host.extract("m")
        write(module, host, tmp_path / "out")
        back, report = read_adapterhub(tmp_path / "out", sites=host.sites, base=host.fingerprint)
        assert report.complete
        values = [sorted((key.partition("/")[0], t.numel(), float(t.double().sum())) for key, t in found.tensors.items()) for found in (module, back)]
        if name != "loreft":  # its subspace is made orthonormal
            assert values[0] == values[1]
        with host.using("m"):
            want = run(host.model, inputs)
        host.insert(back, name="back")
        with host.using("back"):
            torch.testing.assert_close(run(host.model, inputs), want, atol=1e-5 if name == "loreft" else 1e-6, rtol=1e-5)
    finally:
        for left in host.names:
            host.remove(left)


def test_direft_is_written_as_what_it_equals(tmp_path: Path) -> None:
    host, inputs = bare("bert")
    host.add("m", build("direft", rank=2, first=2, last=2))
    try:
        disturb(host, "m", 2)
        assert "NoReFT" in write(host.extract("m"), host, tmp_path / "out").notes[0]
        host.insert(read_adapterhub(tmp_path / "out", sites=host.sites, base=host.fingerprint)[0], name="back")
        with host.using("m"):
            want = run(host.model, inputs)
        with host.using("back"):
            torch.testing.assert_close(run(host.model, inputs), want, atol=1e-5, rtol=1e-5)
    finally:
        for left in host.names:
            host.remove(left)


def zero_gated(layer: str) -> Patch:
    return Patch(f"own_{layer}", f"{layer}.attn.mem", Attend(3, None, mix="zero_gate"), Concat(), "mem")


TWO = Method("two", (Patch("a", "ffn", Bottleneck(4, read="normed")), Patch("c", "stem", Coupling(activation="tanh"), port="in")))


@pytest.mark.parametrize(("method", "message"), [
    (build("houlsby"), "changes parameters of the base"), (build("ia3"), "rescales outputs"), (build("lora", at="attn.o"), "only q, k and v"), (build("dora"), "another formula"),
    (build("houlsby", at="attn.q", norms=False), "no bottleneck here"), (build("prompt", length=3), "among the words"), (build("unipelt", length=3, reparameterise=4, reduction=4, rank=2), "count padding"),
    (build("hyperformer", width=4, embedding=8, norms=False), "no form"), (TWO, "one non-linearity"), (build("prefix", length=3, layers="0", reparameterise=None), "it lacks"),
    (union("twice", build("lora", rank=2, at="attn.q"), build("lora", rank=2, at="attn.q")), "two patches"),
    (union("twice", build("prefix", length=3, reparameterise=None), build("prefix", length=3, reparameterise=None)), "two patches"),
    (Method("mixed", (Patch("plain", "0.attn.mem", Attend(3, None), Concat(), "mem"), zero_gated("1"))), "own softmax"),
    (Method("x", (Patch("edit", "ffn", build("loreft").patches[0].form),)), "outputs of blocks"), (build("mh_parallel", width=4), "no bottleneck here"),
], ids=lambda value: value.name if isinstance(value, Method) else "")  # fmt: skip
def test_what_has_no_form_is_refused_and_nothing_is_written(method: Method, message: str, tmp_path: Path) -> None:
    refused("bert", method, message, tmp_path)


def refused(family: str, method: Method, message: str, tmp_path: Path) -> None:
    host, _ = bare(family)
    host.add("m", method)
    try:
        with pytest.raises(ModuleError, match=message):
            write(host.extract("m"), host, tmp_path / "out")
    finally:
        host.remove("m")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "method", "message"), [
    ("t5", build("madx", reduction=4), "encoder's embeddings only"), ("t5", build("prefix", length=3, reparameterise=None), "shifts=True"),
    ("llama", build("parallel", reduction=4), "reads 'reads'"),
], ids=lambda value: "" if isinstance(value, Method) else str(value))  # fmt: skip
def test_what_other_families_would_mean_by_it(family: str, method: Method, message: str, tmp_path: Path) -> None:
    refused(family, method, message, tmp_path)


def test_names_that_would_break_keys(tmp_path: Path) -> None:
    host, _ = bare("bert")
    module = host.add("m", build("pfeiffer")).extract("m").rename("a.b")
    host.remove("m")
    with pytest.raises(ModuleError, match="every key"):
        write(module, host, tmp_path / "out")
