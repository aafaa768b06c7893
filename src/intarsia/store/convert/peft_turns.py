"""Kinds of peft that turn what a layer reads or gives: OFT, BOFT, HRA and RoAd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.patches import Add, Affine, Butterfly, Cayley, Householder, Matrix, Mul, Pairs, Rows, Sparse
from intarsia.patches.orthogonal import skew
from intarsia.store.convert.peft_config import Config
from intarsia.store.convert.peft_kind import Fields, Kind, Layer, Leaf, Made, Tensors, turn, turned
from intarsia.store.convert.pieces import sparse_leaves

#: of the series for a rotation; a file must not make a module that computes for hours
MAX_TERMS = 100


def _block_of(entries: int) -> int:
    """Size of skew blocks with so many entries above the diagonal."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    if size * (size - 1) // 2 != entries:
        raise ModuleError(f"{entries} numbers are not the upper triangle of a square matrix")
    return size


def _oft(config: Config, layer: Layer) -> Made:
    angles = layer.tensors["oft_R.weight"]
    terms = int(config["num_cayley_neumann_terms"]) if config["use_cayley_neumann"] else None
    if terms is not None and not 1 <= terms <= MAX_TERMS:
        raise ModuleError(f"num_cayley_neumann_terms={terms}: from 1 to {MAX_TERMS} are read")
    return turn(Affine(Cayley(_block_of(angles.shape[1]), bool(config["block_share"]), terms), read="self"))


def _oft_back(patch: Patch, series: bool) -> Fields | None:
    factor = turned(patch)
    if not isinstance(factor, Cayley) or (factor.terms is not None) != series:
        return None
    return {"oft_block_size": factor.block, "block_share": factor.share, "use_cayley_neumann": series,
            "num_cayley_neumann_terms": factor.terms or 5}  # fmt: skip


def _boft(config: Config, layer: Layer) -> Made:
    blocks = layer.tensors["boft_R"]
    if blocks.shape[0] != 1:
        raise ModuleError(f"{layer.path}: BOFT with {blocks.shape[0]} butterfly factors permutes features in an order of its own; only one factor is read")
    return turn(Affine(Cayley(blocks.shape[-1]), read="self"))


def _boft_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """The part of each block that is skew; what is symmetric in it has no effect."""
    blocks = layer.tensors["boft_R"][0]
    half = 0.5 * (blocks - blocks.transpose(1, 2))
    row, column = torch.triu_indices(half.shape[-1], half.shape[-1], 1)
    return {"factor.angles": -half[:, row, column]}


def _boft_back(patch: Patch) -> Fields | None:
    factor = turned(patch)
    alone = isinstance(factor, Butterfly) and factor.factors == 1
    if not (isinstance(factor, Butterfly | Cayley) and (alone or (isinstance(factor, Cayley) and factor.terms is None and not factor.share))):
        return None
    return {"boft_block_size": factor.block}


def _boft_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    angles = tensors["factor.angles"]
    angles = angles if angles.dim() == 2 else angles[0]
    return {"boft_R": skew(-angles, _block_of(angles.shape[-1]))[None]}


def _hra(config: Config, layer: Layer) -> Made:
    count = layer.tensors["hra_u"].shape[1]
    return turn(Affine(Householder(count + count % 2), read="self"))


def _hra_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """A vector of zeros, which reflects nothing, makes their number even; `apply_GS` reflects at vectors made orthogonal one by one."""
    vectors = layer.tensors["hra_u"]
    if config["apply_GS"]:
        found: list[Tensor] = []
        for column in vectors.unbind(1):
            for other in found:
                column = column - (other @ column) * other
            found.append(column / column.norm())
        vectors = torch.stack(found, 1)
    return {"factor.vectors": torch.cat([vectors, vectors.new_zeros(len(vectors), vectors.shape[1] % 2)], 1)}


def _hra_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    vectors = tensors["factor.vectors"]
    return {"hra_u": vectors[:, vectors.any(0)]}


def _hra_back(patch: Patch) -> Fields | None:
    factor = turned(patch)
    return {"r": factor.count} if isinstance(factor, Householder) else None


def _road_back(patch: Patch) -> Fields | None:
    factor = turned(patch)
    return {"group_size": factor.group, "variant": "road_1"} if isinstance(factor, Pairs) else None


