"""`intarsia merge`: an expression folded into a plain transformers checkpoint, or modules merged into one module.

The checkpoint is written beside its place, loaded again and compared with the expression before it gets its name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.options import AllowNetwork, parse_values
from intarsia.cli.placing import check_free, new_folder
from intarsia.cli.running import BaseName, ForceBase, Modules, base_of, module_files
from intarsia.cli.verb import verb
from intarsia.errors import BaseError, CompositionError, DataError, ModuleError, UsageError, listing, nearest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from intarsia.bases import Base
    from intarsia.compose import Expr
    from intarsia.modules import Module

Text = Annotated[str, typer.Argument(help="What is merged: 'a', '0.5*a + 0.5*b', 'lang >> task'.", metavar="EXPR")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new checkpoint; must not exist.")]
ToModule = Annotated[Path | None, typer.Option("--to-module", help="Module file to write instead of a checkpoint; must not exist.")]
How = Annotated[str | None, typer.Option("--how", help="With --to-module: weighted, average, ties, dare, magnitude, svd or union (weighted).")]
Rank = Annotated[int | None, typer.Option("--rank", help="With --to-module: rank to bring the result down to.", min=1)]
HowSettings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of --how: keep=0.2, drop=0.9, seed=1, variant=peft.")]
Name = Annotated[str | None, typer.Option("--name", help="With --to-module: the name of the result.")]
Head = Annotated[str | None, typer.Option("--head", help="With --to-module: the module whose head the result has.")]
Probe = Annotated[Path | None, typer.Option("--probe", help="Texts to compare on, one a line; else a few built-in sentences.")]
Tolerance = Annotated[float, typer.Option("--tolerance", help="Largest difference allowed, as a share of the largest output.")]

#: what checkpoint and expression are compared on
SENTENCES = (
    "The library opens at nine and closes before dark.",
    "Watoto wanacheza mpira nje ya nyumba.",
    "¿Cuánto cuesta este libro? Ocho euros.",
    "Der Zug nach Basel hat 25 Minuten Verspätung.",
)
MAX_PROBES = 256
HOW = ("weighted", "average", "ties", "dare", "magnitude", "svd", "union")


def register(app: typer.Typer) -> None:
    verb(app, "merge")(merge)


def merge(
    console: Console,
    expression: Text,
    module: Modules = None,
    base: BaseName = None,
    out: Out = None,
    to_module: ToModule = None,
    how: How = None,
    rank: Rank = None,
    how_set: HowSettings = None,
    name: Name = None,
    head: Head = None,
    probe: Probe = None,
    tolerance: Tolerance = 1e-3,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Fold an expression into a plain transformers checkpoint (--out), or merge modules into one (--to-module).

    intarsia merge "0.5*a + 0.5*b" -m a=a.safetensors -m b=b.safetensors --out merged
    """
    from intarsia.compose import expr

    if (out is None) == (to_module is None):
        raise UsageError("say where to: --out FOLDER for a checkpoint, or --to-module FILE for a module")
    parsed = expr(expression)
    files = chosen_files(parsed, module)
    if out is not None:
        if any(value is not None for value in (how, rank, how_set, name, head)):
            raise UsageError("--how, --rank, --set, --name and --head shape a module; give them with --to-module")
        _checkpoint(console, parsed, files, base, out, probe, tolerance, force_base=force_base, allow_network=allow_network)
    elif to_module is not None:
        if base is not None or probe is not None or force_base:
            raise UsageError("--to-module calculates with modules alone; --base, --probe and --force-base are for --out")
        _module(console, parsed, files, to_module, how or "weighted", rank, how_set, name, head)


def chosen_files(parsed: Expr, given: Sequence[str] | None) -> dict[str, str]:
    """The files of the expression's modules.

    Raises:
        CompositionError: it names no module, one that is not given, or not all that are.
    """
    files = module_files(given)
    order = list(dict.fromkeys(ref.name for ref in parsed.refs()))
    if not order:
        raise CompositionError(f"{parsed} names no module: there is nothing to merge")
    for name in order:
        if name not in files:
            raise CompositionError(f"the expression names {name!r}, which is no module given with --module{nearest(name, files)} given: {listing(files) or 'none'}")
    unused = [name for name in files if name not in order]
    if unused:
        raise CompositionError(f"the expression does not name {listing(unused)}; leave out --module for it, or name it")
    return {name: files[name] for name in order}


# -- a checkpoint ----------------------------------------------------------------------------------------------------------


def _checkpoint(
    console: Console, parsed: Expr, files: Mapping[str, str], base: str | None, out: Path, probe: Path | None, tolerance: float,
    *, force_base: bool, allow_network: bool,
) -> None:  # fmt: skip
    from intarsia import bases
    from intarsia.host import Host
    from intarsia.modules import load
    from intarsia.modules.derived import derived_card

    check_free(out)
    texts = probe_texts(probe)
    modules = [load(path, name=name) for name, path in files.items()]
    headless = [without_head(module) for module in modules]
    dropped = [module.name for module in modules if module.method.head is not None]
    if dropped:
        console.warn(f"the head of {listing(dropped)} is no change of the base's weights and is left out; keep the module file for it")
    loaded = bases.load(base or base_of(files), allow_network=allow_network)
    refuse_quantised(loaded)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    for module in headless:
        host.insert(module, force_base=force_base)
    if reason := host.why_not_foldable(parsed):
        raise CompositionError(f"{parsed} cannot become part of the weights: {reason}. Keep it as modules: intarsia predict --expr")
    with host.using(parsed):
        wanted = outputs(loaded.model, loaded.tokenizer, texts)
    folded = host.fold(parsed)
    with new_folder(out) as folder:
        folded.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        card = derived_card(modules, "merge", {"expression": str(parsed), "base": loaded.name})
        (folder / "README.md").write_text(card.to_markdown(), "utf-8")
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
        "largest_difference": largest, "mean_difference": mean, "largest_output": scale,
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
    head = module.method.head
    if head is None:
        return module
    patches = tuple(patch for patch in module.method.patches if patch.port != "logits")
    if not patches:
        raise CompositionError(f"{module.name!r} is a head alone: it changes nothing in the base, so there is nothing to merge")
    dropped = {patch.name for patch in module.method.patches} - {patch.name for patch in patches}
    tensors = {k: t for k, t in module.tensors.items() if k.partition("/")[2].partition(".")[0] not in dropped}
    return replace(module, method=replace(module.method, patches=patches), tensors=tensors, labels=None)


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


