"""Codes for tensors in a module file that are shorter than their memory: `bits`, `gaps` and `int8`.

| code   | of                                              | bytes in the file                                                    |
|--------|-------------------------------------------------|----------------------------------------------------------------------|
| `bits` | BOOL                                            | 8 values a byte, the first in the lowest bit; the rest of the last byte is 0 |
| `gaps` | I32, I64, not negative, rising along the last axis | per row the first value, then each step less one; 7 bits a byte, low ones first, the high bit set on all but a number's last byte |
| `int8` | F32                                             | one F32 scale per row, then one signed byte per value: value = byte * scale |

A row is the last axis; a vector in `int8` has rows of 256 values.  `bits` and `gaps` lose nothing.  `int8` stores exactly the
values that `rounded` gives: what is lost is lost there, by choice, and not in the file.  Its scales have 16 significant bits
and the largest byte of a row is 127, so that rounding again changes nothing.

A code is chosen by a tensor's type and values, never by the method it belongs to.  Decoding checks sizes before it allocates, and
accepts one text per tensor only: the one that encoding gives.

What is not here: where a code stands in the file (`file.py`), rounding whole modules (`compact.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from intarsia.errors import ModuleError
from intarsia.modules.module import DTYPE_NAMES, DTYPES

CODES: Mapping[str, tuple[str, ...]] = MappingProxyType({"bits": ("BOOL",), "gaps": ("I64", "I32"), "int8": ("F32",)})
"""Types of tensors by the code that is made for them."""

VECTOR_ROW = 256
_WORTH = 256  # bytes that a code must save: its entry in the header takes some itself
_TINY, _HUGE = 2.0**-100, 2.0**126
_LONGEST = 9  # bytes of a number below 2**63


class Coded(NamedTuple):
    """What a coded tensor is."""

    code: str
    dtype: str
    shape: tuple[int, ...]


def encoded(tensor: Tensor, int8: bool) -> tuple[Coded, Tensor] | None:
    """A tensor's shorter text, uint8 [bytes]; None if it has none that is worth it.

    Args:
        int8: the tensor comes from `rounded`.
    """
    dtype, size = DTYPE_NAMES[tensor.dtype], tensor.numel() * tensor.element_size()
    if size < _WORTH:
        return None
    for code, dtypes in CODES.items():
        if dtype in dtypes and (code != "int8" or (int8 and takes_int8(tensor))):
            text = _encode(code, tensor)
            if text is not None and size - len(text) >= _WORTH:
                return Coded(code, dtype, tuple(tensor.shape)), text
    return None


def check_size(key: str, what: Coded, nbytes: int) -> None:
    """Refuse a coded tensor whose type or shape does not go with the bytes it has; allocates nothing.

    Raises:
        ModuleError: names the tensor and the sizes.
    """
    if what.dtype not in CODES.get(what.code, ()):
        raise ModuleError(f"header: tensor {key!r} is coded as {what.code[:40]!r} of {what.dtype[:40]!r}; known are {', '.join(f'{c} of {d[0]}' for c, d in CODES.items())}")
    values = prod(what.shape)
    low = high = {"bits": (values + 7) // 8, "gaps": values, "int8": values + 4 * _rows(what.shape)}[what.code]
    high *= _LONGEST if what.code == "gaps" else 1
    if not values or not what.shape or not low <= nbytes <= high:
        raise ModuleError(f"header: tensor {key!r} of {what.dtype} {list(what.shape)} as {what.code!r} cannot have {nbytes:,} bytes")


def decoded(key: str, what: Coded, text: Tensor) -> Tensor:
    """The tensor of a text that `check_size` has accepted.

    Raises:
        ModuleError: the text is not the one that encoding gives.
    """
    found = _decode(what, text)
    again = None if found is None else _encode(what.code, found)
    if found is None or again is None or not torch.equal(again, text):
        raise ModuleError(f"damaged: the bytes of tensor {key!r} are no {what.code!r} text of {what.dtype} {list(what.shape)}")
    return found


def takes_int8(tensor: Tensor) -> bool:
    """Whether `rounded` changes a tensor: matrices with rows of 4 and more, vectors of 256 and more, values below 2**126."""
    wide = tensor.dim() > 0 and tensor.numel() * 4 >= 2 * _WORTH and tensor.shape[-1] >= (4 if tensor.dim() > 1 else VECTOR_ROW)
    return wide and tensor.dtype == torch.float32 and float(tensor.abs().max()) < _HUGE


def rounded(tensor: Tensor) -> Tensor:
    """A float32 tensor as `int8` can hold it: each value is off by at most 1/253 of its row's largest (or by 2**-100)."""
    scales, bytes_ = _int8(tensor)
    return _values(scales, bytes_, tuple(tensor.shape))


