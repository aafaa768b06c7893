"""peft's tensors and ours, method by method: reversible tables as data.

A `Kind` says which of a layer's tensors belong together, at which port of the layer they enter, how each leaf is laid out,
and how form and op follow from the configuration and back.  Kinds without `write` are read into another form that computes
the same (a VeRA from elsewhere has random sides that no seed here gives, so it becomes the low-rank product it is).

Formulas: `effective weight` per method as in peft 0.21; W is [out, in] whatever the layer stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.patches import (
    Add,
    Affine,
    Blocks,
    Cayley,
    Circulant,
    Const,
    Core,
    Dense,
    Diag,
    FactorSpec,
    FormSpec,
    Fourier,
    Free,
    Gain,
    Hadamard,
    Householder,
    KronPair,
    LowRank,
    Matrix,
    Mul,
    OpSpec,
    Pairs,
    Renorm,
    Rot,
    Rows,
    Sketch,
    Sparse,
)
from intarsia.patches.kron import near_square
from intarsia.store.convert.peft_config import Config
from intarsia.store.convert.pieces import sparse_leaves

Tensors = Mapping[str, Tensor]
Entry = Literal["out", "weight", "in"]
Made = tuple[FormSpec, OpSpec]
Fields = dict[str, Any]

#: of the series for a rotation; a file must not make a module that computes for hours
MAX_TERMS = 100
#: (theirs -> ours, ours -> theirs)
LAYOUTS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "same": (lambda t: t, lambda t: t),
    "turned": (lambda t: t.T, lambda t: t.T),
    "column": (lambda t: t[:, 0], lambda t: t[:, None]),
    "row": (lambda t: t[0], lambda t: t[None]),
    "unstacked": (lambda t: t[None], lambda t: t[0]),
    "negated": (lambda t: -t, lambda t: -t),
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor: peft's name below the layer, our leaf, and how one is laid out in the other."""

    theirs: str
    ours: str
    layout: str = "same"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a file.

    Attributes:
        path: of the module in the model.
        shape: (out, in) of its weight.
        tensors: by peft's name below the layer.
        shared: tensors of the whole file.
    """

    path: str
    shape: tuple[int, int]
    tensors: Tensors
    shared: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One patch that peft's tensors of a layer make.

    Attributes:
        peft_type: peft's name of the method.
        patch: our name of the patch.
        port: where it enters at the layer.
        leaves: names and layouts; all must be there.
        read: form and op from the configuration and the layer.
        write: fields of the configuration from form and op, None for another kind; fields that vary between layers are
            `r`, `alpha` and `scale`.
        build: our tensors, where they are more than a layout.
        fits: a further condition on the layer.
        note: what a user must know of modules read so.
        optional: further tensors that `build` takes where they are there.
    """

    peft_type: str
    patch: str
    port: Entry
    leaves: tuple[Leaf, ...]
    read: Callable[[Config, Layer], Made]
    write: Callable[[Patch], Fields | None] | None = None
    build: Callable[[Config, Layer], dict[str, Tensor]] | None = None
    fits: Callable[[Config, Layer], bool] = lambda config, layer: True
    note: str = ""
    optional: tuple[str, ...] = ()

    def takes(self, config: Config, layer: Layer) -> bool:
        """Whether these tensors are of this kind."""
        return self.peft_type == config.kind and all(leaf.theirs in layer.tensors for leaf in self.leaves) and self.fits(config, layer)

    def uses(self, layer: Layer) -> set[str]:
        """Names of the tensors it takes from a layer."""
        return {leaf.theirs for leaf in self.leaves} | {name for name in self.optional if name in layer.tensors}

    def ours(self, config: Config, layer: Layer) -> dict[str, Tensor]:
        """Our tensors by leaf."""
        if self.build is not None:
            return self.build(config, layer)
        return {leaf.ours: LAYOUTS[leaf.layout][0](layer.tensors[leaf.theirs]) for leaf in self.leaves}

    def theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """peft's tensors by name below the layer."""
        return {leaf.theirs: LAYOUTS[leaf.layout][1](tensors[leaf.ours]) for leaf in self.leaves}