# -- a module --------------------------------------------------------------------------------------------------------------


def _module(
    console: Console, parsed: Expr, files: Mapping[str, str], out: Path, how: str, rank: int | None, pairs: Sequence[str] | None,
    name: str | None, head: str | None,
) -> None:  # fmt: skip
    from intarsia.modules import load, save

    check_free(out)
    if how not in HOW:
        raise UsageError(f"--how {how!r} is unknown{nearest(how, HOW)} known: {listing(HOW)}")
    weights = linear(parsed)
    modules = [load(path, name=label) for label, path in files.items()]
    merged, residual = merged_module(modules, [weights[m.name] for m in modules], how, rank, pairs, name, head)
    save(merged, out)
    size = out.stat().st_size
    payload: dict[str, Any] = {
        "out": str(out), "name": merged.name, "digest": merged.digest, "how": how, "weights": weights, "parameters": merged.n_parameters,
        "bytes": size, "residual": residual, "warnings": list(merged.card.warnings), "licence": merged.card.licence,
    }  # fmt: skip

    def human() -> None:
        console.line(f"wrote {out}: {merged.name!r}, {merged.n_parameters:,} values, {size_text(size)}")
        if residual is not None:
            console.line(f"  rank {rank} leaves out {residual:.2%} of the change (Frobenius)")
        for warning in merged.card.warnings:
            console.line(f"  warning: {warning}")

    console.result(payload, human)


def linear(parsed: Expr, factor: float = 1.0) -> dict[str, float]:
    """The weights of a sum: `0.5*(a + b) - b` -> a: 0.5, b: -0.5.

    Raises:
        CompositionError: it has members in order (`>>`), which is not a sum.
    """
    from intarsia.compose import Mix, Ref

    if isinstance(parsed, Ref):
        return {parsed.name: factor}
    if not isinstance(parsed, Mix):
        raise CompositionError(f"{parsed} is no weighted sum: only sums and averages of modules become one module; --out takes any expression that folds")
    found: dict[str, float] = {}
    for part, weight in zip(parsed.parts, parsed.weights):
        for name, value in linear(part, factor * weight).items():
            found[name] = found.get(name, 0.0) + value
    return found


def merged_module(
    modules: Sequence[Module], weights: Sequence[float], how: str, rank: int | None, pairs: Sequence[str] | None, name: str | None, head: str | None
) -> tuple[Module, float | None]:
    """Modules merged one way, and the residual where the rank was brought down.

    Raises:
        UsageError: a setting is unknown, or the weights mean nothing to this way of merging.
    """
    from intarsia.modules import arithmetic, merging
    from intarsia.modules.derived import derived_card
    from intarsia.modules.names import MAX_NAME

    functions = {
        "weighted": arithmetic.weighted_sum, "average": arithmetic.average, "ties": merging.ties, "dare": merging.dare,
        "magnitude": merging.magnitude, "svd": merging.svd, "union": merging.sparse_union,
    }  # fmt: skip
    signature = inspect.signature(functions[how]).parameters  # type: ignore[arg-type]
    defaults = {k: p.default for k, p in signature.items() if k not in ("modules", "module", "name", "head", "weights", "operation", "rank")}
    settings = parse_values(pairs, "--set", defaults)
    for key in settings:
        if key not in defaults:
            raise UsageError(f"--set {key}: --how {how} has no such setting{nearest(key, defaults)} known: {listing(defaults) or 'none'}")
    plain = all(w == 1.0 for w in weights)
    if how == "svd" and rank is None:
        raise UsageError("--how svd needs --rank N")
    common: dict[str, Any] = {**settings, "head": head}
    if how in ("weighted", "svd"):
        result = arithmetic.weighted_sum(modules, weights, **common)
    elif how == "average":
        result = arithmetic.average(modules, weights, **common)
    elif how == "ties":
        result = merging.ties(modules, **common, **({} if plain else {"weights": weights}))
    elif how == "union":
        if not plain:
            raise UsageError("--how union takes each entry as it is, so weights mean nothing there: name the modules as a + b")
        result = merging.sparse_union(modules, **common)
    else:
        thin = merging.dare if how == "dare" else merging.magnitude
        thinned = [thin(module, **settings) for module in modules]
        result = arithmetic.weighted_sum(thinned, weights, head=None if head is None else f"{how} of {head}")
    result, residual = (result, None) if rank is None else merging.svd(result, rank)
    recipe = {"weights": list(weights), **settings, **({} if rank is None else {"rank": rank, "residual": residual})}
    title = name or f"{how} of {' and '.join(module.name for module in modules)}"[:MAX_NAME]
    if title in [module.name for module in modules]:
        raise UsageError(f"--name {title!r} is the name of a module it is made of; give another")
    return replace(result, name=title, card=derived_card(modules, how, recipe)), residual
