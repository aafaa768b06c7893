"""Kinds of peft around matrices that all layers share: VeRA, PVeRA, RandLoRA and VB-LoRA.

A module has its own tensors at each site, so VeRA's shared pair is cut to each layer's size when it is read, and put together
again when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.methods.method import Patch
from intarsia.patches import Add, Affine, Core, Dense, Diag, Free, LowRank, Seeded
from intarsia.patches.seeded import DRAWS, Stream
from intarsia.store.convert.peft_config import Config
from intarsia.store.convert.peft_kind import Fields, Kind, Layer, Leaf, Made, Tensors

UP, DOWN, DIAGONAL, GAIN = "factor.frame.up", "factor.frame.down", "factor.core.value", "factor.gain"
_FRAME = "its random sides are stored with the module, and would be trained if training went on"


def _vera(prefix: str, part: int) -> Callable[[Config, Layer], dict[str, Tensor]]:
    """PVeRA has means and deviations one after the other; `part` is 2 there, and means are what inference uses."""

    def build(config: Config, layer: Layer) -> dict[str, Tensor]:
        if f"{prefix}_A" not in layer.shared:
            raise ModuleError(
                f"{layer.path}: the file does not hold the random projections ({prefix}_A, {prefix}_B), which only torch's generator of the machine "
                "that made it gives; save it in peft with save_projection=True"
            )
        out, inner = layer.shape
        diagonal = layer.tensors[f"{prefix}_lambda_d"]
        rank = len(diagonal) // part
        down, up = layer.shared[f"{prefix}_A"][:rank, :inner], layer.shared[f"{prefix}_B"][:out, :rank]
        return {UP: up, DOWN: down, DIAGONAL: diagonal[:rank], GAIN: layer.tensors[f"{prefix}_lambda_b"]}

    return build


def _vera_form(prefix: str, part: int) -> Callable[[Config, Layer], Made]:
    def form(config: Config, layer: Layer) -> Made:
        core = Core(layer.tensors[f"{prefix}_lambda_d"].shape[0] // part, Free(), Diag(), gain="zeros")
        return Affine(core, float(config.get(f"{prefix}_dropout", 0.0))), Add()

    return form


def _vera_back(patch: Patch) -> Fields | None:
    form = patch.form
    if not (isinstance(form, Affine) and framed(patch) and patch.op == Add()):
        return None
    assert isinstance(form.factor, Core)
    return {"r": form.factor.rank, "vera_dropout": form.dropout, "save_projection": True}


def _vera_theirs(patch: Patch, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {"vera_lambda_b": tensors[GAIN], "vera_lambda_d": tensors[DIAGONAL], "vera_A": tensors[DOWN], "vera_B": tensors[UP]}


def _core(patch: Patch) -> Core | None:
    """The factor of a patch that is a diagonal between two sides."""
    factor = patch.form.factor if isinstance(patch.form, Affine) else None
    return factor if isinstance(factor, Core) and isinstance(factor.core, Diag) else None


def framed(patch: Patch) -> bool:
    """Whether a patch is a diagonal between two sides, with a gain."""
    core = _core(patch)
    return core is not None and isinstance(core.frame, Free | Seeded) and core.gain is not None


def diagonal(patch: Patch) -> Core | None:
    """The factor of a patch that is a diagonal between two trained sides, without a gain."""
    core = _core(patch)
    return core if core is not None and isinstance(core.frame, Free) and core.gain is None else None


def with_sides(patch: Patch, places: Mapping[str, tuple[dict[str, Tensor], tuple[int, int]]]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a patch by site, with the sides that follow from a seed where they are not stored.

    Args:
        places: tensors and shape (out, in) by site; all sites of the patch, since the pair is as large as the largest.
    """
    factor = patch.form.factor if isinstance(patch.form, Affine) else None
    assert isinstance(factor, Core)
    if not isinstance(factor.frame, Seeded):
        return {site: dict(tensors) for site, (tensors, _) in places.items()}
    if factor.rank is None:
        raise ModuleError(f"patch {patch.name!r} has no rank of its own; peft's VeRA has one")
    out, inner = (max(shape[side] for _, shape in places.values()) for side in (0, 1))
    draw = DRAWS[factor.frame.draw]
    up = draw((out, factor.rank), Stream(factor.frame.seed, "up"))
    down = draw((factor.rank, inner), Stream(factor.frame.seed, "down"))
    return {site: {**tensors, UP: up[: shape[0]], DOWN: down[:, : shape[1]]} for site, (tensors, shape) in places.items()}


