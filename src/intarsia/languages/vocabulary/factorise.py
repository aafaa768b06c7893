"""Factorisation of a base's embeddings: X ~ codes of the rows over what all rows share (UNKs Everywhere, arXiv 2012.15562).

    mf          X ~ F G            truncated SVD: the best in squares
    mf-kmeans   X ~ F G_c(row)     one basis per cluster of rows (k-means)
    mf-neural   X ~ tanh(F A + b) B    a small network, trained to rebuild the rows

G, A, b, B are frozen afterwards; a language learns codes of its own.  Rows that overlap start at the base's codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from intarsia.errors import UsageError
from intarsia.patches.vocabulary import Coded

How = Literal["mf", "mf-kmeans", "mf-neural"]
_LOOKED_AT, _CHUNK = 20_000, 1_000  # rows that new ones are compared with, and how many at a time
FACTORISATIONS: tuple[How, ...] = ("mf", "mf-kmeans", "mf-neural")


@dataclass(frozen=True, slots=True)
class Factorised:
    """Embeddings as codes and what they share.

    Attributes:
        spec: how rows come about from codes.
        codes: [V, r] of the base's rows.
        cluster: [V], None with one cluster.
        shared: frozen tensors by their name in `Coded`.
        error: relative error of the rebuilt rows, in squares.
    """

    spec: Coded
    codes: Tensor
    cluster: Tensor | None
    shared: dict[str, Tensor]
    error: float

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (and clusters) of other rows [m, d], by least squares.

        Where the map is a network, codes are found by gradient steps from those of the nearest row.
        """
        if self.spec.hidden:
            step = max(1, len(self.codes) // _LOOKED_AT)
            some = self.codes[::step]
            made = rebuilt(self.spec, some, None, self.shared)
            nearest = torch.cat([torch.cdist(part, made).argmin(1) for part in rows.split(_CHUNK)]) if len(rows) else torch.zeros(0, dtype=torch.long)
            return _fit_codes(some[nearest], rows, self.shared, steps=50), None
        basis = self.shared["basis"]
        if self.cluster is None:
            return _solved(basis[0].T, rows.T).T, None
        codes = torch.stack([_solved(basis[c].T, rows.T).T for c in range(len(basis))])
        errors = torch.stack([(codes[c] @ basis[c] - rows).square().sum(1) for c in range(len(basis))])
        best = errors.argmin(0)
        return codes[best, torch.arange(len(rows))], best.to(torch.int32)


def factorise(rows: Tensor, how: How, rank: int = 100, clusters: int = 10, hidden: int = 256, seed: int = 0, steps: int = 300) -> Factorised:
    """Factorise rows [V, d].

    Raises:
        UsageError: unknown name, or a rank that is no compression.
    """
    if how not in FACTORISATIONS:
        raise UsageError(f"a factorisation is one of {', '.join(FACTORISATIONS)}; found {how!r}")
    rows = rows.detach().float()
    if not 1 <= rank < min(rows.shape):
        raise UsageError(f"rank {rank} does not lie below {min(rows.shape)}, the smaller side of the embeddings")
    if how == "mf":
        codes, basis = _svd(rows, rank)
        spec, cluster, shared = Coded(rank), None, {"basis": basis[None]}
    elif how == "mf-kmeans":
        cluster = kmeans(rows, clusters, seed)
        codes, bases = torch.empty(len(rows), rank), torch.zeros(clusters, rank, rows.shape[1])
        for c in range(clusters):
            own = cluster == c
            part, basis = _svd(rows[own], min(rank, int(own.sum())))
            bases[c, : len(basis)] = basis
            codes[own] = torch.nn.functional.pad(part, (0, rank - part.shape[1]))
        spec, shared = Coded(rank, clusters), {"basis": bases}
    else:
        spec, cluster = Coded(rank, hidden=hidden), None
        codes, shared = _network(rows, rank, hidden, seed, steps)
    made = rebuilt(spec, codes, cluster, shared)
    error = float((made - rows).square().sum() / rows.square().sum())
    return Factorised(spec, codes, cluster, shared, error)


def rebuilt(spec: Coded, codes: Tensor, cluster: Tensor | None, shared: dict[str, Tensor]) -> Tensor:
    """Rows from codes, as `CodedFactor.materialise`."""
    if spec.hidden:
        return torch.tanh(codes @ shared["basis"][0] + shared["bias"]) @ shared["top"]
    if cluster is None:
        return codes @ shared["basis"][0]
    made = torch.empty(len(codes), shared["basis"].shape[-1])
    for c in range(spec.clusters):
        made[cluster == c] = codes[cluster == c] @ shared["basis"][c]
    return made


def _svd(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Codes [n, r] and orthonormal basis [r, d], from the eigenvectors of the small Gram matrix."""
    gram = (rows.T.double() @ rows.double()) if len(rows) else torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank].T.float()
    largest = vectors.abs().argmax(1, keepdim=True)
    vectors = vectors * vectors.gather(1, largest).sign()  # eigenvectors have no sign of their own
    return rows @ vectors.T, vectors.contiguous()


def _solved(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The least-squares solution of matrix @ x = wanted, by normal equations: LAPACK's own solvers differ in the last digit from call to call."""
    a, b = matrix.double(), wanted.double()
    gram = a.T @ a
    ridge = 1e-10 * float(gram.diagonal().mean()) + 1e-12
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), a.T @ b).float()


def kmeans(rows: Tensor, clusters: int, seed: int = 0, rounds: int = 20) -> Tensor:
    """Cluster of each row, int64 [V]; Lloyd's rounds from drawn rows, an empty cluster takes the farthest row."""
    if not 1 <= clusters <= len(rows):
        raise UsageError(f"{clusters} clusters of {len(rows)} rows")
    draw = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=draw)[:clusters]].clone()
    found = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(rounds):
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(1)
        new = distances.argmin(1)
        for c in range(clusters):
            if not bool((new == c).any()):
                new[distances.min(1).values.argmax()] = c
        if torch.equal(new, found):
            break
        found = new
        centres = torch.stack([rows[found == c].mean(0) for c in range(clusters)])
    return found


def _network(rows: Tensor, rank: int, hidden: int, seed: int, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and a network, trained together from the linear solution."""
    codes, _ = _svd(rows, rank)
    scale = codes.std().clamp(min=1e-8)
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(rank, hidden, generator=draw) * rank**-0.5
    inner = torch.tanh(codes / scale @ first)
    top = _solved(inner, rows)
    parts = {"codes": codes / scale, "first": first, "bias": torch.zeros(hidden), "top": top}
    for value in parts.values():
        value.requires_grad_(True)
    optimiser = torch.optim.Adam(list(parts.values()), lr=5e-3)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(rows), (min(len(rows), 4096),), generator=draw)
            made = torch.tanh(parts["codes"][chosen] @ parts["first"] + parts["bias"]) @ parts["top"]
            loss = (made - rows[chosen]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    done = {name: value.detach() for name, value in parts.items()}
    return done["codes"], {"basis": done["first"][None], "bias": done["bias"], "top": done["top"]}


def _fit_codes(start: Tensor, rows: Tensor, shared: dict[str, Tensor], steps: int) -> Tensor:
    codes = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([codes], lr=0.05)
    with torch.enable_grad():
        for _ in range(steps):
            made = torch.tanh(codes @ shared["basis"][0] + shared["bias"]) @ shared["top"]
            loss = (made - rows).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return codes.detach()
