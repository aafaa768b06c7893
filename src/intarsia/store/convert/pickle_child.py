"""The program that opens one pickle: run by `pickled.py` in a process of its own, never imported by the library.

The file is its input, the job (JSON: `target`, `bytes` of all tensors, `seconds`, `numpy`) its argument.  Writes a safetensors
file with the tensors under numbers; their names, which may be nested, stand in its metadata.  One line of JSON on its output
says what went wrong.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # the folder of this file: nothing is imported from it

import contextlib
import json
from typing import Any

MARGIN = 512 << 20
DEPTH = 4


def limit(seconds: int, size: int) -> None:
    """No more processor time, files, processes and, once torch is there, memory than the job needs (where the system has limits)."""
    try:
        import resource
    except ImportError:  # Windows: only the time limit of the parent
        return
    hard = {"RLIMIT_CPU": seconds, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": size + MARGIN, "RLIMIT_NPROC": 0}
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        hard["RLIMIT_AS"] = used + 3 * size + MARGIN
    for name, value in hard.items():
        if hasattr(resource, name):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (value, value))


def numpy_names() -> list[Any]:
    """What a numpy integer in a pickle needs, under its names of numpy 1 and 2."""
    import numpy

    scalar = numpy.array(0, numpy.int64)[()].__reduce__()[0]
    return [numpy.dtype, type(numpy.dtype("int64")), (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def flat(value: Any, path: tuple[str, ...], found: dict[tuple[str, ...], Any]) -> None:
    """Tensors, sizes and lists of integers in nested dictionaries, by path; anything else is an error."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise ValueError(f"{'/'.join(path)}: a tensor of layout {value.layout}")
        found[path] = value
    elif isinstance(value, dict) and len(path) < DEPTH:
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{'/'.join(path)}: a key that is no string")
            flat(inner, (*path, key), found)
    elif isinstance(value, (list, tuple)):
        found[path] = torch.tensor([int(v) for v in value], dtype=torch.int64)
    else:
        raise ValueError(f"{'/'.join(path)}: a {type(value).__name__}, where a tensor is expected")


def main() -> None:
    """One job."""
    job = json.loads(sys.argv[1])
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    names = numpy_names() if job["numpy"] else []
    limit(job["seconds"], job["bytes"])
    with torch.serialization.safe_globals(names):
        value = torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True)
    found: dict[tuple[str, ...], Any] = {}
    flat(value, (), found)
    total = sum(t.numel() * t.element_size() for t in found.values())
    if total > job["bytes"]:
        raise ValueError(f"its tensors would have {total:,} bytes, more than the {job['bytes']:,} allowed for a file of this size")
    tensors = {str(i): t.detach().contiguous().clone() for i, t in enumerate(found.values())}
    save_file(tensors, job["target"], metadata={"names": json.dumps([list(path) for path in found])})


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:  # whatever a file provokes is told, and the process ends
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}))
        sys.exit(1)
