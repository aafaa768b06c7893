"""Codes of tensors: lossless ones give everything back, int8 within its stated bound; damaged and hostile texts are refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import ModuleError, UsageError
from intarsia.modules import Module, compact, dumps, load, loads, read_header, save
from intarsia.modules.coding import Coded, check_size, decoded, encoded, rounded, takes_int8
from tests.modules.make import forge, module, one_of_each, sparse


def test_sparse_modules_are_small_and_the_same() -> None:
    made = module(tensors=sparse())
    data = dumps(made)
    back = loads(data)
    assert back == made and dumps(back) == data
    assert all(torch.equal(t, back.tensors[k]) and t.dtype == back.tensors[k].dtype for k, t in made.tensors.items())
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sizes = {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in entries.items() if k != "__metadata__"}
    assert sizes["0.ffn.up/diff.mask"] == 40 * 77 // 8
    assert sizes["0.ffn.up/diff.index"] < 700 * 2 and sizes["1.ffn.up/diff.index"] < 270 * 2.5
    assert sizes["stem/x.order"] == 500 * 8, "values that do not rise stay as they are"


def test_header_shows_what_coded_tensors_are(tmp_path: Path) -> None:
    save(module(tensors=sparse()), tmp_path / "m")
    header = read_header(tmp_path / "m")
    assert header.version == 2 and set(header.coding) == {"0.ffn.up/diff.mask", "0.ffn.up/diff.index", "1.ffn.up/diff.index"}
    assert {k: (e.dtype, e.shape) for k, e in header.tensors.items()}["1.ffn.up/diff.index"] == ("I32", (3, 90))


def test_files_without_codes_are_version_1() -> None:
    assert json.loads(dumps(module())[8:].split(b"}}")[0].decode("utf-8", "ignore") + "}}")["__metadata__"]["version"] == "1"


numbers = st.lists(st.integers(0, 2**62), min_size=1, max_size=30, unique=True).map(sorted)


@given(st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=60).map(lambda v: ("bits", torch.tensor(v))),
    numbers.map(lambda v: ("gaps", torch.tensor(v))),
))  # fmt: skip
@settings(deadline=None)
def test_lossless_codes_are_a_bijection(given: Any) -> None:
    from intarsia.modules.coding import _encode

    code, tensor = given
    text = _encode(code, tensor)
    assert text is not None
    what = Coded(code, "BOOL" if code == "bits" else "I64", tuple(tensor.shape))
    check_size("k", what, len(text))
    assert torch.equal(decoded("k", what, text), tensor)
    for place in range(len(text)):  # any other text is another tensor or refused
        other = text.clone()
        other[place] ^= 1 << (place % 8)
        with contextlib.suppress(ModuleError):
            assert not torch.equal(decoded("k", what, other), tensor)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(3, 40), (2, 3, 64), (700,), (5, 4), (256,), (64, 8)]), st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e30]))
@settings(deadline=None)
def test_int8_is_within_its_bound_and_rounds_once(seed: int, shape: tuple[int, ...], size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * size * torch.rand((*shape[:-1], 1), generator=g)
    y = rounded(x)
    assert torch.equal(rounded(y), y)
    flat, near = (x, y) if x.dim() > 1 else (torch.nn.functional.pad(v, (0, -len(v) % 256)).view(-1, 256) for v in (x, y))
    bound = (flat.abs().amax(-1, keepdim=True).double() / 253).clamp(min=2.0**-100)
    assert bool(((flat - near).abs().double() <= bound).all())
    if x.numel() * 4 >= 512:
        assert takes_int8(x)
        found = encoded(y, True)
        assert found is not None and torch.equal(decoded("k", *found), y)


def test_choices_are_stated_and_never_silent(tmp_path: Path) -> None:
    made = module(tensors=sparse())
    sizes = {}
    for dtype in ("fp32", "bf16", "int8"):
        digest = save(made, tmp_path / dtype, dtype=dtype)
        back = load(tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
        assert digest == back.digest == compact(made, dtype).digest
        assert back.card.warnings == () if dtype == "fp32" else (digest != made.digest and "rounded" in back.card.warnings[0])
        assert dumps(back, dtype=dtype) == (tmp_path / dtype).read_bytes(), "rounding twice is rounding once"
        assert loads(dumps(back)) == back, "the digest does not depend on the coding"
        for key, tensor in made.tensors.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, back.tensors[key])
    assert sizes["int8"] < sizes["bf16"] < sizes["fp32"]
    assert save(made, tmp_path / "plain") == made.digest
    with pytest.raises(UsageError, match="int4"):
        save(made, tmp_path / "no", dtype="int4")  # type: ignore[arg-type]


def test_every_type_survives_compacting() -> None:
    made = module(tensors=one_of_each())
    for dtype in ("fp32", "bf16", "int8"):
        assert loads(dumps(made, dtype=dtype)) == compact(made, dtype)


def test_every_flipped_byte_of_a_coded_file_is_refused() -> None:
    g = torch.Generator().manual_seed(0)
    made = module(tensors={
        "0.x/m.mask": torch.rand(400, generator=g) < 0.5, "0.x/m.index": torch.arange(0, 6000, 100), "0.x/m.up": torch.randn(16, 12, generator=g)
    }, labels=None, context={}, requires=())  # fmt: skip
    data = dumps(made, dtype="int8")
    assert set(json.loads(forged_meta(data)["coding"])) == set(made.tensors)
    body = 8 + int.from_bytes(data[:8], "little")
    for place in range(body, len(data)):
        with pytest.raises(ModuleError, match=r"damaged|NaN"):
            loads(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])


def forged_meta(data: bytes) -> dict[str, str]:
    seen: dict[str, str] = {}
    forge(data, lambda header: seen.update(header["__metadata__"]))
    return seen


@pytest.mark.parametrize(
    ("coding", "words"),
    [
        ("[]", "coding is not an object"),
        ("{}", "coding is not an object"),
        ('{"0.none/x.y":["bits","BOOL",[3]]}', "no row of bytes"),
        ('{"0.ffn.up/diff.values":["bits","BOOL",[3]]}', "no row of bytes"),
        ('{"0.ffn.up/diff.mask":["zstd","BOOL",[3]]}', "coded as 'zstd'"),
        ('{"0.ffn.up/diff.mask":["bits","I64",[3]]}', "of 'I64'"),
        ('{"0.ffn.up/diff.mask":["bits","BOOL",[281474976710655,281474976710655]]}', "cannot have"),
        ('{"0.ffn.up/diff.mask":["gaps","I64",[99999999999]]}', "cannot have"),
        ('{"0.ffn.up/diff.mask":["int8","F32",[0,5]]}', "cannot have"),
        ('{"0.ffn.up/diff.mask":["int8","F32",[]]}', "cannot have"),
        ('{"0.ffn.up/diff.mask":["bits","BOOL",[-1]]}', "expected"),
        ('{"0.ffn.up/diff.mask":["bits","BOOL",[1,1,1,1,1,1,1,1,3080]]}', "expected"),
        ('{"0.ffn.up/diff.mask":["bits","BOOL"]}', "expected"),
        ('{"0.ffn.up/diff.mask":["bits","BOOL",[3081]]}', "cannot have|damaged"),
    ],
)
def test_hostile_codings_are_refused(coding: str, words: str) -> None:
    data = forge(dumps(module(tensors=sparse())), lambda header: header["__metadata__"].update(coding=coding))
    with pytest.raises(ModuleError, match=words):
        loads(data)


def test_a_coding_belongs_to_version_2() -> None:
    data = dumps(module(tensors=sparse()))
    with pytest.raises(ModuleError, match="unknown entries 'coding'"):
        loads(forge(data, lambda header: header["__metadata__"].update(version="1")))
    with pytest.raises(ModuleError, match="missing entries coding"):
        loads(forge(data, lambda header: header["__metadata__"].pop("coding")))
    with pytest.raises(ModuleError, match=r"format version 3.*reads up to 2"):
        loads(forge(data, lambda header: header["__metadata__"].update(version="3")))


@given(st.binary(min_size=1, max_size=80), st.sampled_from([("bits", "BOOL"), ("gaps", "I64"), ("gaps", "I32"), ("int8", "F32")]),
       st.lists(st.integers(0, 80), max_size=3))  # fmt: skip
@settings(deadline=None)
def test_any_bytes_are_a_tensor_or_refused(data: bytes, code: tuple[str, str], shape: list[int]) -> None:
    what, text = Coded(*code, tuple(shape)), torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        check_size("k", what, len(text))
        assert decoded("k", what, text).shape == tuple(shape)
    except ModuleError:
        pass


def test_equal_modules_compacted_stay_one_value() -> None:
    made = module(tensors=sparse())
    once = compact(made, "int8")
    assert compact(once, "int8") is once and isinstance(once, Module) and len(once.card.warnings) == 1
