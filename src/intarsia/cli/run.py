"""`main`: runs the app and turns whatever happens into an exit code and, for an error, one line on standard error.

    0 ok   1 failed   2 usage   3 data   4 module, base or site   5 reading or writing   130, 143 signals
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import typer

from intarsia.cli.console import is_utf8
from intarsia.cli.verb import ReaderGone
from intarsia.errors import IntarsiaError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
BUG = 1

#: click's UsageError, which typer raises but does not export
_USAGE: Any = typer.BadParameter.__base__

#: Set where the user has not: libraries speak up only when something is wrong and never call home, and threads that wait
#: for each other sleep instead of spinning (where other programs run too, spinning made training five times slower).
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words behind the program's name; by default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream)
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(words)
    except IntarsiaError as error:
        return _fail(one_line(str(error)), error.exit_code, debug)
    except _USAGE as error:
        return _fail(f"{one_line(error.format_message())}{_where_help(error)}", 2, debug)
    except ReaderGone:
        _silence(sys.stdout)
        return 0
    except OSError as error:
        return _fail(one_line(_os_error(error)), 5, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, False)
    except Terminated:
        return _fail("terminated", TERMINATED, False)
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}")
        return _fail(f"{what} (this is a bug; run again with --debug and report what it prints)", BUG, debug)


def _run(words: list[str]) -> int:
    from intarsia.cli.app import app

    command = typer.main.get_command(app)
    code = command.main(words, prog_name="intarsia", standalone_mode=False)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def one_line(text: str) -> str:
    """The text with every run of white space and control characters as one blank."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None) -> None:
    """A warning of the library as one line."""
    sys.stderr.write(f"warning: {one_line(str(message))}\n")


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    return code


def _where_help(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f" (see: {context.command_path} --help)" if context is not None else ""


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _tolerate(stream: TextIO) -> None:
    """A stream that cannot hold a character shows its code point instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and not is_utf8(stream):
        reconfigure(errors="backslashreplace")


def _silence(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter does not fail on it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a verb like Ctrl-C does: through `finally` blocks, with its own exit code."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