def _rows(shape: tuple[int, ...]) -> int:
    return prod(shape[:-1]) if len(shape) > 1 else -(-shape[0] // VECTOR_ROW) if shape else 0


def _as_rows(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[rows, width]; the last row of a vector is filled up with zeros."""
    if len(shape) > 1:
        return flat.view(-1, shape[-1])
    return torch.nn.functional.pad(flat, (0, -len(flat) % VECTOR_ROW)).view(-1, VECTOR_ROW)


def _int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [rows] and bytes [rows, width]."""
    rows = _as_rows(tensor.reshape(-1), tuple(tensor.shape))
    top = rows.abs().amax(1)
    scales = (((top / 127).view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    scales = torch.where(top < _TINY, 0.0, scales)
    return scales, (rows / scales.clamp(min=2.0**-110)[:, None]).round().clamp(-127, 127).mul(scales[:, None] > 0).to(torch.int8)


def _values(scales: Tensor, bytes_: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = (bytes_.float() * scales[:, None]).reshape(-1)[: prod(shape)].view(shape)
    return found + 0.0  # no negative zeros


def _encode(code: str, tensor: Tensor) -> Tensor | None:
    """uint8 [bytes]; None if the code has no text for these values."""
    if code == "bits":
        return torch.from_numpy(np.packbits(tensor.reshape(-1).numpy(), bitorder="little"))
    if code == "gaps":
        return _gaps(tensor.reshape(-1, tensor.shape[-1]).long())
    scales, bytes_ = _int8(tensor)
    return torch.cat([scales.view(torch.uint8), bytes_.reshape(-1)[: tensor.numel()].view(torch.uint8)])


def _gaps(rows: Tensor) -> Tensor | None:
    steps = rows.diff(dim=1, prepend=torch.full((len(rows), 1), -1)) - 1
    if bool((rows < 0).any()) or bool((steps < 0).any()):
        return None
    numbers = steps.reshape(-1).numpy()
    lengths = np.ones(len(numbers), np.int64)
    for place in range(1, _LONGEST):
        lengths += numbers >> (7 * place) > 0
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    text = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max())):
        here = lengths > place
        more = (lengths[here] > place + 1).astype(np.uint8) << 7
        text[starts[here] + place] = (numbers[here] >> (7 * place) & 0x7F).astype(np.uint8) | more
    return torch.from_numpy(text)


def _decode(what: Coded, text: Tensor) -> Tensor | None:
    values, shape = prod(what.shape), what.shape
    if what.code == "bits":
        bits: Any = np.unpackbits(text.numpy(), count=values, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)
    if what.code == "gaps":
        numbers = _numbers(text.numpy(), values)
        if numbers is None:
            return None
        steps = torch.from_numpy(numbers).view(-1, shape[-1])
        steps[:, 1:] += 1
        found = steps.cumsum(1)  # what overflows falls somewhere, and then has another text
        wanted = DTYPES[what.dtype]
        return None if int(found.max()) > torch.iinfo(wanted).max else found.to(wanted).view(shape)
    rows = _rows(shape)
    scales = text[: 4 * rows].clone().view(torch.float32)
    if not bool((scales.isfinite() & (scales >= 0) & (scales < _HUGE)).all()):
        return None
    return _values(scales, _as_rows(text[4 * rows :].view(torch.int8), shape), shape)


def _numbers(text: Any, count: int) -> Any:
    """int64 [count], None if the text holds another number of numbers or too long ones."""
    ends = np.flatnonzero(text < 128)
    if len(ends) != count or ends[-1] != len(text) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        return None
    found = np.zeros(count, np.int64)
    for place in range(int(lengths.max())):
        here = lengths > place
        found[here] |= (text[starts[here] + place] & 0x7F).astype(np.int64) << (7 * place)
    return found
