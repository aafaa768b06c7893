"""peft's tensors and ours, method by method: reversible tables as data.

Kinds without `write` are read into another form that computes the same.  Rotations are in `peft_turns.py`, methods around
shared random matrices in `peft_random.py`.

Formulas: `effective weight` per method as in peft 0.21; W is [out, in] whatever the layer stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.patches import (
    Add,
    Affine,
    Blocks,
    Circulant,
    Const,
    Core,
    Dense,
    Diag,
    Fourier,
    Free,
    Gain,
    Hadamard,
    KronPair,
    LowRank,
    Matrix,
    Mul,
    Renorm,
    Sketch,
    Sparse,
)
from intarsia.patches.kron import near_square
from intarsia.store.convert.peft_config import Config
from intarsia.store.convert.peft_kind import (
    Fields,
    Kind,
    Layer,
    Leaf,
    Made,
    Tensors,
    added,
    scale_of,
    turn,
    turned,
    write_only,
)
from intarsia.store.convert.peft_random import RANDOM, diagonal
from intarsia.store.convert.peft_turns import TURNS
from intarsia.store.convert.pieces import sparse_leaves

#: what peft takes from the base's weights at the start, so that a file alone does not say what the module does
STARTS = ("pissa", "olora")


def rebased(config: Config, layer: Layer) -> Layer:
    """A LoRA that starts from a part of the weights which peft takes away from the base whenever it loads the file:
    s (B A - B0 A0) is what it does to the base as it is, so its ranks are doubled, as in peft's own conversion."""
    start = str(config.get("init_lora_weights"))
    if config.kind != "LORA" or not start.startswith(STARTS) or "lora_A.weight" not in layer.tensors:
        return layer
    if layer.weight is None:
        raise ModuleError(f"{layer.path}: it starts from {start!r}, a part of the base's own weights; give weights=model.state_dict() to find which")
    rank = len(layer.tensors["lora_A.weight"])
    weight = layer.weight.float()
    if start == "olora":
        up, down = torch.linalg.qr(weight)
        up, down = up[:, :rank], down[:rank]
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[:rank] / scale_of(config, layer, "lora_alpha", rank)).sqrt()
        up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    both = {"lora_A.weight": torch.cat([layer.tensors["lora_A.weight"], down]), "lora_B.weight": torch.cat([layer.tensors["lora_B.weight"], -up], 1)}
    return Layer(layer.path, layer.shape, {**layer.tensors, **both}, layer.shared, layer.weight, rank)


def _lora(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["lora_A.weight"].shape[0]
    return Affine(LowRank(rank), float(config["lora_dropout"])), Add(scale_of(config, layer, "lora_alpha", rank - layer.added))


def _lora_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Affine) and form.read == "input" and isinstance(form.factor, LowRank) and isinstance(op, Add)):
        return None
    return {"r": form.factor.rank, "scale": op.scale, "lora_dropout": form.dropout}


def _dora(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["lora_A.weight"].shape[0]
    return Renorm(LowRank(rank), scale_of(config, layer, "lora_alpha", rank - layer.added), float(config["lora_dropout"])), Add()


def _dora_back(patch: Patch) -> Fields | None:
    form = patch.form
    if not (isinstance(form, Renorm) and isinstance(form.factor, LowRank) and form.scaled_norm and not form.whole and patch.op == Add()):
        return None  # AdapterHub's own DoRA is another formula
    return {"r": form.factor.rank, "scale": form.scale, "lora_dropout": form.dropout, "use_dora": True}


def _lora_bias(config: Config, layer: Layer) -> Made:
    return Const(), Add(scale_of(config, layer, "lora_alpha", layer.tensors["lora_A.weight"].shape[0] - layer.added))


def _lora_bias_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    return {"scale": op.scale, "lora_bias": True} if isinstance(form, Const) and form.factor is None and isinstance(op, Add) else None


def _rows_lora(config: Config, layer: Layer) -> Made:
    """The change of an embedding [n, d], which peft keeps turned."""
    rank = layer.tensors["lora_embedding_A"].shape[0]
    return Matrix(LowRank(rank)), Add(scale_of(config, layer, "lora_alpha", rank))


def _rows_lora_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Matrix) and isinstance(form.factor, LowRank) and isinstance(op, Add)):
        return None
    return {"r": form.factor.rank, "scale": op.scale, "lora_dropout": None}


def _shift_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    return {} if isinstance(form, Const) and form.factor is None and isinstance(op, Add) else None


