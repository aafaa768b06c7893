"""Singular vectors of a base weight, so computed that other machines find the same: in double precision, with a sign rule.

The sign rule: the entry of largest magnitude of every left vector is positive.  Directions of equal singular values are
not determined by the weight; there two machines may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.errors import SpecError

#: below this share of the largest singular value the squared spectrum has lost too many digits
GRAM_LIMIT = 1e-5


@torch.no_grad()
def thin(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], S [k], V^T [k, n] of a matrix [m, n], k = min(m, n); float32 on the CPU."""
    u, s, vt = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    return _signed(u, s, vt)


@torch.no_grad()
def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest of `thin`, by the eigenvectors of the smaller of W W^T and W^T W."""
    w = weight.detach().to("cpu", torch.float64)
    check_rank(rank, w)
    wide = w.shape[0] <= w.shape[1]
    values, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)
    s = values[-rank:].flip(0).clamp(min=0).sqrt()
    if not s[-1] > GRAM_LIMIT * s[0]:
        return tuple(part[..., :rank] if i < 2 else part[:rank] for i, part in enumerate(thin(weight)))  # type: ignore[return-value]
    side = vectors[:, -rank:].flip(1)
    if wide:
        return _signed(side, s, (side.T @ w) / s[:, None])
    return _signed((w @ side) / s, s, side.T)


def check_rank(rank: int, weight: Tensor) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        SpecError: it is above the smaller side.
    """
    if weight.dim() != 2 or rank > min(weight.shape):
        raise SpecError(f"rank {rank} is above the smaller side of a weight of shape {tuple(weight.shape)}")


def _signed(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sign = torch.gather(u, 0, u.abs().argmax(0)[None])[0].sign()
    sign[sign == 0] = 1
    return (u * sign).float().contiguous(), s.float(), (vt * sign[:, None]).float().contiguous()
