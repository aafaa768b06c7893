"""`read_sft`, `write_sft`: sparse fine-tuning as composable-sft stores it (Ansell et al. 2022, arXiv 2110.07560).

`pytorch_diff.bin` is a pickle of {"diffs": {parameter: {"size", "index_steps", "values"}}, "abs": {parameter: tensor}}: steps
between the sorted flat indices of what changes, first dimension fastest, and new values of whole parameters (heads).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from intarsia.errors import ModuleError, StoreError, listing
from intarsia.modules.card import Card
from intarsia.modules.module import Module
from intarsia.patches import Add, Dense, Matrix, Sparse
from intarsia.patches.matrix import canonical_shape
from intarsia.sites.address import Site, SiteMap
from intarsia.sites.fingerprint import Fingerprint
from intarsia.store.convert.detect import DIFF
from intarsia.store.convert.folder import as_float, checked, sound, write_folder
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.pickled import read_pickled
from intarsia.store.convert.pieces import Piece, check_alone, sparse_leaves, together
from intarsia.store.convert.report import Report, beside
from intarsia.store.convert.values import base_value, change_at, value_at

KIND = "sparse difference"


@dataclass
class _Reading:
    paths: Paths
    weights: Mapping[str, Tensor] | None
    pieces: list[Piece] = field(default_factory=list)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    changed: int = 0
    entries: int = 0
    touched: int = 0
    carried: int = 0


def read_sft(
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base: Fingerprint,
    name: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    allow_pickle: bool = False,
) -> tuple[Module, Report]:
    """Read `pytorch_diff.bin`.

    Args:
        sites: of the model it is for, `resolve(model)`.
        base: fingerprint of that model; the file does not say which it belongs to.
        name: of the module; None for the folder's name.
        weights: `model.state_dict()`, for heads: their new values are stored, and a module holds changes.
        allow_pickle: must be given, there is no other form; the file is opened in a restricted process (with a warning).

    Raises:
        StoreError: the file is missing, or opening it is not allowed.
        ModuleError: it is damaged, or the model lacks a parameter of the differences.
    """
    path = Path(folder) / DIFF
    if not path.is_file():
        raise StoreError(f"{folder} has no {DIFF}")
    if not allow_pickle:
        raise StoreError(f"{path} is a pickle; opening one can run code, so it is not read. Give allow_pickle=True to open it in a process of its own that builds tensors only")
    with sound(os.fspath(folder)):
        return _read(path, sites, base, name, weights)


def _read(path: Path, sites: SiteMap, base: Fingerprint, name: str | None, weights: Mapping[str, Tensor] | None) -> tuple[Module, Report]:
    found = read_pickled(path, numpy=True)
    checked({"/".join(key): tensor for key, tensor in found.items()}, path)
    diffs: dict[str, dict[str, Tensor]] = {}
    absolute: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if len(key) == 3 and key[0] == "diffs" and key[2] in ("size", "index_steps", "values"):
            diffs.setdefault(key[1], {})[key[2]] = tensor
        elif len(key) == 2 and key[0] == "abs":
            absolute[key[1]] = as_float(tensor)
        else:
            raise ModuleError(f"{path}: an entry {'/'.join(key)[:80]!r} that composable-sft does not have")
    reading = _Reading(Paths(sites, [*diffs, *absolute]), weights)
    unknown = [param for param in diffs if reading.paths.split(param) is None]
    if unknown:
        raise ModuleError(f"{path}: {len(unknown)} of {len(diffs)} parameters are none of {sites.model}: {listing(unknown, 4)}; is this the model it was trained on?")
    for param, parts in diffs.items():
        _read_difference(reading, param, parts, str(path))
    form = Matrix(Sparse(reading.changed / reading.touched if reading.changed else 1.0))
    reading.pieces += [Piece(name, "sparse", form, Add(), "weight", leaves) for name, leaves in reading.found.items()]
    for param, value in absolute.items():
        _read_value(reading, param, value)
    if not reading.pieces:
        raise ModuleError(f"{path}: nothing in it can be carried: {'; '.join(reading.left_out) or 'it holds no changes'}")
    method, tensors = together("lt_sft", reading.pieces, source="composable-sft; Ansell et al. 2022, arXiv 2110.07560")
    card = Card(method=method.name, description="Read from a file of composable-sft.")
    module = Module(name or path.parent.resolve().name, method, tensors, base, card=card)
    note = f"{reading.changed:,} of {reading.entries:,} entries change"
    return module, Report(str(path.parent), KIND, reading.carried, tuple(reading.left_out), (note,))


def _read_difference(reading: _Reading, param: str, parts: Mapping[str, Tensor], source: str) -> None:
    site = _site(reading.paths, param)
    if set(parts) != {"size", "index_steps", "values"}:
        raise ModuleError(f"{source}: {param} has {listing(sorted(parts))}; size, index_steps and values belong together")
    size = tuple(int(n) for n in parts["size"])
    if size != tuple(site.shape):
        raise ModuleError(f"{source}: {param} has the size {size}, the model's is {tuple(site.shape)}")
    index, values = parts["index_steps"].cumsum(0), as_float(parts["values"])
    if index.shape != values.shape or values.dim() != 1:
        raise ModuleError(f"{source}: {param} has {len(index)} indices and values of shape {tuple(values.shape)}")
    if len(index) and ((parts["index_steps"][1:] <= 0).any() or not 0 <= int(index[0]) <= int(index[-1]) < prod(size)):
        raise ModuleError(f"{source}: the indices of {param} do not rise from 0 to {prod(size) - 1}")
    reading.carried += 1
    reading.changed += len(index)
    reading.entries += prod(size)
    if site.name in reading.found:
        raise ModuleError(f"{source}: {param} is one parameter with another of the file; the model ties them")
    if len(index):
        reading.touched += prod(size)
        places = torch.unravel_index(index, tuple(reversed(size)))  # the first dimension runs fastest
        places = places if site.transposed and len(size) == 2 else tuple(reversed(places))
        shape = tuple(reversed(size)) if site.transposed and len(size) == 2 else size
        flat = index.new_zeros(len(index))
        for place, width in zip(places, shape):
            flat = flat * width + place
        flat, order = flat.sort()
        reading.found[site.name] = sparse_leaves(flat, values[order], prod(size))


def _read_value(reading: _Reading, param: str, value: Tensor) -> None:
    """A whole new parameter, as the difference from the base's."""
    if reading.paths.split(param) is None:
        reading.left_out.append(f"{param} {tuple(value.shape)}: this model has no such parameter; load the class with that head, or train a head here")
        return
    site = _site(reading.paths, param)
    if reading.weights is None:
        reading.left_out.append(f"{param} {tuple(value.shape)}: its new value is stored and a module holds its change; give weights=model.state_dict() to carry it")
        return
    change = change_at(site, value, base_value(reading.weights, site, value))
    reading.carried += 1
    reading.pieces.append(Piece(site.name, "saved", Matrix(), Add(), "weight", {"factor.value": change}, "head"))