def _shift_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    assert isinstance(patch.op, Add)
    return {"beft_bias": tensors["value"][None] * patch.op.scale}


def _adalora_back(patch: Patch) -> Fields | None:
    form, op, factor = patch.form, patch.op, diagonal(patch)
    if factor is None or not isinstance(form, Affine) or not isinstance(op, Add):
        return None
    return {"rank": factor.rank, "scale": op.scale, "lora_dropout": form.dropout}


def _adalora(config: Config, layer: Layer) -> Made:
    form = Affine(Core(layer.tensors["lora_A"].shape[0], Free(), Diag()), float(config["lora_dropout"]))
    return form, Add(float(config["lora_alpha"]) / (int(config["init_r"]) + 1e-5))


def _ia3_back(patch: Patch) -> Fields | None:
    return {} if isinstance(patch.form, Const) and patch.form.factor is None and isinstance(patch.op, Mul) else None


def _columns_back(patch: Patch) -> Fields | None:
    return {} if isinstance(turned(patch), Diag) else None


def _loha(config: Config, layer: Layer) -> Made:
    rank = layer.tensors["hada_w1_b"].shape[0]
    factor = Hadamard((LowRank(rank, "unit"), LowRank(rank, "unit")), ("loha", "zeros"))
    return Matrix(factor), Add(scale_of(config, layer, "alpha", rank))


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


def _miss(config: Config, layer: Layer) -> Made:
    return Affine(Sketch(layer.tensors["miss_block"].shape[0], draw="tiled")), Add()


def _miss_mini_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """The block repeated along the outputs."""
    block = layer.tensors["miss_block"]
    return {"factor.up": block.repeat(1, layer.shape[0] // block.shape[1]).T}


def _miss_back(patch: Patch) -> Fields | None:
    factor = added(patch)
    return {"r": factor.rank} if isinstance(factor, Sketch) and factor.draw == "tiled" else None


def _fourier_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Matrix) and isinstance(form.factor, Fourier) and form.factor.stream == "torch" and isinstance(op, Add)):
        return None
    return {"n_frequency": form.factor.count, "random_loc_seed": form.factor.seed, "scaling": op.scale}


def _c3a_back(patch: Patch) -> Fields | None:
    factor = added(patch)
    return {"block_size": factor.block} if isinstance(factor, Circulant) else None


def _hira_back(patch: Patch) -> Fields | None:
    form = patch.form
    if not (isinstance(form, Matrix) and isinstance(form.factor, LowRank) and patch.op == Gain()):
        return None
    return {"r": form.factor.rank}