def _scale(config: Config, layer: Layer, alpha: str, rank: int) -> float:
    """alpha / r (or the root) after patterns; the rank the file's tensors have must be the one configured."""
    said = config.at("rank_pattern", "r", layer.path)
    if said != rank:
        raise ModuleError(f"{layer.path}: the configuration says rank {said}, the tensors have rank {rank}")
    value = float(config.at("alpha_pattern", alpha, layer.path))
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lora(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["lora_A.weight"].shape[0]
    return Affine(LowRank(rank), float(config["lora_dropout"])), Add(_scale(config, layer, "lora_alpha", rank))


def _lora_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Affine) and form.read == "input" and isinstance(form.factor, LowRank) and isinstance(op, Add)):
        return None
    return {"r": form.factor.rank, "scale": op.scale, "lora_dropout": form.dropout}


def _dora(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["lora_A.weight"].shape[0]
    return Renorm(LowRank(rank), _scale(config, layer, "lora_alpha", rank), float(config["lora_dropout"])), Add()


def _dora_back(patch: Patch) -> Fields | None:
    form = patch.form
    if not (isinstance(form, Renorm) and isinstance(form.factor, LowRank)):
        return None
    return {"r": form.factor.rank, "scale": form.scale, "lora_dropout": form.dropout, "use_dora": True}


def _lora_bias(config: Config, layer: Layer) -> Made:
    return Const(), Add(_scale(config, layer, "lora_alpha", layer.tensors["lora_A.weight"].shape[0]))


def _lora_bias_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    return {"scale": op.scale, "lora_bias": True} if isinstance(form, Const) and form.factor is None and isinstance(op, Add) else None


def _adalora(config: Config, layer: Layer) -> Made:
    form = Affine(Core(layer.tensors["lora_A"].shape[0], Free(), Diag()), float(config["lora_dropout"]))
    return form, Add(float(config["lora_alpha"]) / (int(config["init_r"]) + 1e-5))


def _ia3_back(patch: Patch) -> Fields | None:
    return {} if isinstance(patch.form, Const) and patch.form.factor is None and isinstance(patch.op, Mul) else None


def _columns_back(patch: Patch) -> Fields | None:
    return {} if isinstance(_turned(patch), Diag) else None


def _loha(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["hada_w1_b"].shape[0]
    factor = Hadamard((LowRank(rank, "unit"), LowRank(rank, "unit")), ("loha", "zeros"))
    return Matrix(factor), Add(_scale(config, layer, "alpha", rank))


def _loha_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Matrix) and isinstance(form.factor, Hadamard) and isinstance(op, Add)):
        return None
    ranks = {part.rank for part in form.factor.parts if isinstance(part, LowRank)}
    if len(form.factor.parts) != 2 or len(ranks) != 1 or not all(isinstance(p, LowRank) for p in form.factor.parts):
        return None
    return {"r": ranks.pop(), "scale": op.scale}


def _kron_sides(layer: Layer) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """w1, and w2 or its factors."""
    t = layer.tensors
    left = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    return left, t.get("lokr_w2", t.get("lokr_w2_a")), t.get("lokr_w2_b")


def _lokr(config: Config, layer: Layer) -> Made:
    left, up, down = _kron_sides(layer)
    assert up is not None
    rank = int(config.at("rank_pattern", "r", layer.path))
    op = Add(float(config.at("alpha_pattern", "alpha", layer.path)) / rank)
    limit = None if int(config["decompose_factor"]) < 1 else int(config["decompose_factor"])
    sides = tuple(near_square(size, limit) for size in layer.shape)
    inner = up.shape[1] if down is None else down.shape[1]
    if tuple(left.shape) != (sides[0][0], sides[1][0]) or (up.shape[0], inner) != (sides[0][1], sides[1][1]):
        return Affine(Dense()), op
    return Affine(KronPair(None if down is None else down.shape[0], limit)), op


def _lokr_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    left, up, down = _kron_sides(layer)
    form = _lokr(config, layer)[0]
    assert isinstance(form, Affine) and up is not None
    if isinstance(form.factor, Dense):
        return {"factor.value": torch.kron(left, up if down is None else up @ down)}
    found = {"factor.rule.left": left[None], "factor.up": up[None]}
    return found if down is None else {**found, "factor.down": down[None]}


def _lokr_back(patch: Patch, full: bool) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Affine) and isinstance(form.factor, KronPair) and isinstance(op, Add) and (form.factor.rank is None) == full):
        return None
    return {"scale": op.scale, "decompose_factor": form.factor.limit or -1}


