"""Folding an expression into a plain transformers checkpoint, for `intarsia merge --out`.

The folder is written beside its place, loaded again and compared with the expression before it gets its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.cli.card import hub_id
from intarsia.cli.console import Console, size_text
from intarsia.cli.placing import check_free, new_folder
from intarsia.cli.running import base_of, inserted
from intarsia.cli.sources import read_modules
from intarsia.errors import BaseError, CompositionError, DataError, ModuleError, listing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from intarsia.bases import Base
    from intarsia.compose import Expr
    from intarsia.modules import Module

#: what checkpoint and expression are compared on
SENTENCES = (
    "The library opens at nine and closes before dark.",
    "Watoto wanacheza mpira nje ya nyumba.",
    "¿Cuánto cuesta este libro? Ocho euros.",
    "Der Zug nach Basel hat 25 Minuten Verspätung.",
)
MAX_PROBES = 256


def checkpoint(
    console: Console, parsed: Expr, files: Mapping[str, str], base: str | None, out: Path, probe: Path | None, tolerance: float,
    *, force_base: bool, allow_network: bool,
) -> None:  # fmt: skip
    """Write a checkpoint and say how far it is from the expression.

    Raises:
        CompositionError: the expression does not fold.
        ModuleError: what was read back differs by more than `tolerance` of the largest output.
    """
    from intarsia import bases
    from intarsia.host import Host
    from intarsia.modules.derived import derived_card
    from intarsia.modules.readme import render

    check_free(out)
    texts = probe_texts(probe)
    modules = list(read_modules(files).values())
    headless = [without_head(module) for module in modules]
    dropped = [module.name for module in modules if module.method.head is not None]
    if dropped:
        console.warn(f"the head of {listing(dropped)} is no change of the base's weights and is left out; keep the module file for it")
    loaded = bases.load(base or base_of(files), allow_network=allow_network)
    refuse_quantised(loaded)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    forced = inserted(host, {module.name: module for module in headless}, force_base=force_base, marked="its README says so")
    if reason := host.why_not_foldable(parsed):
        raise CompositionError(f"{parsed} cannot become part of the weights: {reason}. Keep it as modules: intarsia predict --expr")
    with host.using(parsed):
        wanted = outputs(loaded.model, loaded.tokenizer, texts)
    folded = host.fold(parsed)
    with new_folder(out) as folder:
        folded.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        card = derived_card(modules, "merge", {"expression": str(parsed), "base": loaded.name}, inside=[loaded.licence])
        marks = tuple(f"{name!r} was trained on another base ({difference})" for name, difference in forced.items())
        card = replace(card, warnings=(*card.warnings, *marks))
        (folder / "README.md").write_text(render(card, library="transformers", base_model=hub_id(loaded.name)), "utf-8")
        del folded
        again = bases.load(folder)
        largest, mean, scale = difference(wanted, outputs(again.model, again.tokenizer, texts))
        if not largest <= tolerance * max(scale, 1.0):
            raise ModuleError(
                f"the checkpoint read back differs from the expression by {largest:.3g} (outputs up to {scale:.3g}, allowed "
                f"{tolerance:g} of it), so it is not kept; --tolerance allows more, e.g. for a base in half precision"
            )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    payload = {
        "out": str(out), "expression": str(parsed), "base": loaded.name, "bytes": size, "heads_left_out": dropped, "probes": len(texts),
        "largest_difference": largest, "mean_difference": mean, "largest_output": scale, **({"forced_base": forced} if forced else {}),
    }  # fmt: skip

    def human() -> None:
        console.line(f"wrote {out}: {loaded.name} with {parsed} inside, {size_text(size)}; loads with transformers alone")
        console.line(f"  {'logits' if wanted and wanted[0].logits else 'hidden states'} differ by {largest:.2e} at most, {mean:.2e} on average ({len(texts)} texts, outputs up to {scale:.3g})")

    console.result(payload, human)


def refuse_quantised(loaded: Base) -> None:
    """Refuse a base whose weights are packed: adding to them would round them again.

    Raises:
        BaseError: names the way it is quantised.
    """
    config = getattr(loaded.model.config, "quantization_config", None)
    if config is None and not getattr(loaded.model, "is_quantized", False):
        return
    found = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    kind = getattr(found.get("quant_method"), "value", found.get("quant_method")) or "an unnamed method"
    raise BaseError(
        f"base {loaded.name} is quantised ({kind}): a change cannot be added to packed weights exactly. Merge into the base it was "
        "made from and quantise the result, or keep the modules beside it"
    )


def without_head(module: Module) -> Module:
    """The module without its head: what it changes in the base."""
    part = module.part(lambda patch: patch.port != "logits")
    if not part.method.patches:
        raise CompositionError(f"{module.name!r} is a head alone: it changes nothing in the base, so there is nothing to merge")
    return part


def probe_texts(file: Path | None) -> list[str]:
    """The texts to compare on.

    Raises:
        DataError: the file cannot be read, is no UTF-8, has no text or too many.
    """
    if file is None:
        return list(SENTENCES)
    try:
        found = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--probe {file}: {error}") from error
    if not 0 < len(found) <= MAX_PROBES:
        raise DataError(f"--probe {file}: found {len(found)} texts, expected 1 to {MAX_PROBES}")
    return found


class Output:
    """What a model says of one text: values, and whether they are logits or hidden states."""

    def __init__(self, values: Tensor, logits: bool) -> None:
        self.values = values
        self.logits = logits


def outputs(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> list[Output]:
    """Logits (of a bare model: final hidden states) text by text, so that no padding takes part."""
    import torch

    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) or 512, 512)
    found = []
    model.eval()
    with torch.inference_mode():
        for text in texts:
            given = dict(tokenizer(text, truncation=True, max_length=longest - 2, return_tensors="pt"))
            if model.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"]
            said = model(**given)
            logits = getattr(said, "logits", None)
            found.append(Output((said.last_hidden_state if logits is None else logits).double(), logits is not None))
    return found


def difference(one: Sequence[Output], other: Sequence[Output]) -> tuple[float, float, float]:
    """Largest and mean absolute difference, and the largest absolute output."""
    largest, total, count, scale = 0.0, 0.0, 0, 0.0
    for a, b in zip(one, other, strict=True):
        if a.values.shape != b.values.shape:
            raise ModuleError(f"the checkpoint read back answers in shape {tuple(b.values.shape)}, the base in {tuple(a.values.shape)}")
        gap = (a.values - b.values).abs()
        highest = float(gap.max())
        largest = highest if math.isnan(highest) else max(largest, highest)
        total, count, scale = total + float(gap.sum()), count + gap.numel(), max(scale, float(a.values.abs().max()))
        if math.isnan(largest):
            break
    return largest, total / max(count, 1), scale
