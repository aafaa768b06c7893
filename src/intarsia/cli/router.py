"""`intarsia router`: routers that are computed or searched instead of trained, test-time mixtures, and reports.

Routers that are trained come from `intarsia train --method ROUTER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import (
    AllowNetwork,
    Columns,
    Format,
    Settings,
    TaskSettings,
    parse_pairs,
    parse_settings,
    read_table,
    reading,
)
from intarsia.cli.running import BaseName, BatchSize, ForceBase, HeadOf, Modules, Running, defaults, module_files, start
from intarsia.cli.verb import verb
from intarsia.errors import UsageError, listing, nearest

if TYPE_CHECKING:
    from intarsia.compose import Expr, Mix
    from intarsia.data import Table

Mixture = Annotated[str, typer.Option("--expr", help="An expression with the mixture, e.g. 'fuse(a, b; router=r) >> ner'.")]
RouterName = Annotated[str | None, typer.Option("--name", help="The router in the expression; may be left out where there is one.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File for the router.")]
Steps = Annotated[int, typer.Option("--steps", help="How often the examples are asked.", min=1)]
MemberData = Annotated[list[str] | None, typer.Option("--data", metavar="MEMBER=FILE", help="Examples of a member's task or domain; answers are not read.")]
MemberGate = Annotated[list[str] | None, typer.Option("--gate", metavar="MEMBER=MODULE", help="The gate that was trained for a member.")]
COMPUTED = ("arrow", "phatgoose", "gaussians", "centroids", "fixed", "soup")


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="Weights of mixtures without training: computed, searched, by entropy; and what routers do.", no_args_is_help=True)
    for name, function in (("ls", ls), ("make", make), ("search", search), ("adapt", adapt), ("emea", emea), ("report", report)):
        verb(room, name)(function)
    app.add_typer(room, name="router")


def ls(console: Console) -> None:
    """List the kinds of routers: for `train --method`, and for `router make`."""
    from intarsia.methods import ROUTERS

    rows = [{"name": n, "equation": r.equation, "source": r.source, "summary": r.summary, "defaults": {k: str(v) for k, v in r.defaults.items() if k not in ("parts", "where")}} for n, r in ROUTERS.items()]
    console.result(rows, lambda: console.table(["router", "what it does", "equation", "source"], [[r["name"], r["summary"], r["equation"], r["source"]] for r in rows]))


def make(
    console: Console,
    kind: Annotated[str, typer.Argument(help="arrow, phatgoose, gaussians, centroids, fixed or soup.")],
    expr: Mixture,
    out: Out,
    module: Modules = None,
    name: RouterName = None,
    data: MemberData = None,
    gate: MemberGate = None,
    set_: Settings = None,
    base: BaseName = None,
    format: Format = None,
    columns: Columns = None,
    batch_size: BatchSize = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Compute a router from its members, from examples of each, or from gates; nothing is trained.

    intarsia router make arrow --expr "fuse(a, b; router=r)" -m a=a.safetensors -m b=b.safetensors --out r.safetensors
    """
    from intarsia.compose import expr as parse
    from intarsia.host import prototypes
    from intarsia.methods import ROUTERS

    if kind not in COMPUTED:
        raise UsageError(f"`router make` computes {listing(COMPUTED)}, not {kind!r}{nearest(kind, COMPUTED)}; others are trained: intarsia train --method {kind}")
    parsed = parse(expr)
    mix = the_mixture(parsed, name)
    router = str(mix.router)
    settings = parse_settings(set_, ROUTERS[kind]) if kind in ROUTERS else {k: float(v) for k, v in parse_pairs(set_, "--set").items()}
    running = prepared(parsed, router, module, base, None, batch_size, needs_task=kind in ("gaussians", "centroids"), allow_network=allow_network, force_base=force_base)
    host, members = running.host, [str(part) for part in mix.parts]
    if kind in ("gaussians", "centroids"):
        files = parse_pairs(data, "--data")
        if set(files) != set(members):
            raise UsageError(f"{kind} looks at examples of every member: --data MEMBER=FILE for {listing(members)}, found {listing(files) or 'none'}")
        batches = {m: list(inputs(running, read_table(files[m], format, reading(columns, None, None, None, None)), batch_size or 32)) for m in members}
        getattr(prototypes, kind)(host, router, batches, **settings)
    elif kind == "phatgoose":
        prototypes.phatgoose(host, router, {m: parse_pairs(gate, "--gate").get(m, "") for m in members}, **settings)
    elif kind == "arrow":
        prototypes.arrow(host, router, members, **settings)
    else:
        host.router(router, kind, members, **settings)
    headed = [ref.name for ref in parsed.refs() if host.labels(ref.name) is not None]
    host.call(parsed, head=headed[-1] if headed else None)  # refused now rather than by whoever uses it
    _write(console, running, router, out, {"kind": kind, "members": members, "expression": str(parsed)}, members_of(mix))


