"""`intarsia inspect MODEL`: where a model can be changed, and what every method would train on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork, ModelConfig
from intarsia.cli.verb import verb
from intarsia.errors import UsageError

if TYPE_CHECKING:
    from intarsia.host import Host
    from intarsia.sites import Site, SiteMap

Model = Annotated[str | None, typer.Argument(help="A folder, a name of `intarsia bases`, or a hub id.", metavar="MODEL")]
AllSites = Annotated[bool, typer.Option("--sites", help="List every site.")]

#: what a sub-layer's norm does, per order of the anatomy
ORDERS = {
    "post": "post-norm (norm on h + residual)",
    "pre": "pre-norm (norm on what the sub-layer reads)",
    "sandwich": "sandwich (norms on both sides of the sub-layer)",
    "out": "output norm (norm on what the sub-layer writes)",
}


def register(app: typer.Typer) -> None:
    verb(app, "inspect")(inspect)


def inspect(
    console: Console, model: Model = None, config: ModelConfig = None, sites: AllSites = False, allow_network: AllowNetwork = False
) -> None:
    """Show a model's sites, shapes, layers and norms, its fingerprint, and what each method would train on it."""
    if (model is None) == (config is None):
        raise UsageError("say which model: intarsia inspect MODEL, or intarsia inspect --config path/to/config.json")
    from intarsia.cli.counting import counter
    from intarsia.methods import METHODS

    count = counter(model, config, allow_network=allow_network)
    host = count.host
    facts = overview(host, count.name, count.total)
    if model is not None:
        facts["fingerprint"] = host.fingerprint.to_dict()
        facts |= {"source": count.source, "licence": count.licence, "notes": list(count.notes)}
    counts: list[dict[str, Any]] = []
    for row in METHODS.values():
        number, reason = count(row.build())
        share = None if number is None else number / count.total
        counts.append({"name": row.name, "trainable": number, "share": share, "refused": reason, "settings": row.defaults})
    payload = {**facts, "roles": [role.to_dict() for role in roles(host.sites)], "methods": counts}
    if sites:
        payload["sites"] = [site_dict(site) for site in host.sites.values()]

    def human() -> None:
        _facts(console, facts)
        _roles(console, roles(host.sites))
        if sites:
            _sites(console, host.sites)
        _counts(console, counts, count.head_text)

    console.result(payload, human)


def overview(host: Host, name: str, parameters: int) -> dict[str, Any]:
    """Class, layers, order of norms and what the model lacks."""
    from intarsia.sites import anatomy_of

    anatomy = anatomy_of(host.model)
    return {
        "model": name,
        "class": type(host.model).__name__,
        "model_type": str(host.model.config.model_type),
        "parameters": parameters,
        "layers": dict(host.sites.layers),
        "norms": {stack: anatomy.stacks[stack].order for stack in host.sites.layers},
        "parallel": {stack: anatomy.stacks[stack].parallel for stack in host.sites.layers},
        "attention": str(host.model.config._attn_implementation),
        "missing": dict(host.sites.missing),
    }


@dataclass(slots=True)
class Role:
    """The sites of all layers that play one role."""

    name: str
    port: str
    shapes: dict[str, None] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "role": self.name,
            "port": self.port,
            "shapes": list(self.shapes),
            "layers": self.layers,
            "count": len(self.paths),
            "path": self.paths[0],
            "notes": list(self.notes),
        }


def roles(sites: SiteMap) -> list[Role]:
    """Sites by role: the name without the number of the block."""
    found: dict[tuple[str, str], Role] = {}
    for site in sites.values():
        name = ".".join("N" if site.layer is not None and word == str(site.layer) else word for word in site.name.split("."))
        role = found.setdefault((name, site.port), Role(name, site.port))
        role.shapes[shape_text(site)] = None
        role.paths.append(site.path)
        if site.layer is not None:
            role.layers.append(site.layer)
        for note in notes(site):
            role.notes[note] = None
    return list(found.values())


def shape_text(site: Site) -> str:
    """Width of an activation, shape of a parameter, heads of a memory."""
    if site.port == "weight":
        stored = " x ".join(map(str, site.shape))
        return f"{stored} (in x out)" if site.transposed and len(site.shape) == 2 else stored
    if site.port == "mem" and site.heads:
        return f"{site.heads[0]} heads x {site.heads[1]}"
    return str(site.features) if site.features else "-"


def notes(site: Site) -> list[str]:
    """What is special about a site."""
    found = []
    if site.view is not None:
        found.append(f"part of a fused projection ({site.view.features} features)")
    if len(site.owners) > 1:
        found.append(f"tied to {', '.join(f'{path}.{name}'.strip('.') for path, name in site.owners[1:])}")
    return found


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def site_dict(site: Site) -> dict[str, Any]:
    """A site as plain values."""
    return {"name": site.name, "port": site.port, "path": site.path, "shape": shape_text(site), "layer": site.layer, "stack": site.stack,
            "notes": notes(site)}  # fmt: skip


def _facts(console: Console, facts: Mapping[str, Any]) -> None:
    console.line(f"{facts['model']}: {facts['class']} ({facts['model_type']}), {facts['parameters']:,} parameters")
    for stack, count in facts["layers"].items():
        beside = ", attention and FFN side by side" if facts["parallel"][stack] else ""
        console.line(f"  {(stack or 'layers') + ':':<13}{count} blocks, {ORDERS[facts['norms'][stack]]}{beside}")
    console.line(f"  attention:   {facts['attention']}")
    if "fingerprint" in facts:
        mark = facts["fingerprint"]
        console.line(f"  fingerprint: weights {mark['weights']}, shapes {mark['shapes']}, tokenizer {mark['tokenizer']}")
        console.line(f"  source:      {facts['source']}, licence {facts['licence']}")
    for note in facts.get("notes", ()):
        console.line(f"  note:        {note}")
    for family, reason in facts["missing"].items():
        console.line(f"  no {family}: {reason}")


def _roles(console: Console, found: list[Role]) -> None:
    console.heading("Sites by role (N is the number of a block)")
    console.table(
        ["role", "port", "shape", "layers", "sites", "path of the first", "notes"],
        [[r.name, r.port, " | ".join(r.shapes), ranges(r.layers) or "-", len(r.paths), r.paths[0] or "(the model)", "; ".join(r.notes)] for r in found],
    )


def _sites(console: Console, sites: SiteMap) -> None:
    console.heading(f"All {len(sites)} sites")
    console.table(["site", "port", "shape", "path"], [[s.name, s.port, shape_text(s), s.path or "(the model)"] for s in sites.values()])


def _counts(console: Console, counts: list[dict[str, Any]], head_text: str) -> None:
    from intarsia.cli.axes import settings_text
    from intarsia.cli.methods import amount, refusals

    console.heading(f"What each method would train, without a head, which adds {head_text}")
    console.table(["method", "trainable", "%", "settings"], [[c["name"], *amount(c), settings_text(c["settings"])] for c in counts])
    refusals(console, counts)