def common(sides: Iterable[Tensors]) -> bool:
    """Whether the sides of all sites are cut from one pair."""
    found = list(sides)
    up = max((t[UP] for t in found), key=len)
    down = max((t[DOWN] for t in found), key=lambda t: t.shape[1])
    return all(torch.equal(up[: len(t[UP])], t[UP]) and torch.equal(down[:, : t[DOWN].shape[1]], t[DOWN]) for t in found)


def joined_sides(layers: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The shared pair of all layers, taken out of their tensors."""
    pairs = [(tensors.pop("vera_A"), tensors.pop("vera_B")) for tensors in layers]
    return {"vera_A": max((a for a, _ in pairs), key=lambda t: t.shape[1]), "vera_B": max((b for _, b in pairs), key=len)}


def _randlora(config: Config, layer: Layer) -> Made:
    return Affine(Dense(), float(config["randlora_dropout"])), Add(float(config["randlora_alpha"]) / int(config["r"]))


def _randlora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Bases scaled at their smaller side: diag(lambda) A diag(gamma) for each, all of them added up."""
    if "randlora_A" not in layer.shared:
        raise ModuleError(f"{layer.path}: the file does not hold the random bases (randlora_A, randlora_B); save it in peft with save_projection=True")
    for name in ("randlora_A", "randlora_B"):  # repeated at every layer by peft 0.21
        if name in layer.tensors and not torch.equal(layer.tensors[name], layer.shared[name]):
            raise ModuleError(f"{layer.path}.{name} differs from the file's own {name}")
    small, large = sorted(layer.shape)
    scale, gain = layer.tensors["randlora_lambda"], layer.tensors["randlora_gamma"]
    bases = scale.shape[1]
    a = (layer.shared["randlora_A"][:, :bases, :small] * scale[..., None] * gain[None, :, :small]).flatten(0, 1)
    change = layer.shared["randlora_B"][:large, :bases].flatten(1) @ a
    return {"factor.value": change if small == layer.shape[1] else change.T}


def _vblora_tensors(config: Config, layer: Layer) -> dict[str, Tensor]:
    """Vectors of a bank, mixed by the softmax over the largest logits."""
    bank, top = layer.shared.get("vblora_vector_bank"), int(config["topk"])
    if bank is None or not 1 <= top <= len(bank):
        raise ModuleError(f"{layer.path}: the file has no vblora_vector_bank of {top} vectors or more")

    def mixed(logits: Tensor) -> Tensor:
        if logits.shape[-1] != len(bank):
            raise ModuleError(f"{layer.path}: {logits.shape[-1]} logits for {len(bank)} vectors; save it in peft with save_only_topk_weights=False")
        chosen, index = logits.topk(top, -1)
        return (chosen.softmax(-1)[..., None] * bank[index]).sum(-2)

    down = mixed(layer.tensors["vblora_logits_A"]).flatten(1)
    return {"factor.down": down, "factor.up": mixed(layer.tensors["vblora_logits_B"]).transpose(1, 2).flatten(0, 1)}


RANDOM: Sequence[Kind] = (
    Kind("VERA", "vera", "out", (Leaf("vera_lambda_b", GAIN), Leaf("vera_lambda_d", DIAGONAL)), _vera_form("vera", 1), _vera_back, _vera("vera", 1),
         _vera_theirs, note=_FRAME),
    Kind("PVERA", "vera", "out", (Leaf("pvera_lambda_b", ""), Leaf("pvera_lambda_d", "")), _vera_form("pvera", 2), build=_vera("pvera", 2),
         note=f"read as a VeRA of the means, which is what inference computes; {_FRAME}"),
    Kind("RANDLORA", "change", "out", (Leaf("randlora_lambda", ""), Leaf("randlora_gamma", "")), _randlora, build=_randlora_tensors,
         optional=("randlora_A", "randlora_B"), note="read as the full change it is: the same outputs, as many numbers as the weights have"),
    Kind("VBLORA", "lora", "out", (Leaf("vblora_logits_A", ""), Leaf("vblora_logits_B", "")),
         lambda c, layer: (Affine(LowRank(layer.tensors["vblora_logits_A"].shape[0]), float(c["vblora_dropout"])), Add()), build=_vblora_tensors,
         note="read as the low-rank product it is: the same outputs, other parameters if training goes on"),
)  # fmt: skip
