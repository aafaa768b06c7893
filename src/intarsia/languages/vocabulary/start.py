"""Rows for pieces that the base does not have: how they start.

| name | a row starts as | source |
|---|---|---|
| `random` | a draw from the normal distribution of the base's rows | UNKs Everywhere, EL-RAND |
| `mean` | the mean of the base's pieces of its text, where the base knows them | common practice |
| `focus` | a weighted mean of copied rows, weighted by how alike the pieces are used in the text (sparsemax of the cosine) | FOCUS, Dobler & de Melo 2023, arXiv 2305.14481 |
| `parallel` | a weighted mean of the base's rows for pieces that occur in the same verses | after WECHSEL, Minixhofer et al. 2022, arXiv 2112.06598 |

Rows of overlapping pieces are copied (EL-LEX) whatever the name; what an initialiser cannot reach (no known piece, too rare) starts at
random.  Where FOCUS trains fastText vectors, this computes vectors from the positive pointwise mutual information of neighbouring
pieces and a truncated SVD; where WECHSEL aligns static vectors by a dictionary, this compares pieces by the parallel verses they occur in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from intarsia.errors import UsageError
from intarsia.languages.vocabulary.tokenizer import MARK, Pieces, canonical, make

Start = Literal["random", "mean", "focus", "parallel"]
STARTS: tuple[Start, ...] = ("random", "mean", "focus", "parallel")
DIMENSIONS = 100
WINDOW = 4
NEIGHBOURS = 10


def overlap(pieces: Pieces, base: Any) -> dict[int, int]:
    """Id of a piece -> id of the base's equal piece; special tokens always, others where the text and its place in a word are the same."""
    known = canonical(base)
    found = {}
    for i, text in enumerate(pieces.texts):
        if text in pieces.specials:
            found[i] = int(base.convert_tokens_to_ids(text))
        elif text in known:
            found[i] = known[text]
    return found


def rows(
    pieces: Pieces, base: Any, embeddings: Tensor, copied: dict[int, int], how: Start, texts: Sequence[str] = (), pairs: Sequence[tuple[str, str]] = (), seed: int = 0
) -> tuple[Tensor, dict[str, int]]:
    """Start values for the pieces that are not copied, [m, d], in the order of their ids.

    Args:
        embeddings: the base's, [V, d].
        texts: of the language, for `focus`.
        pairs: (other language, this one), for `parallel`.

    Returns:
        The rows, and how many came about in which way.

    Raises:
        UsageError: unknown name, or what it needs was not given.
    """
    if how not in STARTS:
        raise UsageError(f"rows start as one of {', '.join(STARTS)}; found {how!r}")
    own = [i for i in range(len(pieces)) if i not in copied]
    base_rows = embeddings.detach().float()
    spread, middle = base_rows.std(0), base_rows.mean(0)
    draw = torch.Generator().manual_seed(seed)
    made = middle + spread * torch.randn(len(own), base_rows.shape[1], generator=draw)
    if how == "random":
        return made, {"random": len(own)}
    found = {
        "mean": lambda: _mean(pieces, base, base_rows, own),
        "focus": lambda: _focus(pieces, base, base_rows, copied, own, texts, seed),
        "parallel": lambda: _parallel(pieces, base, base_rows, own, pairs, seed),
    }[how]()
    for place, row in found.items():
        made[place] = row
    return made, {how: len(found), "random": len(own) - len(found)}


