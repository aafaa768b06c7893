"""`intarsia explain EXPR`: what an expression does at every site, whether it folds, which laws hold; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork
from intarsia.cli.running import BaseName, ForceBase, HeadOf, Modules, base_of, check_given, inserted, module_files
from intarsia.cli.sources import read_modules
from intarsia.cli.verb import verb
from intarsia.errors import BaseError, CompositionError, listing

if TYPE_CHECKING:
    from intarsia.bases import Base
    from intarsia.compose import Expr
    from intarsia.compose.explain import Carried, Explanation, Place, SiteExplanation, Step
    from intarsia.host import Host
    from intarsia.modules import Module
    from intarsia.patches import Delta
    from intarsia.sites import Site, SiteMap

Text = Annotated[str, typer.Argument(help="What is explained: 'swh >> ner', '0.5*de + 0.5*nl', 'average(a, b)'.", metavar="EXPR")]

LAWS = ("commute", "associate", "rows")


def register(app: typer.Typer) -> None:
    verb(app, "explain")(explain)


def explain(
    console: Console, expression: Text, module: Modules = None, base: BaseName = None, head: HeadOf = None, force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:  # fmt: skip
    """Say what an expression does before it runs: sites, order, sizes, laws, folding, refusals.

    intarsia explain "lang >> ner" -m lang=swh.safetensors -m ner=ner.safetensors --base me5-small
    """
    from intarsia import bases
    from intarsia.compose import expr, names
    from intarsia.compose.explain import explain as told
    from intarsia.host import Host

    parsed = expr(expression)
    files = module_files(module, parsed)
    modules = read_modules(files)
    check_given(sorted(names(parsed)), modules)
    loaded = bases.load(base or base_of(files), allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    forced = inserted(host, modules, force_base=force_base)
    refused = refusal(host, parsed, head)
    facts = {name: carried(host, name) for name in modules}
    places = [place(site) for site in host.sites.values()]
    folds = "it may not run" if refused else why_not_folded(loaded, host, parsed, modules, force_base=force_base)
    found = told(parsed, facts, places, folds=folds, refusal=None if refused is None else str(refused), head=head)
    console.result({"base": loaded.name, **payload(found), **({"forced_base": forced} if forced else {})}, lambda: _show(console, found, host.sites, loaded.name))
    if refused is not None:
        raise refused


def refusal(host: Host, parsed: Expr, head: str | None) -> CompositionError | None:
    """Why the expression may not run, None if it may."""
    try:
        host.call(parsed, head=head)
    except CompositionError as error:
        return error
    return None


def carried(host: Host, name: str) -> Carried:
    """A module on a host as the explanation knows it."""
    from intarsia.compose.explain import Carried

    steps: dict[str, tuple[Step, ...]] = {}
    tensors, parameters = host.tensors(name), host.parameters(name)
    for site, deltas in host.deltas(name):
        steps[site.name] = tuple(step(site, delta, tensors, parameters) for delta in deltas)
    return Carried(steps, len(tensors), numbers(parameters), numbers(tensors))


def step(site: Site, delta: Delta, tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> Step:
    """One patch at one site, with the sizes of its own tensors."""
    from intarsia.compose.explain import Step

    own = f"{site.name}/{delta.name}."
    sizes = [numbers({k: t for k, t in group.items() if k.startswith(own)}) for group in (parameters, tensors)]
    return Step(delta.name, type(delta.op).__name__.lower(), type(delta.form).__name__, nature(site, delta), *sizes)


def nature(site: Site, delta: Delta) -> Any:
    """How a patch depends on the value at its site (see `Step.nature`)."""
    from intarsia.patches import Add, Gain, Mul, WhyNot

    constant = not isinstance(delta.form.constant(), WhyNot)
    if isinstance(delta.op, Add):
        # an affine function of the layer's input: what other modules do to its output does not reach that
        affine = site.port == "out" and not isinstance(delta.form.as_linear(), WhyNot)
        return "adds" if constant or affine else "other"
    return "scales" if constant and isinstance(delta.op, Mul | Gain) else "other"


def numbers(tensors: Mapping[str, Any]) -> int:
    """How many numbers some tensors hold, each tensor once."""
    return sum(tensor.numel() for tensor in {id(t): t for t in tensors.values()}.values())


def place(site: Site) -> Place:
    """A site as far as laws go."""
    from intarsia.compose.explain import Place

    once = "the model computes this once for all rows; run the rows of each expression as a batch of their own"
    return Place(site.name, site.port, once if site.rowless or site.reused else None)


def why_not_folded(loaded: Base, host: Host, parsed: Expr, modules: Mapping[str, Module], *, force_base: bool) -> str | None:
    """Why `intarsia merge` would refuse the expression, None if it would not.  Heads are taken off the host for that."""
    from intarsia.cli.folding import refuse_quantised, without_head
    from intarsia.compose import names

    used = sorted(names(parsed))
    if not used:
        return "there is nothing to fold"
    try:
        refuse_quantised(loaded)
        for name in used:
            if modules[name].method.head is not None:
                host.remove(name).insert(without_head(modules[name]), name=name, force_base=force_base)
    except (BaseError, CompositionError) as error:
        return str(error)
    return host.why_not_foldable(parsed)


def payload(found: Explanation) -> dict[str, Any]:
    """The explanation as plain values."""
    sites = [{**asdict(s), "steps": [{"module": n, **asdict(step)} for n, step in s.steps], "trainable": s.trainable, "stored": s.stored} for s in found.sites]
    modules = {name: {"tensors": m.tensors, "trainable": m.trainable, "stored": m.stored} for name, m in found.modules.items()}
    return {
        "expression": found.expression, "refusal": found.refusal, "forwards": found.forwards, "folds": found.folds is None, "why_not_folded": found.folds,
        "heads": list(found.heads), "unused": list(found.unused), "modules": modules, "sites": sites,
    }  # fmt: skip


def _show(console: Console, found: Explanation, sites: SiteMap, base: str) -> None:
    console.line(f"{found.expression} on {base}: {'refused' if found.refusal else 'legal'}")
    console.line(f"  forward passes per example: {found.forwards}")
    without = f", without the head of {listing(found.heads)}, which stays a module" if found.heads else ""
    console.line(f"  folds into the weights: {'yes' + without + '; intarsia merge writes it' if found.folds is None else 'no: ' + found.folds}")
    if found.unused:
        console.line(f"  not named, so not run: {listing(found.unused)}")
    if found.modules:
        console.heading("Modules (numbers)")
        console.table(["module", "trainable", "stored", "tensors"], [[n, m.trainable, m.stored, m.tensors] for n, m in found.modules.items()])
    if found.sites:
        console.heading("Sites in model order (N is the number of a block); sizes per site, tied tensors left out")
        console.table(["site", "port", "sites", "order", "steps", "trainable", "stored", *LAWS], _rows(found, sites))
        console.heading("Laws by port")
        console.table(["port", "law", "holds", "because"], _laws(found))


def _rows(found: Explanation, sites: SiteMap) -> list[list[Any]]:
    """The sites of all blocks where the same happens are one row."""
    groups: dict[tuple[Any, ...], int] = {}
    for s in found.sites:
        layer = sites[s.site].layer
        name = ".".join("N" if layer is not None and word == str(layer) else word for word in s.site.split("."))
        row = (name, s.port, s.order, _steps(s), s.trainable, s.stored, *("yes" if s.laws[law].holds else "no" for law in LAWS))
        groups[row] = groups.get(row, 0) + 1
    return [[name, port, count, *rest] for (name, port, *rest), count in groups.items()]


def _steps(s: SiteExplanation) -> str:
    return ", ".join(f"{name}: {step.patch} ({step.op} {step.form})" for name, step in s.steps)


def _laws(found: Explanation) -> list[list[str]]:
    """Each law once per port and reason."""
    rows = [(s.port, law, "yes" if s.laws[law].holds else "no", s.laws[law].reason) for s in found.sites for law in LAWS]
    return [list(row) for row in sorted(dict.fromkeys(rows), key=lambda r: (r[0], LAWS.index(r[1])))]
