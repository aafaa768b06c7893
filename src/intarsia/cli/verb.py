"""`verb`: registers a function as a command and gives it the options that every command has.

A verb's first argument is the `Console` that these options describe; the others are typer parameters.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from intarsia.cli.console import Console

_COMMON = {
    "json": Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
}


class ReaderGone(BaseException):
    """Whoever read standard output has seen enough (`| head`); no error, but typer would make one of BrokenPipeError."""


def verb(app: typer.Typer, name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(console, ...)` as the command `name` of `app`.

    Args:
        options: further arguments of `typer.Typer.command`.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            try:
                function(Console(**{key: given.pop(key) for key in _COMMON}), **given)
                sys.stdout.flush()
            except BrokenPipeError:
                raise ReaderGone from None

        signature = inspect.signature(function, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
        shared = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in _COMMON.items()]
        parameters = [*own, *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = inspect.getdoc(function)
        app.command(name, **options)(run)
        return function

    return add
