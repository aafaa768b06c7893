"""Rotations: of what a layer reads (a rotation of its weight's input side) or of what it writes."""

from __future__ import annotations

from intarsia.methods.low_rank import ATTENTION, weights
from intarsia.methods.method import Method, Patch, Policy, row
from intarsia.patches import Affine, Butterfly, Cayley, FactorSpec, Householder, Matrix, Mul, Pairs, Rot, Rows


def rotation(factor: FactorSpec, at: str, layers: str | None) -> Patch:
    """W' = W R."""
    return Patch("rotation", weights(at), Affine(factor, read="self"), Rot(), port="weight", layers=layers)


@row("oft", equation="W' = W R, R = (I - Q)(I + Q)^-1 by blocks", source="Qiu et al. 2023, arXiv 2306.07280")
def oft(block: int = 32, share: bool = False, at: str = ATTENTION, layers: str | None = None) -> Method:
    """Orthogonal blocks on a layer's input side: angles between its rows stay as they are."""
    return Method("oft", (rotation(Cayley(block, share), at, layers),), Policy(learning_rate=5e-4))


@row("boft", equation="W' = s * W R, R a butterfly product of orthogonal blocks", source="Liu et al. 2024, arXiv 2311.06243")
def boft(block: int = 8, factors: int = 1, gain: bool = True, at: str = ATTENTION, layers: str | None = None) -> Method:
    """Small orthogonal blocks whose product reaches far, and a trained gain per output (`gain`)."""
    turn = rotation(Butterfly(block, factors), at, layers)
    rows = Patch("gain", weights(at), Matrix(Rows()), Mul(), port="weight", layers=layers)
    return Method("boft", (turn, rows) if gain else (turn,), Policy(learning_rate=5e-4))


@row("hra", equation="W' = W H_1 ... H_r, H = I - 2 u u^T / ||u||^2", source="Yuan et al. 2024, arXiv 2405.17484")
def hra(count: int = 8, at: str = ATTENTION, layers: str | None = None) -> Method:
    """A chain of reflections: orthogonal, and a change of rank `count`."""
    return Method("hra", (rotation(Householder(count), at, layers),), Policy(learning_rate=1e-3))


@row("road", equation="y' = R(theta, alpha) (W x + b) in pairs", source="Liao & Monz 2024, arXiv 2409.00119")
def road(group: int = 64, at: str = ATTENTION, layers: str | None = None) -> Method:
    """Outputs turned and stretched two by two: rows of a batch with different modules cost one multiplication each."""
    patch = Patch("turn", at, Affine(Pairs(group), read="self"), Rot(), layers=layers)
    return Method("road", (patch,), Policy(learning_rate=1e-3))
