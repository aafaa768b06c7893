"""Parity with peft: a stored peft module, carried over, folds to the weights that peft's own merge gives.

The reference formulas were checked against peft's `merge_and_unload`; they and the stored modules lie beside the repository.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.host import Host
from intarsia.methods import Method, build
from tests.shared import shared

Tensors = dict[str, Tensor]
AT = "attn.{q,v}"


def upper(square: Tensor) -> Tensor:
    """Entries above the diagonal of the skew part of [..., b, b]."""
    row, column = torch.triu_indices(square.shape[-1], square.shape[-1], 1)
    return (0.5 * (square - square.transpose(-1, -2)))[..., row, column]


def low_rank(t: Tensors, c: Any, g: Tensors) -> Tensors:
    return {"factor.up": t["lora_B.weight"], "factor.down": t["lora_A.weight"]}


def gralora(t: Tensors, c: Any, g: Tensors) -> Tensors:
    a, b, k = t["gralora_A"], t["gralora_B"], c["gralora_k"]
    q = a.shape[2] // k
    found = {}
    for o in range(k):
        for i in range(k):
            part = f"factor.parts.{o * k + i}"
            found[f"{part}.down"] = a[i][:, o * q : (o + 1) * q].T
            found[f"{part}.up"] = b[o][i * q : (i + 1) * q].T
    return found


def lokr(t: Tensors, c: Any, g: Tensors) -> Tensors:
    if "lokr_w2" in t:
        return {"factor.rule.left": t["lokr_w1"][None], "factor.up": t["lokr_w2"][None]}
    return {"factor.rule.left": t["lokr_w1"][None], "factor.up": t["lokr_w2_a"][None], "factor.down": t["lokr_w2_b"][None]}


Case = tuple[Callable[[Any], Method], Callable[[Tensors, Any, Tensors], Tensors]]
CASES: dict[str, Case] = {
    "lora": (lambda c: build("lora", rank=c["r"], alpha=c["lora_alpha"], at=AT), low_rank),
    "lora_dora": (
        lambda c: build("dora", rank=c["r"], alpha=c["lora_alpha"], at=AT),
        lambda t, c, g: {**low_rank(t, c, g), "magnitude": t["lora_magnitude_vector"]},
    ),
    "adalora": (
        lambda c: build("adalora", rank=c["init_r"], alpha=c["lora_alpha"], at=AT),
        lambda t, c, g: {"factor.frame.up": t["lora_B"], "factor.frame.down": t["lora_A"], "factor.core.value": t["lora_E"][:, 0]},
    ),
    "loha": (
        lambda c: build("loha", rank=c["r"], alpha=c["alpha"], at=AT),
        lambda t, c, g: {
            f"factor.parts.{i}.{ours}": t[f"hada_w{i + 1}_{theirs}"] for i in (0, 1) for ours, theirs in (("up", "a"), ("down", "b"))
        },
    ),
    "lokr": (lambda c: build("lokr", rank=c["r"], alpha=c["alpha"], at=AT), lokr),
    "lokr_full": (lambda c: build("lokr", rank=c["r"], alpha=c["alpha"], limit=c["decompose_factor"], at=AT), lokr),
    "vera": (
        lambda c: build("vera", rank=c["r"], at=AT),
        lambda t, c, g: {"factor.core.value": t["vera_lambda_d"], "factor.gain": t["vera_lambda_b"]},
    ),
    "hira": (
        lambda c: build("hira", rank=c["r"], at=AT),
        lambda t, c, g: {"factor.up": t["hira_B"], "factor.down": t["hira_A"]},
    ),
    "miss": (lambda c: build("miss", rank=c["r"], at=AT), lambda t, c, g: {"factor.up": t["miss_block"].T}),
    "gralora": (lambda c: build("gralora", rank=c["r"], grid=c["gralora_k"], alpha=c["alpha"], at=AT), gralora),
    "c3a": (lambda c: build("c3a", block=c["block_size"], at=AT), lambda t, c, g: {"factor.kernel": t["c3a_kernel"]}),
    "fourierft": (
        lambda c: build("fourierft", count=c["n_frequency"], alpha=c["scaling"], seed=c["random_loc_seed"], stream="torch", at=AT),
        lambda t, c, g: {"factor.value": t["fourierft_spectrum"]},
    ),
    "oft": (lambda c: oft(c), lambda t, c, g: {"factor.angles": t["oft_R.weight"]}),
    "boft": (
        lambda c: build("boft", block=c["boft_block_size"], at=AT),
        lambda t, c, g: {"rotation.factor.angles": -upper(t["boft_R"]), "gain.factor.value": t["boft_s"]},
    ),
    "hra": (lambda c: build("hra", count=c["r"], at=AT), lambda t, c, g: {"factor.vectors": t["hra_u"]}),
    "road": (
        lambda c: build("road", group=c["group_size"], at=AT),
        lambda t, c, g: {"factor.angle": t["road_theta"], "factor.length": t["road_alpha"]},
    ),
}


def oft(c: Any) -> Method:
    """OFT with the truncated series that peft runs by default."""
    from dataclasses import replace

    from intarsia.patches import Affine, Cayley

    method = build("oft", block=c["oft_block_size"], at=AT)
    assert c["use_cayley_neumann"]
    form = Affine(Cayley(c["oft_block_size"], c["block_share"], c["num_cayley_neumann_terms"]), read="self")
    return replace(method, patches=(replace(method.patches[0], form=form),))


def oracle(name: str) -> ModuleType:
    """A module of the reference material."""
    path = shared(f"tools/oracles/{name}.py")
    spec = importlib.util.spec_from_file_location(f"oracle_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", list(CASES))
def test_folded_weights_are_pefts(family: str, name: str) -> None:
    folder = shared(f"fixtures/peft/{family}_{name}")
    formulas, tiny = oracle("peft_formulas"), oracle("tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    base = getattr(tiny, family)()
    modules = {n: m for n, m in base.named_modules() if hasattr(m, "weight") and not list(m.children())}
    given = {n: t for n, t in formulas.modules(stored, modules).items() if not set(t) <= {"weight", "bias"}}

    make, carry = CASES[name]
    host = Host(base).add("a", make(config))
    paths = {host.sites[key.split("/")[0]].path for key in host.parameters("a")}
    assert paths == set(given), "the same layers"
    ours = host.tensors("a")
    at = {path: [k for k in ours if host.sites[k.split("/")[0]].path == path] for path in paths}
    used = set()
    with torch.no_grad():
        for path, tensors in given.items():
            for leaf, value in carry(tensors, config, stored).items():
                (key,) = (k for k in at[path] if k.endswith(leaf))
                assert ours[key].shape == value.shape, key
                ours[key].copy_(value)
                used.add(key)
        if name == "vera":
            frame = next(iter(host.deltas("a")))[1][0].form.factor.frame
            frame.up.copy_(stored["base_model.vera_B"])
            frame.down.copy_(stored["base_model.vera_A"])
    assert used == set(ours), "every tensor was carried over"

    folded = host.fold("a")
    for path, tensors in given.items():
        layer = modules[path]
        weight, bias = formulas.F[name](tensors, config, layer.weight.data, getattr(layer, "bias", None), path, stored)
        new = folded.get_submodule(path)
        assert torch.allclose(new.weight, weight, atol=1e-5), f"{path}: {(new.weight - weight).abs().max()}"
        assert not torch.allclose(new.weight, layer.weight, atol=1e-3), "there is an effect"
        if bias is not None:
            assert torch.allclose(new.bias, bias, atol=1e-5)