def _site(paths: Paths, param: str) -> Site:
    place = paths.split(param)
    assert place is not None
    return paths.weight(*place)


def write_sft(
    module: Module, folder: str | os.PathLike[str], *, sites: SiteMap, weights: Mapping[str, Tensor] | None = None
) -> Report:
    """Write `pytorch_diff.bin` and the card as `README.md` into a new folder.

    Args:
        sites: of the model it is for; parameter names in the file are this model's.
        weights: `model.state_dict()`, needed for heads, of which new values are stored.

    Raises:
        ModuleError: a patch is no change of a whole parameter; nothing is written.
        StoreError: the folder already holds such files.
    """
    patches = {patch.name: patch for patch in module.method.patches}
    diffs: dict[str, dict[str, object]] = {}
    absolute: dict[str, Tensor] = {}
    left_out: list[str] = []
    for key, tensor in module.tensors.items():
        name, _, rest = key.partition("/")
        patch = patches.get(rest.partition(".")[0])
        if patch is not None and patch.port == "logits":
            left_out.append(f"{key} {tuple(tensor.shape)}: a head on the final hidden states; only the model's own are parameters")
            continue
        if patch is None or not (isinstance(patch.form, Matrix) and isinstance(patch.form.factor, Dense | Sparse) and isinstance(patch.op, Add)):
            raise ModuleError(f"{key!r} is no change of single entries of a parameter; composable-sft holds nothing else")
        if name not in sites or sites[name].view is not None:
            raise ModuleError(f"{module.name!r} does not fit this model: {name} is no whole parameter of it")
        if rest.endswith(".index"):
            continue
        site = sites[name]
        if isinstance(patch.form.factor, Sparse):
            index, shape = module.tensors[key.removesuffix("values") + "index"], canonical_shape(site)
            tensor = torch.zeros(prod(shape), dtype=tensor.dtype).scatter(0, index.long(), tensor).view(shape)
        change = as_float(tensor) * patch.op.scale
        param = f"{site.path}.{site.param}"
        check_alone({*diffs, *absolute}, param, param)
        if patch.tag != "head":
            diffs[param] = _difference(change.T if site.transposed and change.dim() == 2 else change)
        elif weights is None:
            raise ModuleError(f"{param}: composable-sft stores its new value and a module its change; give weights=model.state_dict()")
        else:
            absolute[param] = value_at(site, change, base_value(weights, site)).contiguous()
    left_out += beside(module, module.labels, "the file has no place for it")
    buffer = io.BytesIO()
    torch.save({"diffs": diffs, "abs": absolute}, buffer)
    write_folder(folder, {DIFF: buffer.getvalue(), "README.md": module.card.to_markdown().encode()})
    return Report(module.name, KIND, len(diffs) + len(absolute), tuple(left_out))


def _difference(change: Tensor) -> dict[str, object]:
    flat = change.permute(*reversed(range(change.dim()))).reshape(-1)
    index = flat.nonzero()[:, 0]
    steps = torch.diff(index, prepend=index.new_zeros(1)) if len(index) else index
    return {"size": change.shape, "index_steps": steps.tolist(), "values": flat[index].clone()}