def _gralora(config: Config, layer: Layer) -> Made:
    grid = int(config["gralora_k"])
    rank = layer.tensors["gralora_A"].shape[2]
    return Affine(Blocks(grid, grid, LowRank(rank // grid))), Add(float(config["alpha"]) / rank)


def _gralora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Block (o, i): rank slice o of A_i and rank slice i of B_o."""
    a, b = layer.tensors["gralora_A"], layer.tensors["gralora_B"]
    if a.dim() != 3 or b.dim() != 3:
        raise ModuleError(f"{layer.path}: gralora_A {tuple(a.shape)} and gralora_B {tuple(b.shape)} are no blocks [k, size, r] and [k, r, size]")
    grid, size = int(config["gralora_k"]), a.shape[2] // int(config["gralora_k"])
    found = {}
    for out in range(grid):
        for inner in range(grid):
            lead = f"factor.parts.{out * grid + inner}"
            found[f"{lead}.up"] = b[out][inner * size : (inner + 1) * size].T
            found[f"{lead}.down"] = a[inner][:, out * size : (out + 1) * size].T
    return found


def _gralora_back(patch: Patch) -> Fields | None:
    form, op = patch.form, patch.op
    if not (isinstance(form, Affine) and isinstance(form.factor, Blocks) and isinstance(op, Add) and form.read == "input"):
        return None
    factor = form.factor
    if factor.rows != factor.columns or not isinstance(factor.factor, LowRank):
        return None
    return {"r": factor.factor.rank * factor.rows, "scale": op.scale, "gralora_k": factor.rows, "gralora_dropout": form.dropout}


def _gralora_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    grid = range(patch.form.factor.rows)  # type: ignore[attr-defined]
    a = [torch.cat([tensors[f"factor.parts.{out * len(grid) + inner}.down"].T for out in grid], 1) for inner in grid]
    b = [torch.cat([tensors[f"factor.parts.{out * len(grid) + inner}.up"].T for inner in grid]) for out in grid]
    return {"gralora_A": torch.stack(a), "gralora_B": torch.stack(b)}


def _delora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    t = layer.tensors
    a, b = t["delora_A"], t["delora_B"]
    lengths = a.norm(dim=1).clamp(1e-4) * b.norm(dim=0).clamp(1e-4)
    return {"factor.up": b * (t["delora_lambda"] / a.shape[0] / lengths), "factor.down": a * t["delora_w_norm"][None]}


def _sparse(values: str) -> Any:
    def form(config: Config, layer: Layer) -> Made:
        return Matrix(Sparse(max(len(layer.tensors[values]), 1) / (layer.shape[0] * layer.shape[1]))), Add()

    return form


def _entries(layer: Layer, flat: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Entries at flat places; those named twice add up."""
    size = layer.shape[0] * layer.shape[1]
    if len(values) != len(flat) or (len(values) and not (0 <= int(flat.min()) <= int(flat.max()) < size)):
        raise ModuleError(f"{layer.path}: entries lie outside a weight of shape {layer.shape}")
    found, order = flat.unique(return_inverse=True)
    return sparse_leaves(found, values.new_zeros(len(found)).index_add(0, order, values), size)


def _shira_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Row and column of each entry."""
    rows, columns = layer.tensors["shira_indices"].long()
    if len(rows) and not (0 <= int(columns.min()) <= int(columns.max()) < layer.shape[1]):
        raise ModuleError(f"{layer.path}: shira_indices lie outside a weight of shape {layer.shape}")
    return _entries(layer, rows * layer.shape[1] + columns, layer.tensors["shira_weight"])


def _sparse_back(patch: Patch) -> Fields | None:
    form = patch.form
    return {} if isinstance(form, Matrix) and isinstance(form.factor, Sparse) and isinstance(patch.op, Add) else None


def _shira_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    assert isinstance(patch.op, Add)
    index = tensors["factor.index"].long()
    places = torch.stack([index // shape[1], index % shape[1]]).int()
    return {"shira_indices": places, "shira_weight": tensors["factor.values"] * patch.op.scale}


def _supertuning_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    assert isinstance(patch.op, Add)
    return {"supertuning_indices": tensors["factor.index"].int(), "supertuning_values": tensors["factor.values"] * patch.op.scale}


_PAIR = (Leaf("lora_A.weight", "factor.down"), Leaf("lora_B.weight", "factor.up"))
_AS_PRODUCT = "read as the low-rank product it is: the same outputs, other parameters if training goes on"


def _dense_input(config: Config, layer: Layer) -> bool:
    return layer.tensors["ia3_l"].shape[0] == 1 and layer.shape[1] == layer.tensors["ia3_l"].shape[1]


_OWN: Sequence[Kind] = (
    Kind("LORA", "dora", "out", (*_PAIR, Leaf("lora_magnitude_vector", "magnitude")), _dora, _dora_back, fits=lambda c, _: bool(c["use_dora"])),
    Kind("LORA", "lora", "out", _PAIR, _lora, _lora_back, fits=lambda c, layer: not c["use_dora"] and "lora_magnitude_vector" not in layer.tensors),
    Kind("LORA", "lora_bias", "out", (Leaf("lora_B.bias", "value"),), _lora_bias, _lora_bias_back, fits=lambda c, _: not c["use_dora"]),
    Kind("ADALORA", "lora", "out",
         (Leaf("lora_A", "factor.frame.down"), Leaf("lora_B", "factor.frame.up"), Leaf("lora_E", "factor.core.value", "column")), _adalora,
         _adalora_back),
    Kind("LORA", "lora_rows", "weight", (Leaf("lora_embedding_A", "factor.up", "turned"), Leaf("lora_embedding_B", "factor.down", "turned")), _rows_lora,
         _rows_lora_back, fits=lambda c, layer: "lora_magnitude_vector" not in layer.tensors, table=True),
    Kind("LORA", "lora_weight", "weight", _PAIR, _lora, _rows_lora_back, fits=write_only, table=False),
    Kind("BEFT", "shift", "out", (Leaf("beft_bias", "value", "row"),), lambda c, _: (Const(), Add()), _shift_back, unbuild=_shift_theirs),
    Kind("IA3", "scale", "out", (Leaf("ia3_l", "value", "column"),), lambda c, _: (Const("ones"), Mul()), _ia3_back,
         fits=lambda c, layer: not _dense_input(c, layer)),
    Kind("IA3", "scale_in", "in", (Leaf("ia3_l", "value", "row"),), lambda c, _: (Const("ones"), Mul()), _ia3_back, fits=_dense_input),
    Kind("IA3", "scale_input", "weight", (Leaf("ia3_l", "factor.value", "row"),), lambda c, _: turn(Affine(Diag(1.0), read="self")), _columns_back,
         fits=write_only),
    Kind("LOHA", "loha", "weight",
         (Leaf("hada_w1_a", "factor.parts.0.up"), Leaf("hada_w1_b", "factor.parts.0.down"), Leaf("hada_w2_a", "factor.parts.1.up"),
          Leaf("hada_w2_b", "factor.parts.1.down")), _loha, _loha_back),
    Kind("LOKR", "lokr", "out", (), _lokr, build=_lokr_tensors,
         optional=tuple(f"lokr_w{x}" for x in ("1", "1_a", "1_b", "2", "2_a", "2_b"))),
    Kind("LOKR", "lokr", "out", (Leaf("lokr_w1", "factor.rule.left", "unstacked"), Leaf("lokr_w2", "factor.up", "unstacked")), _lokr,
         lambda p: _lokr_back(p, True), fits=write_only),
    Kind("LOKR", "lokr", "out",
         (Leaf("lokr_w1", "factor.rule.left", "unstacked"), Leaf("lokr_w2_a", "factor.up", "unstacked"), Leaf("lokr_w2_b", "factor.down", "unstacked")),
         _lokr, lambda p: _lokr_back(p, False), fits=write_only),
    Kind("MISS", "shards", "out", (Leaf("miss_block", "factor.up", "turned"),), _miss, _miss_back,
         fits=lambda c, layer: layer.tensors["miss_block"].dim() == 2 and layer.tensors["miss_block"].shape[1] == layer.shape[0]),
    Kind("MISS", "shards", "out", (Leaf("miss_block", ""),), _miss, build=_miss_mini_tensors, note="its block is repeated: the same outputs, more parameters",
         fits=lambda c, layer: c["init_weights"] == "mini" and layer.tensors["miss_block"].dim() == 2
         and layer.shape[0] % layer.tensors["miss_block"].shape[1] == 0),
    Kind("FOURIERFT", "spectrum", "weight", (Leaf("fourierft_spectrum", "factor.value"),),
         lambda c, layer: (Matrix(Fourier(len(layer.tensors["fourierft_spectrum"]), int(c["random_loc_seed"]), stream="torch")), Add(float(c["scaling"]))),
         _fourier_back, note="its positions come from torch.randperm, as peft's do: another torch may draw others"),
    Kind("C3A", "circulant", "out", (Leaf("c3a_kernel", "factor.kernel"),),
         lambda c, layer: (Affine(Circulant(layer.tensors["c3a_kernel"].shape[2])), Add()), _c3a_back),
    Kind("GRALORA", "lora", "out", (Leaf("gralora_A", ""), Leaf("gralora_B", "")), _gralora, _gralora_back,
         _gralora_tensors, _gralora_theirs),
    Kind("DELORA", "delora", "out", tuple(Leaf(f"delora_{x}", "") for x in ("A", "B", "lambda", "w_norm")),
         lambda c, layer: (Affine(LowRank(layer.tensors["delora_A"].shape[0])), Add()), build=_delora_tensors, note=_AS_PRODUCT),
    Kind("SHIRA", "sparse", "weight", (Leaf("shira_indices", ""), Leaf("shira_weight", "")), _sparse("shira_weight"), _sparse_back, _shira_tensors, _shira_theirs),
    Kind("SUPERTUNING", "sparse", "weight", (Leaf("supertuning_indices", ""), Leaf("supertuning_values", "")), _sparse("supertuning_values"), _sparse_back,
         lambda c, layer: _entries(layer, layer.tensors["supertuning_indices"].long(), layer.tensors["supertuning_values"]), _supertuning_theirs),
    Kind("HIRA", "hira", "weight", (Leaf("hira_A", "factor.down"), Leaf("hira_B", "factor.up")),
         lambda c, layer: (Matrix(LowRank(layer.tensors["hira_A"].shape[0])), Gain()), _hira_back),
)  # fmt: skip
#: all kinds; the first that takes a file's tensors, or a module's patch, has it
KINDS: Sequence[Kind] = (*_OWN, *RANDOM, *TURNS)