def _vera(prefix: str) -> Callable[[Config, Layer], dict[str, Tensor]]:
    def build(config: Config, layer: Layer) -> dict[str, Tensor]:
        if f"{prefix}_A" not in layer.shared:
            raise ModuleError(
                f"{layer.path}: the file does not hold the random projections ({prefix}_A, {prefix}_B), which only torch's generator of the machine "
                "that made it gives; save it in peft with save_projection=True"
            )
        out, inner = layer.shape
        gain, diagonal = layer.tensors[f"{prefix}_lambda_b"], layer.tensors[f"{prefix}_lambda_d"]
        down, up = layer.shared[f"{prefix}_A"][:, :inner], layer.shared[f"{prefix}_B"][:out]
        return {"factor.up": gain[:, None] * up, "factor.down": diagonal[:, None] * down}

    return build


def _vera_form(config: Config, layer: Layer) -> Made:
    return Affine(LowRank(layer.tensors["vera_lambda_d"].shape[0])), Add()


def _block_of(entries: int) -> int:
    """Size of skew blocks with so many entries above the diagonal."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    if size * (size - 1) // 2 != entries:
        raise ModuleError(f"{entries} numbers are not the upper triangle of a square matrix")
    return size


def _turn(form: FormSpec) -> Made:
    return form, Rot()


def _turned(patch: Patch) -> FactorSpec | None:
    """The factor of a rotation."""
    form = patch.form
    return form.factor if isinstance(form, Affine) and form.read == "self" and isinstance(patch.op, Rot) else None


def _added(patch: Patch) -> FactorSpec | None:
    """The factor of an unscaled change."""
    form = patch.form
    return form.factor if isinstance(form, Affine) and form.read == "input" and patch.op == Add() else None


def _oft(config: Config, layer: Layer) -> Made:
    angles = layer.tensors["oft_R.weight"]
    terms = int(config["num_cayley_neumann_terms"]) if config["use_cayley_neumann"] else None
    if terms is not None and not 1 <= terms <= MAX_TERMS:
        raise ModuleError(f"num_cayley_neumann_terms={terms}: from 1 to {MAX_TERMS} are read")
    return _turn(Affine(Cayley(_block_of(angles.shape[1]), bool(config["block_share"]), terms), read="self"))


def _oft_back(patch: Patch, series: bool) -> Fields | None:
    factor = _turned(patch)
    if not isinstance(factor, Cayley) or (factor.terms is not None) != series:
        return None
    return {"oft_block_size": factor.block, "block_share": factor.share, "use_cayley_neumann": series,
            "num_cayley_neumann_terms": factor.terms or 5}  # fmt: skip


def _boft(config: Config, layer: Layer) -> Made:
    blocks = layer.tensors["boft_R"]
    if blocks.shape[0] != 1:
        raise ModuleError(f"{layer.path}: BOFT with {blocks.shape[0]} butterfly factors permutes features in an order of its own; only one factor is read")
    return _turn(Affine(Cayley(blocks.shape[-1]), read="self"))


def _boft_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    blocks = layer.tensors["boft_R"][0]
    skew = 0.5 * (blocks - blocks.transpose(1, 2))
    row, column = torch.triu_indices(skew.shape[-1], skew.shape[-1], 1)
    return {"factor.angles": -skew[:, row, column]}


def _hra(config: Config, layer: Layer) -> Made:
    count = layer.tensors["hra_u"].shape[1]
    if count % 2:
        raise ModuleError(f"{layer.path}: {count} reflections; only even numbers are read (they start in pairs that cancel)")
    return _turn(Affine(Householder(count), read="self"))


def _hra_back(patch: Patch) -> Fields | None:
    factor = _turned(patch)
    return {"r": factor.count} if isinstance(factor, Householder) else None


def _miss_back(patch: Patch) -> Fields | None:
    factor = _added(patch)
    return {"r": factor.rank} if isinstance(factor, Sketch) and factor.draw == "tiled" else None


def _fourier_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Matrix) and isinstance(form.factor, Fourier) and form.factor.stream == "torch" and isinstance(op, Add)):
        return None
    return {"n_frequency": form.factor.count, "random_loc_seed": form.factor.seed, "scaling": op.scale}


def _c3a_back(patch: Patch) -> Fields | None:
    factor = _added(patch)
    return {"block_size": factor.block} if isinstance(factor, Circulant) else None


def _hira_back(patch: Patch) -> Fields | None:
    form = patch.form
    if not (isinstance(form, Matrix) and isinstance(form.factor, LowRank) and patch.op == Gain()):
        return None
    return {"r": form.factor.rank}


def _road_back(patch: Patch) -> Fields | None:
    factor = _turned(patch)
    return {"group_size": factor.group, "variant": "road_1"} if isinstance(factor, Pairs) else None


def _gralora(config: Config, layer: Layer) -> Made:
    grid = int(config["gralora_k"])
    rank = layer.tensors["gralora_A"].shape[2]
    return Affine(Blocks(grid, grid, LowRank(rank // grid))), Add(float(config["alpha"]) / rank)


def _gralora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Block (o, i): rank slice o of A_i and rank slice i of B_o."""
    a, b = layer.tensors["gralora_A"], layer.tensors["gralora_B"]
    grid, size = int(config["gralora_k"]), a.shape[2] // int(config["gralora_k"])
    found = {}
    for out in range(grid):
        for inner in range(grid):
            lead = f"factor.parts.{out * grid + inner}"
            found[f"{lead}.up"] = b[out][inner * size : (inner + 1) * size].T
            found[f"{lead}.down"] = a[inner][:, out * size : (out + 1) * size].T
    return found


