"""`intarsia methods`: the table of all methods, and one method in full.  Everything is read from `METHODS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork, ModelConfig, Settings
from intarsia.cli.verb import verb

if TYPE_CHECKING:
    from intarsia.cli.counting import Counter
    from intarsia.methods import Row

Name = Annotated[str | None, typer.Argument(help="A method; all of them if left out.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a page of the documentation.")]
OnBase = Annotated[str | None, typer.Option("--base", help="Count on this model: a folder, or a name of `intarsia bases`.")]


def register(app: typer.Typer) -> None:
    verb(app, "methods")(methods)


def methods(
    console: Console,
    name: Name = None,
    base: OnBase = None,
    config: ModelConfig = None,
    set_: Settings = None,
    allow_network: AllowNetwork = False,
    markdown: Markdown = False,
) -> None:
    """The methods: where each changes the model, in what form, and what it trains.

    Counts are exact and need no weights; without --base or --config they are those of BERT-base's shape.
    """
    from intarsia.cli.counting import counter
    from intarsia.methods import METHODS

    if name is None:
        count = counter(base, config, allow_network=allow_network)
        rows = [describe(row, count, {}) for row in METHODS.values()]
        show = _page if markdown else _all
        console.result({"base": count.name, "parameters": count.total, "methods": rows}, lambda: show(console, rows, count))
        return
    from intarsia.cli.options import parse_settings

    row = METHODS[name]
    settings = parse_settings(set_, row)
    count = counter(base, config, allow_network=allow_network)
    described = describe(row, count, settings)
    console.result({"base": count.name, "parameters": count.total, **described}, lambda: _one(console, row, described, count))


def describe(row: Row, count: Counter, settings: dict[str, Any]) -> dict[str, Any]:
    """All that is known of a method, as plain values."""
    from intarsia._codec import encode
    from intarsia.cli.axes import method_cells
    from intarsia.cli.facts import facts

    method = row.build(**settings)
    where, form, op = method_cells(method)
    trainable, reason = count(method)
    known = facts(method)
    return {
        "name": row.name,
        "summary": row.summary,
        "where": where,
        "form": form,
        "op": op,
        "trains": list(known.trains),
        "ties": list(known.ties),
        "why_not_foldable": known.why_not_foldable,
        "combines": known.combines,
        "trainable": trainable,
        "share": None if trainable is None else trainable / count.total,
        "refused": reason,
        "equation": row.equation,
        "source": row.source,
        "settings": {**row.defaults, **settings},
        "defaults": row.defaults,
        "specification": encode(method),
    }


def _all(console: Console, rows: list[dict[str, Any]], count: Counter) -> None:
    console.table(
        ["method", "where", "form", "op", "ties", "folds", "trainable", "%", "source"],
        [[r["name"], r["where"], r["form"], r["op"], few(r["ties"]), folds(r), *amount(r), r["source"]] for r in rows],
    )
    refusals(console, rows)
    console.line()
    console.line(f"Counts: {count.name}, {count.total:,} parameters; without a head, which adds {count.head_text}.")
    console.line("Next:   intarsia methods NAME --base MODEL      intarsia train --method NAME --set KEY=VALUE ...")


def _page(console: Console, rows: list[dict[str, Any]], count: Counter) -> None:
    """The table and a paragraph per method, as `docs/methods.md` has them."""
    from intarsia.cli.axes import settings_text
    from intarsia.demo.pages import page_table

    console.line("# Methods\n")
    console.line("This page is generated: `intarsia methods --markdown > docs/methods.md`.\n")
    console.line(
        "A method is a row of data: at *sites* of the model (`intarsia inspect MODEL` lists them) a *form* computes a value from the "
        f"module's tensors, and an *op* lets it in. Counts are exact, for {count.name} ({count.total:,} parameters), without a head, which "
        f"adds {count.head_text}.\n"
    )
    head = ["method", "where", "form", "op", "ties", "folds", "combines by", "trainable", "%"]
    cells = [[f"`{r['name']}`", f"`{r['where']}`", f"`{r['form']}`", f"`{r['op']}`", few(r["ties"]), folds(r), r["combines"], *amount(r)] for r in rows]
    console.line(page_table(head, cells))
    for r in rows:
        console.line(f"\n## {r['name']}\n\n{r['summary']}\n\n- equation: `{r['equation']}`\n- source: {r['source']}")
        console.line(f"- trains: {', '.join(r['trains']) or 'its head only'}" + (f"; shared by all sites: {', '.join(r['ties'])}" if r["ties"] else ""))
        console.line(f"- folds into the base: {'yes' if r['why_not_foldable'] is None else 'no, ' + r['why_not_foldable']}")
        console.line(f"- settings (`--set KEY=VALUE`): {'`' + settings_text(r['defaults']) + '`' if r['defaults'] else 'none'}")


def _one(console: Console, row: Row, described: dict[str, Any], count: Counter) -> None:
    from intarsia.cli.axes import patch_rows, settings_text

    method = row.build(**described["settings"])
    console.line(f"{row.name}: {row.summary}")
    console.line(f"  equation   {row.equation}")
    console.line(f"  source     {row.source}")
    console.line(f"  settings   {settings_text(described['settings']) or 'none'}")
    console.line(f"  training   learning rate {method.policy.learning_rate:g}, weight decay {method.policy.decay:g}")
    console.line(f"  trains     {', '.join(described['trains']) or 'its head only'}")
    if described["ties"]:
        console.line(f"  ties       {', '.join(described['ties'])}")
    console.line(f"  folds      {'yes' if described['why_not_foldable'] is None else 'no: ' + described['why_not_foldable']}")
    console.line(f"  combines   {described['combines']}")
    if described["refused"]:
        console.line(f"  trainable  not on {count.name}: {described['refused']}")
    else:
        number, share = amount(described)
        console.line(f"  trainable  {number:,} of {count.total:,} ({share} %) on {count.name}; a head adds {count.head_text}")
    rows = list(patch_rows(method))
    if rows:
        console.heading("It changes the model at")
        console.table(["where", "form", "op"], rows)


def few(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")


def folds(described: dict[str, Any]) -> str:
    """Whether a method's modules can become part of the base."""
    return "yes" if described["why_not_foldable"] is None else "no"


def amount(described: dict[str, Any]) -> tuple[int | None, str]:
    """Trainable parameters and their per cent of the base."""
    number = described["trainable"]
    return number, "-" if number is None else f"{100 * described['share']:.3f}"


def refusals(console: Console, rows: list[dict[str, Any]]) -> None:
    """Why methods without a count cannot be had on this model."""
    refused = [r for r in rows if r["refused"]]
    if refused:
        console.line()
    for row in refused:
        console.line(f"{row['name']}: {row['refused']}")