def search(
    console: Console,
    data: Annotated[str, typer.Argument(help="A file with a few answered examples.")],
    expr: Mixture,
    out: Out,
    module: Modules = None,
    name: RouterName = None,
    head: HeadOf = None,
    steps: Steps = 40,
    bound: Annotated[float, typer.Option("--bound", help="Weights stay within -bound ... bound.")] = 1.5,
    l1: Annotated[float, typer.Option("--l1", help="Times the mean of abs(weight) is added to the loss.")] = 0.05,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    set_: Settings = None,
    task_set: TaskSettings = None,
    base: BaseName = None,
    format: Format = None,
    columns: Columns = None,
    batch_size: BatchSize = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Search weights by the loss of a few examples, without gradients (LoraHub); a new router of one number per member.

    intarsia router search few.csv --expr "fuse(a, b; router=r, space=phi) >> task" -m a=a.safetensors -m b=b.safetensors -m task=t.safetensors --out r.safetensors
    """
    from intarsia.compose import expr as parse
    from intarsia.host import adapting
    from intarsia.methods import ROUTERS

    parsed = parse(expr)
    mix = the_mixture(parsed, name)
    router = str(mix.router)
    running = prepared(parsed, router, module, base, task_set, batch_size, head=head, allow_network=allow_network, force_base=force_base)
    settings = {"scope": "shared", "start": 0.0, **parse_settings(set_, ROUTERS["soup"])}
    running.host.router(router, "soup", list(mix.parts), **settings)
    table = read_table(data, format, reading(columns, None, None, None, None))
    batches = list(inputs(running, table, batch_size or 16, labelled=True))
    score = few_loss(running, parsed, head, batches)
    before = score()
    best = adapting.search(running.host, router, score, steps=steps, bound=bound, l1=l1, seed=seed)
    found = adapting.tables(running.host, router)[0].detach().flatten().tolist()
    weights = {str(part): w for part, w in zip(mix.parts, found[-len(mix.parts) :])}
    _write(console, running, router, out, {"kind": "search", "loss_before": before, "best": best, "weights": weights, "expression": str(parsed), "steps": steps, "seed": seed}, members_of(mix))


def few_loss(running: Running, expression: Expr, head: str | None, batches: Sequence[dict[str, Any]]) -> Callable[[], float]:
    """The mean loss per term of labelled batches of a task, as a function."""
    import torch

    from intarsia.train.frozen import evaluating
    from intarsia.train.task import context_of

    def score() -> float:
        total, terms = 0.0, 0
        with torch.no_grad(), evaluating(running.host.model):
            for batch in batches:
                with running.host.using(expression, head=head, **context_of(running.task, batch)) as model:
                    output = model(**{key: batch[key] for key in running.task.keys if key in batch})
                loss, count = running.task.loss(output, batch)
                total, terms = total + float(loss), terms + int(count)
        return total / max(terms, 1)

    return score


def adapt(
    console: Console,
    data: Annotated[list[str], typer.Argument(help="Unanswered examples of every task: HEAD=FILE, the module whose head answers them.", metavar="HEAD=FILE...")],
    expr: Mixture,
    out: Out,
    module: Modules = None,
    name: RouterName = None,
    steps: Steps = 500,
    rate: Annotated[float, typer.Option("--lr", help="Learning rate (Adam).")] = 1e-3,
    batch_size: BatchSize = None,
    set_: Settings = None,
    base: BaseName = None,
    format: Format = None,
    columns: Columns = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Lower the uncertainty of answers to unanswered test examples of several tasks (AdaMerging); a new router of weights.

    intarsia router adapt a=test-a.csv b=test-b.csv --expr "fuse(a, b; router=r)" -m a=a.safetensors -m b=b.safetensors --out r.safetensors
    """
    from intarsia.compose import expr as parse
    from intarsia.host import adapting
    from intarsia.methods import ROUTERS

    parsed = parse(expr)
    mix = the_mixture(parsed, name)
    router = str(mix.router)
    files = parse_pairs(data, "HEAD=FILE")
    first = next(iter(files))
    running = prepared(parsed, router, module, base, None, batch_size, head=first, allow_network=allow_network, force_base=force_base)
    settings = {"squash": "clamp", "scope": "site", "start": 0.3, **parse_settings(set_, ROUTERS["soup"])}
    running.host.router(router, "soup", list(mix.parts), **settings)
    tasks = []
    for head, file in files.items():
        mine = running if head == first else prepared_like(running, head)
        table = read_table(file, format, reading(columns, None, None, None, None))
        tasks.append((parsed, head, list(inputs(mine, table, batch_size or 16))))
    losses = adapting.least_entropy(running.host, router, tasks, steps=steps, rate=rate)
    facts = {"kind": "adapt", "entropy_before": losses[0], "entropy": losses[-1], "steps": steps, "expression": str(parsed), "note": "transductive: it has seen the inputs of these files"}
    _write(console, running, router, out, facts, members_of(mix))


def emea(
    console: Console,
    data: Annotated[str, typer.Argument(help="A file with answers.")],
    expr: Mixture,
    module: Modules = None,
    name: RouterName = None,
    head: HeadOf = None,
    steps: Annotated[int, typer.Option("--steps", help="Of gradient descent per batch; 0 for the plain ensemble.", min=0)] = 10,
    rate: Annotated[float, typer.Option("--lr", help="Of gradient descent; choose it on dev data of the source.")] = 10.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows that are answered with the same weights (1 in the paper).", min=1)] = 1,
    set_: Settings = None,
    task_set: TaskSettings = None,
    base: BaseName = None,
    format: Format = None,
    columns: Columns = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Answer every batch under the weights that make its answers least uncertain (EMEA), beside the plain ensemble.

    intarsia router emea test.csv --expr "fuse(en, hi, ar; router=r) >> ner" -m en=en.safetensors -m hi=hi.safetensors -m ar=ar.safetensors -m ner=ner.safetensors
    """
    from intarsia.cli.evaluate import interval
    from intarsia.compose import expr as parse
    from intarsia.host.adapting import Emea
    from intarsia.methods import ROUTERS

    parsed = parse(expr)
    mix = the_mixture(parsed, name)
    router = str(mix.router)
    running = prepared(parsed, router, module, base, task_set, batch_size, head=head, allow_network=allow_network, force_base=force_base)
    running.host.router(router, "soup", list(mix.parts), **{"squash": "softmax", "start": 0.5, **parse_settings(set_, ROUTERS["soup"])})
    table = read_table(data, format, reading(columns, None, None, None, None))
    found: dict[str, Any] = {}
    for what, count in (("ensemble", 0), ("emea", steps)):
        predictions, first, last = [], 0.0, 0.0
        batches = list(inputs(running, table, batch_size, labelled=False, whole=True))
        for batch in batches:
            context = batch.get("context", {})
            answer = Emea(running.host, router, parsed, rate, count, head, context)
            output, seen = answer.answered({key: batch[key] for key in running.task.keys if key in batch})
            predictions += running.task.predict(output, batch)
            first, last = first + seen[0] / len(batches), last + seen[-1] / len(batches)
        scores = running.task.score(running.task.finish(predictions, table), table)
        found[what] = {"metrics": {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.size} for n, s in scores.items()}, "entropy_before": first, "entropy": last}
    payload = {"expression": str(parsed), "steps": steps, "rate": rate, "batch_size": batch_size, **found}

    def human() -> None:
        names = list(found["emea"]["metrics"])
        console.table(["", *names, "entropy"], [[what, *(interval(entry["metrics"][n]) for n in names), f"{entry['entropy']:.4f}"] for what, entry in found.items()])
        console.line("transductive: the weights follow from the inputs that are answered; nothing is kept")

    console.result(payload, human)


def report(
    console: Console,
    data: Annotated[str, typer.Argument(help="A file of examples; answers are not read.")],
    expr: Mixture,
    module: Modules = None,
    name: RouterName = None,
    head: HeadOf = None,
    by: Annotated[list[str] | None, typer.Option("--by", metavar="COLUMN", help="Mutual information of the members with this column; may be repeated.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="A file for the picture site x member (png).")] = None,
    task_set: TaskSettings = None,
    base: BaseName = None,
    format: Format = None,
    columns: Columns = None,
    batch_size: BatchSize = None,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Say how much of each member a router uses where, how decided it is, and what that has to do with columns of the data.

    intarsia router report test.csv --expr "fuse(a, b; router=f)" -m a=a.safetensors -m b=b.safetensors -m f=f.safetensors --by language --picture f.png
    """
    from intarsia.compose import expr as parse
    from intarsia.host import report as reports

    parsed = parse(expr)
    mix = the_mixture(parsed, name)
    running = prepared(parsed, None, module, base, task_set, batch_size, head=head, allow_network=allow_network, force_base=force_base)
    table = read_table(data, format, reading(columns, None, None, None, None))
    for column in by or ():
        if column not in table.names:
            raise UsageError(f"--by {column}: the data have no such column{nearest(column, table.names)}; they have {listing(table.names)}")
    batches = list(inputs(running, table, batch_size or 32, whole=True))
    rows = [row for batch in batches for row in batch["row"]]
    metadata = {column: [str(table[column][row]) for row in rows] for column in by or ()}
    keys = {key for batch in batches for key in batch.get("context", {})}
    context = {key: [value for batch in batches for value in batch["context"][key]] for key in keys}
    given = [{key: batch[key] for key in running.task.keys if key in batch} for batch in batches]
    found = reports.report(running.host, str(mix.router), parsed, given, by=metadata, context=context, head=head)
    if picture is not None:
        from intarsia.modules import write_atomic

        drawn = reports.picture(found, str(mix))
        write_atomic(picture, [drawn], len(drawn))

    def human() -> None:
        for line in found.lines():
            console.line(line)

    console.result({"expression": str(parsed), "router": mix.router, **found.to_dict()}, human)


# -- shared ------------------------------------------------------------------------------------------------------------


def the_mixture(parsed: Expr, name: str | None) -> Mix:
    """The mixture that is meant.

    Raises:
        UsageError: there is none, or several and no name.
    """
    from intarsia.host.routing import mixtures

    found = [mix for mix in dict.fromkeys(mixtures(parsed)) if mix.router is not None and name in (None, mix.router)]
    if len({mix.router for mix in found}) != 1:
        what = f"several routers ({listing(sorted({str(m.router) for m in found}))}): say which with --name" if found else "no mixture with a router"
        raise UsageError(f"{parsed} has {what}; write e.g. fuse(a, b; router=r)")
    return found[0]


def prepared(
    parsed: Expr, router: str | None, module: list[str] | None, base: str | None, task_set: Sequence[str] | None, batch_size: int | None, *,
    head: str | None = None, needs_task: bool = True, allow_network: bool, force_base: bool,
) -> Running:  # fmt: skip
    """A host with the modules of an expression but its new router, and the task that they are for."""
    from intarsia.compose import Seq
    from intarsia.train.config import EvalConfig, load_config

    files = module_files(module)
    if router is not None and router in files:
        raise UsageError(f"{router!r} is the router that is made here, and --module gives one of that name; call the new one differently")
    stand_in = str(parsed) if router is None else str(Seq(tuple(dict.fromkeys(ref for ref in parsed.refs() if ref.name != router))))
    values = {"modules": files or None, "base": base, "data": {"none": "-"}, "expression": stand_in, "head": head}
    chosen = load_config(EvalConfig, None, defaults({k: v for k, v in values.items() if v is not None}, {}))
    if router is None or needs_task:
        return start(chosen, task_set, allow_network=allow_network, force_base=force_base, checked=router is None)
    from intarsia import bases
    from intarsia.cli.sources import read_modules
    from intarsia.host import Host

    loaded = bases.load(chosen.base, allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    for value in read_modules(chosen.modules).values():
        host.insert(value, force_base=force_base)
    return Running(host, stand_in, head, None)  # type: ignore[arg-type]


def members_of(mix: Mix) -> list[str]:
    """The modules that a mixture's members name."""
    from intarsia.compose import names

    return sorted({name for part in mix.parts for name in names(part)})


def prepared_like(running: Running, head: str) -> Running:
    """The same host with the task of another head."""
    from dataclasses import replace

    from intarsia.cli.running import build_task

    return replace(running, task=build_task(running.host.extract(head), running.host, {}, None))


def inputs(running: Running, table: Table, size: int, *, labelled: bool = False, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Batches of a table as the task reads it: what the model takes, or all of it where `labelled` or `whole`."""
    from intarsia.train.batches import evaluation_batches, moved
    from intarsia.train.task import with_context

    task = running.task
    features = with_context(task, task.features(table, labelled=labelled), table)
    for batch in evaluation_batches(task, features, size):
        here = moved(batch, running.host.model.device)
        yield here if whole or labelled else {key: here[key] for key in task.keys if key in here}


def _write(console: Console, running: Running, router: str, out: Path, facts: Mapping[str, Any], used: Sequence[str]) -> None:
    """The router as a file, its members among what it requires."""
    from dataclasses import replace

    from intarsia.modules import save

    host = running.host
    module = host.extract(router)
    module = replace(module, requires=tuple(sorted(host.extract(name).digest for name in used)))
    module = module.with_card(replace(module.card, recipe={k: v for k, v in facts.items() if v is not None}))
    size = save(module, out)
    payload = {"file": str(out), "digest": module.digest, "name": router, **facts}

    def human() -> None:
        console.line(f"wrote {out}: router {router!r}, {module.n_parameters:,} numbers{f', {size:,} bytes' if isinstance(size, int) else ''}")
        for key, value in facts.items():
            if isinstance(value, float):
                console.line(f"  {key.replace('_', ' ')}: {value:.4f}")
            elif isinstance(value, Mapping):
                console.line("  " + ", ".join(f"{k}: {v:.3f}" for k, v in value.items()))
        console.line(f"Next:  intarsia eval --expr {str(facts['expression'])!r} -m {router}={out} ...")

    console.result(payload, human)
