"""`intarsia merge`: an expression folded into a plain transformers checkpoint (`folding.py`), or modules merged into one module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.options import AllowNetwork, parse_values
from intarsia.cli.placing import check_free
from intarsia.cli.running import BaseName, ForceBase, Modules, check_given, module_files
from intarsia.cli.sources import read_modules
from intarsia.cli.verb import verb
from intarsia.errors import CompositionError, UsageError, listing, nearest

if TYPE_CHECKING:
    from intarsia.compose import Expr
    from intarsia.modules import Module

Text = Annotated[str, typer.Argument(help="What is merged: 'a', '0.5*a + 0.5*b', 'lang >> task'; last and after -- where it begins with a minus.", metavar="EXPR")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new checkpoint; must not exist.")]
ToModule = Annotated[Path | None, typer.Option("--to-module", help="Module file to write instead of a checkpoint; must not exist.")]
How = Annotated[str | None, typer.Option("--how", help="With --to-module: weighted, average, ties, dare, magnitude, svd or union (weighted).")]
Rank = Annotated[int | None, typer.Option("--rank", help="With --to-module: rank to bring the result down to.", min=1)]
HowSettings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of --how: keep=0.2, drop=0.9, seed=1, variant=peft.")]
Name = Annotated[str | None, typer.Option("--name", help="With --to-module: the name of the result.")]
Head = Annotated[str | None, typer.Option("--head", help="With --to-module: the module whose head the result has.")]
Probe = Annotated[Path | None, typer.Option("--probe", help="Texts to compare on, one a line; else a few built-in sentences.")]
Tolerance = Annotated[float, typer.Option("--tolerance", help="Largest difference allowed, as a share of the largest output.")]

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
        from intarsia.cli.folding import checkpoint

        checkpoint(console, parsed, files, base, out, probe, tolerance, force_base=force_base, allow_network=allow_network)
    elif to_module is not None:
        if base is not None or probe is not None or force_base:
            raise UsageError("--to-module calculates with modules alone; --base, --probe and --force-base are for --out")
        _module(console, parsed, files, to_module, how or "weighted", rank, how_set, name, head)


def chosen_files(parsed: Expr, given: Sequence[str] | None) -> dict[str, str]:
    """The files of the expression's modules.

    Raises:
        CompositionError: it names no module, one that is not given, or not all that are.
    """
    files = module_files(given, parsed)
    order = list(dict.fromkeys(ref.name for ref in parsed.refs()))
    if not order:
        raise CompositionError(f"{parsed} names no module: there is nothing to merge")
    check_given(order, files)
    unused = [name for name in files if name not in order]
    if unused:
        raise CompositionError(f"the expression does not name {listing(unused)}; leave out --module for it, or name it")
    return {name: files[name] for name in order}


def _module(
    console: Console, parsed: Expr, files: Mapping[str, str], out: Path, how: str, rank: int | None, pairs: Sequence[str] | None,
    name: str | None, head: str | None,
) -> None:  # fmt: skip
    from intarsia.modules import save

    check_free(out)
    if how not in HOW:
        raise UsageError(f"--how {how!r} is unknown{nearest(how, HOW)} known: {listing(HOW)}")
    weights = linear(parsed)
    modules = list(read_modules(files).values())
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
    if not isinstance(parsed, Mix) or not parsed.plain:
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
        result = merging.ties(modules, weights=None if plain else weights, **common)
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
    return replace(result, name=title, card=derived_card(modules, how, recipe, nbytes=result.nbytes)), residual