def _mean(pieces: Pieces, base: Any, embeddings: Tensor, own: Sequence[int]) -> dict[int, Tensor]:
    found = {}
    texts = [pieces.texts[i] for i in own]
    split = base([text.replace(MARK, " ").strip() or " " for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    for place, ids in enumerate(split):
        if ids and base.unk_token_id not in ids:
            found[place] = embeddings[torch.tensor(ids)].mean(0)
    return found


def _focus(
    pieces: Pieces, base: Any, embeddings: Tensor, copied: dict[int, int], own: Sequence[int], texts: Sequence[str], seed: int
) -> dict[int, Tensor]:
    if not texts:
        raise UsageError("focus compares pieces by the text they occur in: give a corpus")
    ids = make(pieces, base)(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    vectors, counts = use_vectors(ids, len(pieces), seed)
    anchors = [i for i in copied if counts[i] > 0 and pieces.texts[i] not in pieces.specials]
    if not anchors:
        return {}
    table, targets = vectors[anchors], embeddings[torch.tensor([copied[i] for i in anchors])]
    return {place: row for place, i in enumerate(own) if counts[i] > 0 and (row := _blend(table @ vectors[i], targets)) is not None}


def _parallel(pieces: Pieces, base: Any, embeddings: Tensor, own: Sequence[int], pairs: Sequence[tuple[str, str]], seed: int) -> dict[int, Tensor]:
    if not pairs:
        raise UsageError("parallel compares pieces by the verses they occur in: give a corpus with parallel verses")
    there = base([other for other, _ in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    here = make(pieces, base)([text for _, text in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    used = sorted({i for ids in there for i in ids} - set(base.all_special_ids))
    index = {i: n for n, i in enumerate(used)}
    joint = [[index[i] for i in a if i in index] + [len(used) + i for i in b] for a, b in zip(there, here)]
    vectors, counts = verse_vectors(joint, len(used) + len(pieces), seed)
    targets = embeddings[torch.tensor(used)]
    found = {}
    for place, i in enumerate(own):
        if counts[len(used) + i] > 1:
            row = _blend(vectors[: len(used)] @ vectors[len(used) + i], targets)
            if row is not None:
                found[place] = row
    return found


def _blend(similarity: Any, targets: Tensor) -> Tensor | None:
    """Rows weighted by the sparsemax of the nearest ones' similarity; None if nothing is alike."""
    nearest = np.argsort(-similarity, kind="stable")[:NEIGHBOURS]
    best = similarity[nearest]
    if not len(best) or best[0] <= 0:
        return None
    weights = torch.from_numpy(sparsemax(best / 0.1)).float()
    return weights @ targets[torch.from_numpy(nearest.copy())]


def sparsemax(z: Any) -> Any:
    """Projection onto the simplex (Martins & Astudillo 2016), [n]."""
    z = np.asarray(z, dtype=np.float64)
    order = np.sort(z)[::-1]
    total = np.cumsum(order) - 1
    k = np.arange(1, len(z) + 1)
    last = int(np.flatnonzero(order * k > total)[-1])
    return np.maximum(z - total[last] / (last + 1), 0.0)


def use_vectors(ids: Sequence[Sequence[int]], size: int, seed: int) -> tuple[Any, Any]:
    """Unit vectors [size, r] of pieces by their neighbours within a window, and counts [size]; a piece that never occurs is zero."""
    lengths = [len(row) for row in ids]
    flat = np.fromiter((i for row in ids for i in row), dtype=np.int64, count=sum(lengths))
    line = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(flat, minlength=size)
    rows_, cols, weights = [], [], []
    for gap in range(1, WINDOW + 1):
        same = line[gap:] == line[:-gap]
        a, b = flat[:-gap][same], flat[gap:][same]
        rows_ += [a, b]
        cols += [b, a]
        weights.append(np.full(2 * len(a), 1.0 / gap))
    return _factored(np.concatenate(rows_), np.concatenate(cols), np.concatenate(weights), (size, size), seed), counts


def verse_vectors(ids: Sequence[Sequence[int]], size: int, seed: int) -> tuple[Any, Any]:
    """The same by the lines pieces occur in."""
    lengths = [len(set(row)) for row in ids]
    flat = np.fromiter((i for row in ids for i in sorted(set(row))), dtype=np.int64, count=sum(lengths))
    line = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(flat, minlength=size)
    return _factored(flat, line, np.ones(len(flat)), (size, len(ids)), seed), counts


def _factored(rows_: Any, cols: Any, weights: Any, shape: tuple[int, int], seed: int) -> Any:
    """Rows of the positive pointwise mutual information of pairs, in the space of a truncated (randomised) SVD, unit length."""
    key = rows_ * shape[1] + cols
    unique, inverse = np.unique(key, return_inverse=True)
    value = np.bincount(inverse, weights=weights)
    row, col = unique // shape[1], unique % shape[1]
    total = value.sum()
    if not total:
        return np.zeros((shape[0], 1))
    by_row, by_col = np.bincount(row, weights=value, minlength=shape[0]), np.bincount(col, weights=value, minlength=shape[1])
    pmi = np.maximum(np.log(value * total / (by_row[row] * by_col[col])), 0.0)
    matrix = torch.sparse_coo_tensor(torch.from_numpy(np.stack([row, col])), torch.from_numpy(pmi), shape, check_invariants=True).coalesce()
    rank = min(DIMENSIONS, *shape)
    draw = torch.Generator().manual_seed(seed)
    probe = torch.randn(shape[1], min(rank + 10, *shape), dtype=torch.float64, generator=draw)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(3):
        basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
    u, s, _ = torch.linalg.svd((matrix.t() @ basis).t(), full_matrices=False)
    vectors = ((basis @ u)[:, :rank] * s[:rank].sqrt()).numpy()
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-12)
