"""Few trained numbers in a fixed basis: random, of the weight's own singular vectors, of Fourier, of circulants."""

from __future__ import annotations

from intarsia.methods.low_rank import ATTENTION, weights
from intarsia.methods.method import Method, Patch, Policy, row
from intarsia.patches import (
    Add,
    Affine,
    Circulant,
    Core,
    Dense,
    Diag,
    Fourier,
    Matrix,
    Pattern,
    Projection,
    Seeded,
    Singular,
)


@row("vera", equation="y' = W x + diag(b) B diag(d) A x, A and B random and shared", source="Kopiczko et al. 2024, arXiv 2310.11454")
def vera(
    rank: int = 256,
    start: float = 0.1,
    seed: int = 0,
    at: str = ATTENTION,
    dropout: float = 0.0,
    layers: str | None = None,
) -> Method:
    """Two trained vectors per layer around one frozen random pair, drawn from a seed and not stored."""
    core = Core(rank, Seeded(seed), Diag(start), gain="zeros")
    return Method("vera", (Patch("vera", at, Affine(core, dropout), layers=layers),), Policy(learning_rate=5e-3))


@row("lora_xs", equation="y' = W x + (alpha / r) U_r R S_r V_r^T x", source="Balazy et al. 2024, arXiv 2405.17604")
def lora_xs(
    rank: int = 16, alpha: float = 16.0, at: str = ATTENTION, dropout: float = 0.0, layers: str | None = None
) -> Method:
    """A trained r x r matrix between the leading singular vectors of the weight, which are computed and not stored."""
    form = Affine(Core(rank, Singular("down"), Dense(), "tiny"), dropout)
    return Method("lora_xs", (Patch("core", at, form, Add(alpha / rank), layers=layers),), Policy(learning_rate=1e-3))


@row("svft", equation="W' = U (S + M) V^T, M with few entries", source="Lingam et al. 2024, arXiv 2405.19597")
def svft(
    pattern: str = "band",
    width: int = 0,
    start: str = "zeros",
    gate: bool = False,
    seed: int = 0,
    at: str = ATTENTION,
    layers: str | None = None,
) -> Method:
    """Trained entries on the weight's singular values: `band` (plain with width 0), `random` or `aligned` (top-k).

    M starts at zero as in the paper; the released code starts it at random behind a gate (`start="kaiming"`, `gate=True`).
    """
    entries = Pattern(pattern, width, seed, gate)  # type: ignore[arg-type]
    plain = pattern == "band" and width == 0 and not gate
    form = Affine(Core(None, Singular("none"), Diag() if plain else entries, start))
    return Method("svft", (Patch("svft", at, form, layers=layers),), Policy(learning_rate=1e-3))


@row("fourierft", equation="W' = W + alpha Re(IDFT2(F)), F with n real entries", source="Gao et al. 2024, arXiv 2405.03003")
def fourierft(
    count: int = 1000,
    alpha: float = 150.0,
    seed: int = 777,
    start: str = "unit",
    stream: str = "philox",
    at: str = ATTENTION,
    layers: str | None = None,
) -> Method:
    """Coefficients at fixed random positions of the weight's spectrum; as released they start at N(0, 1), not at the base."""
    factor = Fourier(count, seed, start, stream)  # type: ignore[arg-type]
    patch = Patch("spectrum", weights(at), Matrix(factor), Add(alpha), port="weight", layers=layers)
    return Method("fourierft", (patch,), Policy(learning_rate=3e-2))


@row("c3a", equation="y' = W x + C x / in, C of circulant blocks", source="Chen et al. 2024, arXiv 2407.19342")
def c3a(
    block: int = 256, start: str = "glorot", at: str = ATTENTION, dropout: float = 0.0, layers: str | None = None
) -> Method:
    """Circular convolutions: high rank from one vector per block; as released it does not start at the base (`start="zeros"` does)."""
    patch = Patch("circulant", at, Affine(Circulant(block, start), dropout), layers=layers)
    return Method("c3a", (patch,), Policy(learning_rate=1e-1))


@row("intrinsic", equation="theta' = theta + P z, z in R^d", source="Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2021, arXiv 2012.13255")
def intrinsic(
    dimension: int = 1000, projection: str = "fastfood", seed: int = 0, at: str = "**", layers: str | None = None
) -> Method:
    """Every parameter moves in one random subspace of `dimension` directions."""
    factor = Projection(dimension, projection, seed)  # type: ignore[arg-type]
    patch = Patch("subspace", at, Matrix(factor), port="weight", layers=layers)
    return Method("intrinsic", (patch,), Policy(learning_rate=3e-2))


@row("said", equation="theta_i' = theta_i + lambda_i P_i z, (z, lambda) in R^d", source="Aghajanyan et al. 2021, arXiv 2012.13255")
def said(
    dimension: int = 20_000, seed: int = 0, official: bool = False, at: str = "**", layers: str | None = None
) -> Method:
    """The same by Fastfood, with a trained factor per tensor inside the dimension.

    `official=True` copies two quirks of the released code, see `Projection`.
    """
    factor = Projection(dimension, "fastfood", seed, scaled=True, official=official)
    patch = Patch("subspace", at, Matrix(factor), port="weight", layers=layers)
    return Method("said", (patch,), Policy(learning_rate=3e-2))
