"""`export_lora`: a weighted sum of LoRA modules as one peft LoRA folder, for servers that read such folders (vLLM, LoRAX ...).

With w_i the weights, dW = sum w_i s_i B_i A_i: the factors lie side by side, so the ranks add up and nothing is approximated.
Weights and scales are multiplied into B; every layer has the same rank (zeros beside the factors) and alpha = rank, because
servers read neither `rank_pattern` nor `alpha_pattern`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from intarsia.errors import ModuleError
from intarsia.modules.arithmetic import weighted_sum
from intarsia.modules.module import Module
from intarsia.sites.address import SiteMap
from intarsia.store.convert.peft_write import write_peft
from intarsia.store.convert.report import Report


def export_lora(
    modules: Sequence[Module],
    weights: Sequence[float],
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base_name: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    name: str | None = None,
) -> Report:
    """Write what the expression `w_1*a + w_2*b ...` does as one LoRA of peft.

    Args:
        weights: one for each module.
        sites: of the model it is for.
        base_name: name of the base in the configuration; None for the card's.
        task_type: for peft's task classes; None for none.
        name: of the result in its card; None for the names put together.

    Raises:
        ModuleError: a module is not a sum of low-rank changes, or belongs to another base; nothing is written.
        UsageError: the weights do not fit the modules.
        StoreError: the folder already holds such files.
    """
    parts = [_without_head(module) for module in modules]
    whole = weighted_sum([part for part, _ in parts], weights, name=name)
    report = write_peft(whole, folder, sites=sites, task_type=task_type, base_name=base_name, uniform=True)
    rank = max(t.shape[1] for key, t in whole.tensors.items() if key.endswith("factor.up"))
    lost = tuple(f"the head of {module.name!r}: servers of LoRA folders keep the base's own" for module, (_, had) in zip(modules, parts) if had)
    note = f"ranks add up: the largest is {rank} before parts of fused layers are joined; a server may have a limit (vLLM: --max-lora-rank)"
    return replace(report, left_out=(*report.left_out, *lost), notes=(*report.notes, note))


def _without_head(module: Module) -> tuple[Module, bool]:
    """The module without what it has at the outputs, and whether there was something."""
    patches = tuple(patch for patch in module.method.patches if patch.port != "logits")
    if len(patches) == len(module.method.patches):
        return module, False
    if not patches:
        raise ModuleError(f"{module.name!r} is a head alone, no LoRA")
    kept = {patch.name for patch in patches}
    tensors = {key: t for key, t in module.tensors.items() if key.partition("/")[2].partition(".")[0] in kept}
    return replace(module, method=replace(module.method, patches=patches), tensors=tensors, labels=None), True
