"""`intarsia convert`: a module of one library as a module of another, with an account of what could not be carried."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.console import Console
from intarsia.cli.options import AllowNetwork
from intarsia.cli.placing import check_free, new_folder
from intarsia.cli.running import ForceBase
from intarsia.cli.verb import verb
from intarsia.errors import ModuleError, UsageError, listing, nearest

if TYPE_CHECKING:
    from intarsia.bases import Base
    from intarsia.modules import Module
    from intarsia.store.convert import Detected, Report

Source = Annotated[Path, typer.Argument(help="A module file, or a folder of peft, AdapterHub or composable-sft.", metavar="SRC")]
Target = Annotated[Path, typer.Argument(help="File (intarsia) or folder (the others) to write; must not exist.", metavar="DST")]
To = Annotated[str, typer.Option("--to", help="intarsia, peft, adapterhub or composable-sft.")]
BaseName = Annotated[str | None, typer.Option("--base", help="The base it is for: a folder, a name of `intarsia bases`, or a hub id; else what SRC names.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the module; else the one it has.")]
TaskType = Annotated[str | None, typer.Option("--task-type", help="For peft: CAUSAL_LM, SEQ_CLS, ...")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Open pickled weights (.bin) in a restricted process.")]

FORMATS = ("intarsia", "peft", "adapterhub", "composable-sft")


def register(app: typer.Typer) -> None:
    verb(app, "convert")(convert)


def convert(
    console: Console,
    source: Source,
    target: Target,
    to: To,
    base: BaseName = None,
    name: Name = None,
    task_type: TaskType = None,
    allow_pickle: Pickle = False,
    force_base: ForceBase = False,
    allow_network: AllowNetwork = False,
) -> None:
    """Read a module in one library's format and write it in another's; says what could not be carried.

    intarsia convert path/to/peft-folder topic.safetensors --to intarsia --base me5-small
    """
    from intarsia import bases
    from intarsia.store.convert import detect

    if to not in FORMATS:
        raise UsageError(f"--to {to!r} is unknown{nearest(to, FORMATS)} known: {listing(FORMATS)}")
    if task_type is not None and to != "peft":
        raise UsageError("--task-type is a field of peft's files; leave it out or write --to peft")
    found = detect(source)
    if found.format == to:
        raise UsageError(f"{source} is in the format {to} already; copy it")
    check_free(target)
    loaded = bases.load(base or named_base(found), allow_network=allow_network)
    module, reports = read(found, loaded, name, allow_pickle=allow_pickle, force_base=force_base)
    if to == "intarsia":
        from intarsia.modules import save

        save(module, target)
    else:
        with new_folder(target) as folder:
            reports.append(write(module, folder, to, loaded, task_type))
    left_out = [what for report in reports for what in report.left_out]
    notes = [what for report in reports for what in report.notes]
    payload: dict[str, Any] = {
        "source": str(source), "from": found.format, "kind": found.kind, "target": str(target), "to": to, "name": module.name,
        "base": loaded.name, "tensors": reports[-1].carried if reports else len(module.tensors), "left_out": left_out, "notes": notes,
    }  # fmt: skip

    def human() -> None:
        console.line(f"wrote {target}: {module.name!r} ({found.kind}) from {found.format} to {to}, {payload['tensors']} tensors")
        for what in left_out:
            console.line(f"  left out: {what}")
        for what in notes:
            console.line(f"  note: {what}")

    console.result(payload, human)


def named_base(found: Detected) -> str:
    """The base that a module names.

    Raises:
        UsageError: it names none.
    """
    from intarsia.modules import read_header
    from intarsia.store.convert.detect import CONFIG, FUSION
    from intarsia.store.convert.folder import read_config

    named: Any = None
    if found.format == "intarsia":
        named = read_header(found.path).card.base
    elif found.format in ("peft", "adapterhub"):
        config = read_config(found.path, FUSION if found.kind == "fusion" else CONFIG)
        named = config.get("base_model_name_or_path") or config.get("model_name")
    if not isinstance(named, str) or not named:
        raise UsageError(f"{found.path} does not name the base it is for; say it with --base")
    return named


def read(found: Detected, loaded: Base, name: str | None, *, allow_pickle: bool, force_base: bool) -> tuple[Module, list[Report]]:
    """The module at a path, and the account of reading it (none for our own format).

    Raises:
        ModuleError: a module of ours belongs to another base.
    """
    from intarsia.modules import load
    from intarsia.sites import fingerprint, resolve
    from intarsia.store.convert import read_adapterhub, read_fusion, read_peft, read_sft

    print_of = fingerprint(loaded.model, loaded.tokenizer)
    if found.format == "intarsia":
        module = load(found.path, name=name)
        differs = print_of.difference(module.base)
        if differs and not force_base:
            raise ModuleError(f"{found.path} belongs to another base than {loaded.name}: {differs}; give the right --base, or --force-base")
        return module, []
    common: dict[str, Any] = {"sites": resolve(loaded.model), "base": print_of, "name": name, "allow_pickle": allow_pickle}
    if found.kind == "fusion":
        module, report = read_fusion(found.path, **common)
    elif found.format == "adapterhub":
        module, report = read_adapterhub(found.path, weights=loaded.model.state_dict(), config=loaded.model.config, **common)
    else:
        if found.format == "peft":
            common["model"] = loaded.model
        reader = read_peft if found.format == "peft" else read_sft
        module, report = reader(found.path, weights=loaded.model.state_dict(), **common)
    return module, [report]


def write(module: Module, folder: Path, to: str, loaded: Base, task_type: str | None) -> Report:
    """Write a module in a peer's format."""
    from intarsia.patches import Router
    from intarsia.sites import resolve
    from intarsia.store.convert import write_adapterhub, write_fusion, write_peft, write_sft

    sites = resolve(loaded.model)
    weights, config = loaded.model.state_dict(), loaded.model.config
    if to == "adapterhub" and any(isinstance(patch.form, Router) for patch in module.method.patches):
        return write_fusion(module, folder, sites=sites, model_type=config.model_type)
    if to == "adapterhub":
        return write_adapterhub(module, folder, sites=sites, model_type=config.model_type, weights=weights, config=config)
    if to == "peft":
        return write_peft(module, folder, sites=sites, weights=weights, model=loaded.model, task_type=task_type, base_name=module.card.base or loaded.name)
    return write_sft(module, folder, sites=sites, weights=weights)