def _delora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    t = layer.tensors
    a, b = t["delora_A"], t["delora_B"]
    lengths = a.norm(dim=1).clamp(1e-4) * b.norm(dim=0).clamp(1e-4)
    return {"factor.up": b * (t["delora_lambda"] / a.shape[0] / lengths), "factor.down": a * t["delora_w_norm"][None]}


def _shira(config: Config, layer: Layer) -> Made:
    return Matrix(Sparse(max(len(layer.tensors["shira_weight"]), 1) / (layer.shape[0] * layer.shape[1]))), Add()


def _shira_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Row and column of each entry; entries named twice add up."""
    places, values = layer.tensors["shira_indices"].long(), layer.tensors["shira_weight"]
    out, inner = layer.shape
    rows, columns = places
    if len(values) and not (0 <= int(rows.min()) <= int(rows.max()) < out and 0 <= int(columns.min()) <= int(columns.max()) < inner):
        raise ModuleError(f"{layer.path}: shira_indices lie outside a weight of shape {layer.shape}")
    flat, order = (rows * inner + columns).unique(return_inverse=True)
    return sparse_leaves(flat, values.new_zeros(len(flat)).index_add(0, order, values), out * inner)


_PAIR = (Leaf("lora_A.weight", "factor.down"), Leaf("lora_B.weight", "factor.up"))
_AS_PRODUCT = "read as the low-rank product it is: the same outputs, other parameters if training goes on"


def _dense_input(config: Config, layer: Layer) -> bool:
    return layer.tensors["ia3_l"].shape[0] == 1 and layer.shape[1] == layer.tensors["ia3_l"].shape[1]


def _write_only(config: Config, layer: Layer) -> bool:
    """For kinds that another row reads."""
    return False


KINDS: Sequence[Kind] = (
    Kind("LORA", "dora", "out", (*_PAIR, Leaf("lora_magnitude_vector", "magnitude")), _dora, _dora_back, fits=lambda c, _: bool(c["use_dora"])),
    Kind("LORA", "lora", "out", _PAIR, _lora, _lora_back, fits=lambda c, layer: not c["use_dora"] and "lora_magnitude_vector" not in layer.tensors),
    Kind("LORA", "lora_bias", "out", (Leaf("lora_B.bias", "value"),), _lora_bias, _lora_bias_back, fits=lambda c, _: not c["use_dora"]),
    Kind("ADALORA", "lora", "out",
         (Leaf("lora_A", "factor.frame.down"), Leaf("lora_B", "factor.frame.up"), Leaf("lora_E", "factor.core.value", "column")), _adalora),
    Kind("IA3", "scale", "out", (Leaf("ia3_l", "value", "column"),), lambda c, _: (Const("ones"), Mul()), _ia3_back,
         fits=lambda c, layer: not _dense_input(c, layer)),
    Kind("IA3", "scale_in", "in", (Leaf("ia3_l", "value", "row"),), lambda c, _: (Const("ones"), Mul()), _ia3_back, fits=_dense_input),
    Kind("IA3", "scale_input", "weight", (Leaf("ia3_l", "factor.value", "row"),), lambda c, _: _turn(Affine(Diag(1.0), read="self")), _columns_back,
         fits=_write_only),
    Kind("LOHA", "loha", "weight",
         (Leaf("hada_w1_a", "factor.parts.0.up"), Leaf("hada_w1_b", "factor.parts.0.down"), Leaf("hada_w2_a", "factor.parts.1.up"),
          Leaf("hada_w2_b", "factor.parts.1.down")), _loha, _loha_back),
    Kind("LOKR", "lokr", "out", (), _lokr, build=_lokr_tensors,
         optional=tuple(f"lokr_w{x}" for x in ("1", "1_a", "1_b", "2", "2_a", "2_b"))),
    Kind("LOKR", "lokr", "out", (Leaf("lokr_w1", "factor.rule.left", "unstacked"), Leaf("lokr_w2", "factor.up", "unstacked")), _lokr,
         lambda p: _lokr_back(p, True), fits=_write_only),
    Kind("LOKR", "lokr", "out",
         (Leaf("lokr_w1", "factor.rule.left", "unstacked"), Leaf("lokr_w2_a", "factor.up", "unstacked"), Leaf("lokr_w2_b", "factor.down", "unstacked")),
         _lokr, lambda p: _lokr_back(p, False), fits=_write_only),
    Kind("VERA", "vera", "out", (Leaf("vera_lambda_b", ""), Leaf("vera_lambda_d", "")), _vera_form, build=_vera("vera"), note=_AS_PRODUCT),
    Kind("OFT", "rotation", "weight", (Leaf("oft_R.weight", "factor.angles"),), _oft, lambda p: _oft_back(p, True),
         fits=lambda c, _: bool(c["use_cayley_neumann"])),
    Kind("OFT", "rotation", "weight", (Leaf("oft_R.weight", "factor.angles", "negated"),), _oft, lambda p: _oft_back(p, False),
         fits=lambda c, _: not c["use_cayley_neumann"]),
    Kind("BOFT", "rotation", "weight", (Leaf("boft_R", ""),), _boft, build=_boft_tensors),
    Kind("BOFT", "gain", "weight", (Leaf("boft_s", "factor.value"),), lambda c, _: (Matrix(Rows()), Mul())),
    Kind("HRA", "rotation", "weight", (Leaf("hra_u", "factor.vectors"),),
_hra, _hra_back),
    Kind("MISS", "shards", "out", (Leaf("miss_block", "factor.up", "turned"),),
         lambda c, layer: (Affine(Sketch(layer.tensors["miss_block"].shape[0], draw="tiled")), Add()), _miss_back,
         fits=lambda c, layer: layer.tensors["miss_block"].dim() == 2 and layer.tensors["miss_block"].shape[1] == layer.shape[0]),
    Kind("FOURIERFT", "spectrum", "weight", (Leaf("fourierft_spectrum", "factor.value"),),
         lambda c, layer: (Matrix(Fourier(len(layer.tensors["fourierft_spectrum"]), int(c["random_loc_seed"]), stream="torch")), Add(float(c["scaling"]))),
         _fourier_back, note="its positions come from torch.randperm, as peft's do: another torch may draw others"),
    Kind("C3A", "circulant", "out", (Leaf("c3a_kernel", "factor.kernel"),),
         lambda c, layer: (Affine(Circulant(layer.tensors["c3a_kernel"].shape[2])), Add()), _c3a_back),
    Kind("GRALORA", "lora", "out", (Leaf("gralora_A", ""), Leaf("gralora_B", "")), _gralora, build=_gralora_tensors),
    Kind("DELORA", "delora", "out", tuple(Leaf(f"delora_{x}", "") for x in ("A", "B", "lambda", "w_norm")),
         lambda c, layer: (Affine(LowRank(layer.tensors["delora_A"].shape[0])), Add()), build=_delora_tensors, note=_AS_PRODUCT),
    Kind("SHIRA", "sparse", "weight", (Leaf("shira_indices", ""), Leaf("shira_weight", "")), _shira, build=_shira_tensors),
    Kind("ROAD", "turn", "out", (Leaf("road_theta", "factor.angle"), Leaf("road_alpha", "factor.length")),
         lambda c, _: _turn(Affine(Pairs(int(c["group_size"])), read="self")), _road_back, fits=lambda c, _: c["variant"] == "road_1"),
    Kind("HIRA", "hira", "weight", (Leaf("hira_A", "factor.down"), Leaf("hira_B", "factor.up")),
         lambda c, layer: (Matrix(LowRank(layer.tensors["hira_A"].shape[0])), Gain()), _hira_back),
)  # fmt: skip
