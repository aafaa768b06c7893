"""What the tests of AdapterHub's format share: models, one host per architecture, samples and their reference outputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from intarsia.host import Host
from intarsia.modules import Module, dumps, loads
from intarsia.store.convert import Report, read_adapterhub
from tests.shared import shared

ARCHITECTURES = ("bert", "xlmr", "gpt2", "llama", "t5")
#: kinds that every architecture has samples of
KINDS = ("seq_bn", "double_seq_bn", "double_seq_bn_ln", "par_bn", "scaled_par_bn", "seq_bn_gated", "seq_bn_leaveout_rfmap", "seq_bn_residual_after_ln",
         "seq_bn_inv", "double_seq_bn_inv", "compacter", "compacterpp", "compacter_own_rule", "lora", "lora_all", "lora_gated", "ia3", "loreft",
         "prefix_tuning", "prefix_tuning_flat", "mam", "unipelt")  # fmt: skip
#: kinds that some have
SOME = {"dora": ("bert", "xlmr", "llama", "t5"), "vera": ("bert", "xlmr", "t5"), "prompt_tuning": ("bert", "xlmr"), "noreft": ("bert", "xlmr", "gpt2", "llama"),
        "direft": ("bert", "xlmr", "gpt2", "llama")}  # fmt: skip
#: beside all of BERT's, what runs in the fast suite
FAST = {("xlmr", "prompt_tuning"), ("t5", "unipelt"), ("t5", "prefix_tuning_flat"), ("t5", "seq_bn_inv"), ("t5", "dora"), ("gpt2", "lora_gated"), ("gpt2", "unipelt"),
        ("llama", "lora_all"), ("llama", "seq_bn_inv"), ("llama", "mam")}  # fmt: skip
CASES = [*((a, kind) for kind in KINDS for a in ARCHITECTURES), *((a, kind) for kind, where in SOME.items() for a in where)]


@cache
def cached(architecture: str) -> PreTrainedModel:
    return AutoModel.from_pretrained(shared(f"fixtures/adapterhub/{architecture}/base"), attn_implementation="eager").eval()


@cache
def hosted(architecture: str) -> Host:
    """One host for all tests; they leave no module on it."""
    return Host(cached(architecture))


@cache
def weights(architecture: str) -> dict[str, Tensor]:
    return {key: t for key, t in cached(architecture).state_dict().items() if ".intarsia" not in key and not key.startswith("intarsia")}


def case(architecture: str, name: str) -> Path:
    return shared(f"fixtures/adapterhub/{architecture}/{name}")


def unpickled(folder: Path, target: Path) -> Path:
    """A sample that exists as a pickle only, saved again as the refusal tells the user to."""
    if (folder / "adapter.safetensors").exists():
        return folder
    copied = copied_to(folder, target)
    tensors = torch.load(copied / "pytorch_adapter.bin", weights_only=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, copied / "adapter.safetensors")
    return copied


def copied_to(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    return target


def read(folder: Path, architecture: str, **options: Any) -> tuple[Module, Report]:
    host = hosted(architecture)
    return read_adapterhub(folder, sites=host.sites, base=host.fingerprint, weights=weights(architecture), config=host.model.config, **options)


def outputs(architecture: str, module: Module, given: dict[str, Tensor]) -> Any:
    """What the model gives with a module, which goes through its own file first."""
    host = hosted(architecture).insert(loads(dumps(replace(module, name="m"))))
    # adapters' gates and edits take all that a decoder is given for the prompt
    said = {"prompt": given["decoder_input_ids"].shape[1]} if "decoder_input_ids" in given else {}
    try:
        with torch.no_grad(), host.using("m", **said):
            return host.model(**given)
    finally:
        host.remove("m")


def error(architecture: str, name: str, module: Module) -> tuple[float, float]:
    """Largest difference from the reference, and from the base; real tokens only."""
    given = load_file(case(architecture, "inputs.safetensors"))
    want = load_file(case(architecture, name) / "reference.safetensors")["last_hidden_state"]
    base = load_file(case(architecture, "base_reference.safetensors"))["last_hidden_state"]
    got = outputs(architecture, module, given).last_hidden_state
    if json.loads((case(architecture, name) / "case.json").read_text())["model_class"] == "T5AdapterModel":  # scales what heads read
        got, base = (found * want.shape[-1] ** -0.5 for found in (got, base))
    want = want[:, want.shape[1] - got.shape[1] :]  # adapters returns a prompt's positions in front
    real = torch.ones(want.shape[:2], dtype=torch.bool) if architecture == "t5" else given["attention_mask"].bool()
    return float((got - want)[real].abs().max()), float((base - want)[real].abs().max())
