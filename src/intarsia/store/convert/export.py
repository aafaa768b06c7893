"""`export_lora`: a weighted sum of LoRA modules as one peft LoRA folder, for servers that read such folders (vLLM, LoRAX ...).

With w_i the weights, dW = sum w_i s_i B_i A_i: the factors lie side by side, so the ranks add up and nothing is approximated.
Weights and scales are multiplied into B; every layer has the same rank (zeros beside the factors) and alpha = rank, because
servers read neither `rank_pattern` nor `alpha_pattern`.  They refuse biases, DoRA, `modules_to_save` and ranks above a limit
set when they start (vLLM: `--max-lora-rank`, 16 by default), and read nothing but `<module>.lora_A.weight` and `.lora_B.weight`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from intarsia.errors import ModuleError, UsageError
from intarsia.modules.arithmetic import weighted_sum
from intarsia.modules.merging import svd
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
    max_rank: int | None = None,
    cut: bool = False,
) -> Report:
    """Write what the expression `w_1*a + w_2*b ...` does as one LoRA of peft.

    Args:
        weights: one for each module.
        sites: of the model it is for.
        base_name: name of the base in the configuration; None for the card's.
        task_type: for peft's task classes; None for none.
        name: of the result in its card; None for the names put together.
        max_rank: the server's limit; a higher rank is refused, or cut.
        cut: bring a higher rank down to `max_rank` by singular values; what is lost is in the report.

    Raises:
        ModuleError: a module is not a sum of low-rank changes, belongs to another base, or its rank is too high; nothing is written.
        UsageError: the weights do not fit the modules.
        StoreError: the folder already holds such files.
    """
    parts = [_without_head(module) for module in modules]
    headed = [module.name for module, part in zip(modules, parts) if part is not module]
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"max_rank must be at least 1, found {max_rank}")
    whole = weighted_sum(parts, weights, name=name)
    notes: list[str] = []
    if cut and max_rank is not None:
        whole, residual = svd(whole, max(1, max_rank // _parts(whole, sites)), name=f"{whole.name}, rank {max_rank}")
        notes += [f"cut to rank {max_rank} by singular values: {residual:.2%} of the change is lost (Frobenius norm)"] if residual else []
    report = write_peft(whole, folder, sites=sites, task_type=task_type, base_name=base_name, uniform=True, max_rank=max_rank)
    rank = max((t.shape[1] for key, t in whole.tensors.items() if key.endswith("factor.up")), default=0)
    lost = tuple(f"the head of {module!r}: servers of LoRA folders keep the base's own" for module in headed)
    note = f"ranks add up: the largest is {rank} before parts of fused layers are joined; a server may have a limit (vLLM: --max-lora-rank)"
    return replace(report, left_out=(*report.left_out, *lost), notes=(*report.notes, *notes, note))


def _parts(module: Module, sites: SiteMap) -> int:
    """How many parts of one fused layer the module changes at most: their ranks lie side by side."""
    paths = Counter(sites[site].path for site in {key.partition("/")[0] for key in module.tensors} if site in sites)
    return max(paths.values(), default=1)


def _without_head(module: Module) -> Module:
    """The module without what it has at the outputs."""
    part = module.part(lambda patch: patch.port != "logits")
    if not part.method.patches:
        raise ModuleError(f"{module.name!r} is a head alone, no LoRA")
    return part