def _road_wide(config: Config, layer: Layer) -> Made:
    """road_2 and road_4: numbers of their own for each of two features that are paired: what is added, as a matrix with two entries in a row."""
    return Affine(Sparse(min(1.0, 2 / layer.shape[0])), read="self"), Add()


def _road_wide_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    out, half = layer.shape[0], int(config["group_size"]) // 2
    angle, length = layer.tensors["road_theta"], layer.tensors["road_alpha"]
    if config["variant"] == "road_2":
        own, other = length * angle.cos(), length * angle.sin()
    else:
        (first, second), (one, two) = (t.view(-1, 2, 2 * half).unbind(1) for t in (angle, length))
        own, other = (one * first.cos()).flatten(), (two * second.sin()).flatten()
    place = torch.arange(out)
    lower = place % (2 * half) < half
    partner = torch.where(lower, place + half, place - half)
    flat = torch.cat([place * out + place, place * out + partner])
    flat, order = flat.sort()
    return sparse_leaves(flat, torch.cat([own - 1.0, torch.where(lower, -other, other)])[order], out * out)


def _road_wide_back(patch: Patch) -> Fields | None:
    form = patch.form
    wide = isinstance(form, Affine) and form.read == "self" and isinstance(form.factor, Sparse) and patch.op == Add()
    return {"variant": "road_4"} if wide else None


def _road_wide_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The numbers as lengths, at the angles whose cosine and sine are 1; what pairs them says how large groups are."""
    out = shape[0]
    index = tensors["factor.index"].long()
    rows, columns = index // out, index % out
    values = tensors["factor.values"]
    half = int((columns - rows).abs().max())
    own, other = values.new_zeros(out), values.new_zeros(out)
    lower = torch.arange(out) % (2 * max(half, 1)) < half
    partner = torch.where(lower, torch.arange(out) + half, torch.arange(out) - half)
    paired = columns == partner[rows]
    if not half or out % (2 * half) or not bool((paired | (columns == rows)).all()):
        raise ModuleError(f"patch {patch.name!r}: entries that pair no two features of groups; peft has no form for it")
    own[rows[~paired]] = values[~paired]
    own += 1.0
    other[rows[paired]] = torch.where(lower[rows[paired]], -values[paired], values[paired])
    length = torch.stack([own.view(-1, 2 * half), other.view(-1, 2 * half)], 1).flatten()
    angle = torch.stack([torch.zeros(out).view(-1, 2 * half), torch.full((out,), math.pi / 2).view(-1, 2 * half)], 1).flatten()
    return {"road_theta": angle, "road_alpha": length}


TURNS: Sequence[Kind] = (
    Kind("OFT", "rotation", "weight", (Leaf("oft_R.weight", "factor.angles"),), _oft, lambda p: _oft_back(p, True),
         fits=lambda c, _: bool(c["use_cayley_neumann"])),
    Kind("OFT", "rotation", "weight", (Leaf("oft_R.weight", "factor.angles", "negated"),), _oft, lambda p: _oft_back(p, False),
         fits=lambda c, _: not c["use_cayley_neumann"]),
    Kind("BOFT", "rotation", "weight", (Leaf("boft_R", "factor.angles"),), _boft, _boft_back, build=_boft_tensors, unbuild=_boft_theirs),
    Kind("BOFT", "gain", "weight", (Leaf("boft_s", "factor.value"),), lambda c, _: (Matrix(Rows()), Mul()),
         lambda p: {} if isinstance(p.form, Matrix) and isinstance(p.form.factor, Rows) and isinstance(p.op, Mul) else None),
    Kind("HRA", "rotation", "weight", (Leaf("hra_u", "factor.vectors"),), _hra, _hra_back, build=_hra_tensors, unbuild=_hra_theirs),
    Kind("ROAD", "turn", "out", (Leaf("road_theta", "factor.angle"), Leaf("road_alpha", "factor.length")),
         lambda c, _: turn(Affine(Pairs(int(c["group_size"])), read="self")), _road_back, fits=lambda c, _: c["variant"] == "road_1"),
    Kind("ROAD", "turn", "out", (Leaf("road_theta", ""), Leaf("road_alpha", "")), _road_wide, _road_wide_back, _road_wide_tensors, _road_wide_theirs,
         fits=lambda c, _: c["variant"] in ("road_2", "road_4"), note="read as a matrix with two numbers in a row: the same outputs"),
)  # fmt: skip
