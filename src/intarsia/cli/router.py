"""`intarsia router`: routers that are computed or searched instead of trained, test-time mixtures, and reports.

Routers that are trained come from `intarsia train --method ROUTER`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from intarsia.cli.running import (
    BaseName,
    BatchSize,
    ForceBase,
    HeadOf,
    Modules,
    Running,
    defaults,
    inserted,
    module_files,
    start,
)
from intarsia.cli.verb import verb
from intarsia.errors import UsageError, listing, nearest

if TYPE_CHECKING:
    from intarsia.compose import Expr, Mix
    from intarsia.data import Table
    from intarsia.host import Host
    from intarsia.tasks import BaseTask

Mixture = Annotated[str, typer.Option("--expr", help="An expression with the mixture, e.g. 'fuse(a, b; router=r) >> ner'.")]
RouterName = Annotated[str | None, typer.Option("--name", help="The router in the expression; may be left out where there is one.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File for the router.")]
Steps = Annotated[int, typer.Option("--steps", help="How often the examples are asked.", min=1)]
MemberData = Annotated[list[str] | None, typer.Option("--data", metavar="MEMBER=FILE", help="Examples of a member's task or domain; answers are not read.")]
MemberGate = Annotated[list[str] | None, typer.Option("--gate", metavar="MEMBER=MODULE", help="The gate that was trained for a member.")]
COMPUTED = ("arrow", "phatgoose", "gaussians", "centroids", "fixed", "soup")
WANTS = {"gaussians": "--data", "centroids": "--data", "phatgoose": "--gate"}
"""What is given for every member, by kind; the others look at the members alone."""


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
    from intarsia.host import prototypes
    from intarsia.methods import ROUTERS

    if kind not in COMPUTED:
        raise UsageError(f"`router make` computes {listing(COMPUTED)}, not {kind!r}{nearest(kind, COMPUTED)}; others are trained: intarsia train --method {kind}")
    settings = parse_settings(set_, ROUTERS[kind])
    mixed = mixture(expr, name, module, base, new=True, needs_task=WANTS.get(kind) == "--data", allow_network=allow_network, force_base=force_base)
    host, router, members = mixed.host, mixed.router, [str(part) for part in mixed.mix.parts]
    given = per_member(kind, members, {"--data": data, "--gate": gate})
    if WANTS.get(kind) == "--data":
        batches = {m: mixed.inputs(mixed.table(given[m], format, columns), batch_size or 32) for m in members}
        getattr(prototypes, kind)(host, router, batches, **settings)
    elif kind == "phatgoose":
        prototypes.phatgoose(host, router, {m: given[m] for m in members}, **settings)
    elif kind == "arrow":
        prototypes.arrow(host, router, members, **settings)
    else:
        host.router(router, kind, members, **settings)
    headed = [ref.name for ref in mixed.expression.refs() if host.labels(ref.name) is not None]
    host.call(mixed.expression, head=headed[-1] if headed else None)  # refused now rather than by whoever uses it
    mixed.write(console, out, {"kind": kind, "members": members})


def per_member(kind: str, members: Sequence[str], given: Mapping[str, Sequence[str] | None]) -> dict[str, str]:
    """What a kind of router wants for every member, by member.

    Raises:
        UsageError: it is missing for a member or given for another name, or the kind has no use for what is given.
    """
    wants = WANTS.get(kind)
    for option, pairs in given.items():
        if pairs and option != wants:
            raise UsageError(f"{kind} has no use for {option}" + (f"; it wants {wants} MEMBER=..." if wants else ": it looks at the members alone"))
    found = parse_pairs(given[wants], wants) if wants else {}
    if wants and set(found) != set(members):
        raise UsageError(f"{kind} wants {wants} MEMBER=... for each of {listing(members)}, found {listing(found) or 'none'}")
    return found


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
    from intarsia.host import adapting

    mixed = mixture(expr, name, module, base, new=True, head=head, task_set=task_set, allow_network=allow_network, force_base=force_base)
    mixed.add_soup(set_, scope="shared", start=0.0)
    batches = mixed.batches(mixed.table(data, format, columns), batch_size or 16, labelled=True)
    score = few_loss(mixed.running, mixed.expression, head, batches)
    before = score()
    best = adapting.search(mixed.host, mixed.router, score, steps=steps, bound=bound, l1=l1, seed=seed)
    tables = adapting.tables(mixed.host, mixed.router)
    whole = len(tables) == 1 and tables[0].dim() == 1  # one number per member, which can be told in a line
    weights = dict(zip(map(str, mixed.mix.parts), tables[0].tolist())) if whole else None
    mixed.write(console, out, {"kind": "search", "loss_before": before, "best": best, "weights": weights, "steps": steps, "seed": seed})


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
    from intarsia.host import adapting

    files = parse_pairs(data, "HEAD=FILE")
    first = next(iter(files))
    mixed = mixture(expr, name, module, base, new=True, head=first, allow_network=allow_network, force_base=force_base)
    mixed.add_soup(set_, squash="clamp", scope="site", start=0.3)
    tasks = []
    for head, file in files.items():
        mine = mixed if head == first else mixed.of_head(head)
        tasks.append((mixed.expression, head, mine.inputs(mine.table(file, format, columns), batch_size or 16)))
    losses = adapting.least_entropy(mixed.host, mixed.router, tasks, steps=steps, rate=rate)
    note = "transductive: it has seen the inputs of these files"
    mixed.write(console, out, {"kind": "adapt", "entropy_before": losses[0], "entropy": losses[-1], "steps": steps, "note": note})


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
    from intarsia.host.adapting import Emea
    from intarsia.train.task import context_of

    mixed = mixture(expr, name, module, base, new=True, head=head, task_set=task_set, allow_network=allow_network, force_base=force_base)
    mixed.add_soup(set_, squash="softmax", start=0.5)
    task, table = mixed.task, mixed.table(data, format, columns)
    batches = mixed.batches(table, batch_size)
    found: dict[str, Any] = {}
    for what, count in (("ensemble", 0), ("emea", steps)):
        predictions, first, last = [], 0.0, 0.0
        for batch in batches:
            answer = Emea(mixed.host, mixed.router, mixed.expression, rate, count, head, context_of(task, batch))
            output, seen = answer.answered(mixed.model_inputs(batch))
            predictions += task.predict(output, batch)
            first, last = first + seen[0] / len(batches), last + seen[-1] / len(batches)
        scores = task.score(task.finish(predictions, table), table)
        found[what] = {"metrics": {n: {"value": s.value, "low": s.low, "high": s.high, "n": s.size} for n, s in scores.items()}, "entropy_before": first, "entropy": last}
    payload = {**mixed.facts, "steps": steps, "rate": rate, "batch_size": batch_size, **found}

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
    from intarsia.host import report as reports
    from intarsia.train.task import context_of

    mixed = mixture(expr, name, module, base, new=False, head=head, task_set=task_set, allow_network=allow_network, force_base=force_base)
    table = mixed.table(data, format, columns)
    for column in by or ():
        if column not in table.names:
            raise UsageError(f"--by {column}: the data have no such column{nearest(column, table.names)}; they have {listing(table.names)}")
    batches = mixed.batches(table, batch_size or 32)
    rows = [row for batch in batches for row in batch["row"]]
    metadata = {column: [str(table[column][row]) for row in rows] for column in by or ()}
    told = [context_of(mixed.task, batch) for batch in batches]
    context = {key: [value for here in told for value in here[key]] for key in (told[0] if told else ())}
    given = [mixed.model_inputs(batch) for batch in batches]
    found = reports.report(mixed.host, mixed.router, mixed.expression, given, by=metadata, context=context, head=head)
    if picture is not None:
        from intarsia.modules import write_atomic

        drawn = reports.picture(found, str(mixed.mix))
        write_atomic(picture, [drawn], len(drawn))

    def human() -> None:
        for line in found.lines():
            console.line(line)

    console.result({**mixed.facts, "router": mixed.router, **found.to_dict()}, human)


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


@dataclass(frozen=True)
class Mixed:
    """The mixture that a verb is about, and a host with the modules that it names."""

    expression: Expr
    mix: Mix
    running: Running

    @property
    def router(self) -> str:
        return str(self.mix.router)

    @property
    def host(self) -> Host:
        return self.running.host

    @property
    def task(self) -> BaseTask[Any]:
        return self.running.task

    @property
    def facts(self) -> dict[str, Any]:
        """What every answer says of itself."""
        forced = dict(self.running.forced)
        return {"expression": str(self.expression), **({"forced_base": forced} if forced else {})}

    def of_head(self, head: str) -> Mixed:
        """The same with the task of another head."""
        from dataclasses import replace

        from intarsia.cli.running import build_task

        task = build_task(self.host.extract(head), self.host, {}, None)
        return replace(self, running=replace(self.running, task=task))

    def add_soup(self, pairs: Sequence[str] | None, **settings: Any) -> None:
        """Put the router on the host: a number per member, with `--set` before the verb's own settings."""
        from intarsia.methods import ROUTERS

        self.host.router(self.router, "soup", list(self.mix.parts), **{**settings, **parse_settings(pairs, ROUTERS["soup"])})

    def table(self, file: str, format: str | None, columns: str | None) -> Table:
        """A file of examples."""
        return read_table(file, format, reading(columns, None, None, None, None))

    def batches(self, table: Table, size: int, *, labelled: bool = False) -> list[dict[str, Any]]:
        """A table as the task reads it, on the model's device; rows that are cut are told."""
        from intarsia.train.batches import evaluation_batches, moved
        from intarsia.train.task import with_context

        features = with_context(self.task, self.task.features(table, labelled=labelled), table)
        for what, count in self.task.counts.items():
            if what.startswith("truncated") and count:
                Console().warn(f"{count:,} {what.replace('_', ' ')}: longer than the model reads")
        return [moved(batch, self.host.model.device) for batch in evaluation_batches(self.task, features, size)]

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch."""
        return {key: batch[key] for key in self.task.keys if key in batch}

    def inputs(self, table: Table, size: int) -> list[dict[str, Any]]:
        """What the model takes of the rows of a table."""
        return [self.model_inputs(batch) for batch in self.batches(table, size)]

    def write(self, console: Console, out: Path, found: Mapping[str, Any]) -> None:
        """The router as a file, its members among what it requires."""
        from dataclasses import replace

        from intarsia.compose import names
        from intarsia.modules import save

        facts = {k: v for k, v in {**found, **self.facts}.items() if v is not None}
        module = self.host.extract(self.router)
        members = {name for part in self.mix.parts for name in names(part)}
        module = replace(module, requires=tuple(sorted(self.host.extract(name).digest for name in members)))
        module = module.with_card(replace(module.card, recipe=facts))
        digest = save(module, out)
        payload = {"file": str(out), "digest": digest, "name": self.router, **facts}

        def human() -> None:
            console.line(f"wrote {out}: router {self.router!r}, {module.n_parameters:,} numbers")
            for key, value in facts.items():
                if isinstance(value, float):
                    console.line(f"  {key.replace('_', ' ')}: {value:.4f}")
                elif key == "weights":
                    console.line("  " + ", ".join(f"{k}: {v:.3f}" for k, v in value.items()))
            console.line(f"Next:  intarsia eval --expr {str(self.expression)!r} -m {self.router}={out} ...")

        console.result(payload, human)


def mixture(
    text: str, name: str | None, module: Sequence[str] | None, base: str | None, *, new: bool, head: str | None = None,
    task_set: Sequence[str] | None = None, needs_task: bool = True, allow_network: bool, force_base: bool,
) -> Mixed:  # fmt: skip
    """The mixture of an expression, on a host with the modules and, if it is needed, the task that they are for.

    Args:
        name: of the router, where there are several.
        new: the router is made by the verb, so no file has it.
    """
    from intarsia.compose import Seq
    from intarsia.compose import expr as parse
    from intarsia.train.config import PredictConfig, load_config

    parsed = parse(text)
    mix = the_mixture(parsed, name)
    router = str(mix.router)
    files = module_files(module)
    if new and router in files:
        raise UsageError(f"{router!r} is the router that is made here, and --module gives one of that name; call the new one differently")
    stand_in = str(Seq(tuple(dict.fromkeys(ref for ref in parsed.refs() if ref.name != router)))) if new else str(parsed)
    values = {"modules": files or None, "base": base, "expression": stand_in, "head": head}
    chosen = load_config(PredictConfig, None, defaults({k: v for k, v in values.items() if v is not None}, {}))
    if needs_task:
        return Mixed(parsed, mix, start(chosen, task_set, allow_network=allow_network, force_base=force_base, checked=not new))
    from intarsia import bases
    from intarsia.cli.sources import read_modules
    from intarsia.host import Host

    loaded = bases.load(chosen.base, allow_network=allow_network)
    host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
    forced = inserted(host, read_modules(chosen.modules), force_base=force_base)
    return Mixed(parsed, mix, Running(host, stand_in, head, None, forced))  # type: ignore[arg-type]  # nobody asks for a task
