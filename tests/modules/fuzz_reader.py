"""A fuzz target over the reader of module files: no crash, no hang, no allocation over the limit, only errors of ours.

`one_input` is what is run for every input; hypothesis runs it in `test_reader_fuzz.py`.  With atheris (coverage-guided, not a
dependency: `pip install atheris`) it runs for as long as told, from the repository's root:

    python -m tests.modules.fuzz_reader -max_total_time=60 -timeout=5 -rss_limit_mb=1500
"""

from __future__ import annotations

import sys
from types import FunctionType

from intarsia.errors import IntarsiaError
from intarsia.modules import dumps, loads
from tests.modules.make import container, module, sparse

#: sound files of both versions, the start of everything
SEEDS = (dumps(module()), dumps(module(tensors=sparse()), dtype="int8"))


def edited(data: bytes) -> bytes:
    """A sound file with pieces replaced: of each four bytes of `data` three say where and one what."""
    text = bytearray(SEEDS[data[0] % 2] if data else b"")
    for i in range(1, len(data) - 3, 4):
        text[int.from_bytes(data[i : i + 3], "little") % len(text)] = data[i + 3]
    return bytes(text)


def headed(data: bytes) -> bytes:
    """A container whose length fits, so that what follows is read as a header; a zero byte ends it."""
    header, _, rest = data.partition(b"\0")
    return container(header, rest)


def one_input(data: bytes) -> None:
    """Read an input in three ways; what is read must be written as the same module."""
    for file in (data, edited(data), headed(data)):
        try:
            found = loads(file)
        except IntarsiaError as error:
            assert str(error)
        else:
            assert loads(dumps(found)).digest == found.digest


def main() -> int:
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris (the same target runs under hypothesis: pytest tests/modules/test_reader_fuzz.py)", file=sys.stderr)
        return 1
    for name, part in list(sys.modules.items()):  # the reader only: instrumenting torch would take minutes
        if name.startswith(("intarsia.modules", "intarsia._codec")):
            for function in vars(part).values():
                if isinstance(function, FunctionType) and function.__module__ == name:
                    atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
