"""The app: all verbs by name, in the order in which a newcomer meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from intarsia.cli import (
    bases,
    bench,
    card,
    convert,
    corpus,
    data,
    demo,
    evaluate,
    explain,
    inspect,
    lang,
    merge,
    methods,
    module,
    predict,
    router,
    store,
    train,
    transfer,
    vocab,
)

EPILOG = "Errors: one line on standard error; exit codes 1 failed, 2 usage, 3 data, 4 model or module, 5 file. Offline unless told otherwise."

app = typer.Typer(
    help="Train small modules on a frozen transformer, keep them as files, lay them together.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"intarsia {version('intarsia')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _room in (demo, data, inspect, methods, train, evaluate, predict, explain, router, module, card, store, corpus, lang, vocab, transfer, merge, convert, bases, bench):
    _room.register(app)
