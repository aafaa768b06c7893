"""Our forms with AdapterHub's tensors give AdapterHub's outputs, for every kind of method both have, on five architectures.

Where AdapterHub departs from a paper (gates that average over padding, a whole decoder as prompt) the test says so.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from intarsia.host import Host, attention
from intarsia.methods import Method
from intarsia.modules import Module
from tests.methods import adapterhub
from tests.shared import shared

CLASSES = {
    "bert": hf.BertModel, "xlmr": hf.XLMRobertaModel, "gpt2": hf.GPT2Model, "llama": hf.LlamaModel, "t5": hf.T5Model
}  # fmt: skip
CASES = (
    "seq_bn", "double_seq_bn", "double_seq_bn_ln", "seq_bn_gated", "seq_bn_leaveout_rfmap", "seq_bn_residual_after_ln", "par_bn",
    "scaled_par_bn", "compacter", "compacterpp", "compacter_own_rule", "lora", "lora_all", "lora_gated", "ia3", "prefix_tuning",
    "prefix_tuning_flat", "mam", "unipelt", "loreft", "noreft", "direft",
)  # fmt: skip


@functools.cache
def base(arch: str) -> Any:
    folder = shared(f"fixtures/adapterhub/{arch}/base")
    return CLASSES[arch].from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()


@functools.cache
def inputs(arch: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(shared(f"fixtures/adapterhub/{arch}/inputs.safetensors"))
    return found


def outputs(model: Any, arch: str) -> dict[str, Tensor]:
    with torch.no_grad():
        found: Any = model(**inputs(arch))
    return {k: found[k] for k in ("last_hidden_state", "encoder_last_hidden_state") if k in found}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((value - expected[name]).abs().max()) for name, value in found.items())


@pytest.mark.parametrize("arch", list(CLASSES))
def test_bases_agree(arch: str) -> None:
    expected = load_file(shared(f"fixtures/adapterhub/{arch}/base_reference.safetensors"))
    assert difference(outputs(base(arch), arch), expected) < 1e-5


def shift_positions(patch: pytest.MonkeyPatch, count: int) -> None:
    """AdapterHub's T5 numbers keys behind the prefix but queries from zero: relative positions are off by its length."""
    original = T5Attention.compute_bias
    fronts: dict[tuple[int, ...], Tensor] = {}

    def shifted(self: Any, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        bias = original(self, query_length, key_length + count, *args, **kwargs)
        fronts[query_length, key_length] = bias[..., :count]
        return bias[..., count:]

    def in_front(bias: Tensor, count: int) -> Tensor:
        found = fronts.get(tuple(bias.shape[-2:]))
        zeros = bias.new_zeros(*bias.shape[:-1], count)
        return zeros if found is None else found.expand_as(zeros)

    patch.setattr(T5Attention, "compute_bias", shifted)
    patch.setattr(attention, "bias_in_front", in_front)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", list(CLASSES))
def test_parity(arch: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared(f"fixtures/adapterhub/{arch}") / case).exists():
        pytest.skip(f"no {case} for {arch}")
    folder = shared(f"fixtures/adapterhub/{arch}/{case}")
    tensors, configs, name = adapterhub.load(folder)
    with Host(base(arch)) as host:
        patches, mine = [], {}
        for config in configs:
            found, values = adapterhub.convert(tensors, config, name, host.sites, case)
            patches += found
            mine |= values
        module = Module("m", Method(case, tuple(patches)), mine, host.fingerprint)
        host.insert(module)
        length = next((c["prefix_length"] for c in configs if "prefix_length" in c), 0)
        if arch == "t5" and length:
            shift_positions(monkeypatch, length)
        # AdapterHub's gates and edits take all that a decoder is given for the prompt
        said = {"prompt": inputs(arch)["decoder_input_ids"].shape[1]} if arch == "t5" else {}
        with host.using("m", **said) as model:
            given = outputs(model, arch)
    if json.loads((folder / "case.json").read_text())["model_class"] == "T5AdapterModel":  # scales states for a head
        given["last_hidden_state"] = given["last_hidden_state"] * base(arch).config.d_model**-0.5
    assert difference(given, load_file(folder / "reference.safetensors")) < 1e-5
